"""The picture of docs/performance.md: images a second of other trainers and of Kiln, drawn from rows of `bench peers`.

    python -m bench peers --family flux --batch 4 --ours … >> docs/peers.jsonl
    python -m bench picture docs/peers.jsonl docs/peers.svg

Each line of the first file is a row that `python -m bench peers` has printed. Rows of Kiln are those whose name is a
variant of `python -m bench step`. The same rows give the same bytes.
"""

from __future__ import annotations

import argparse
import html
import json
from pathlib import Path
from typing import Any

from trainer.spec.weight_formats import PRECISIONS

WIDTH, ROW, BAR = 860, 34, 20  # pixels
LABELS, RIGHT = 320, 220  # pixels left of the bars, and for the figures right of the longest
TOP, BOTTOM = 56, 14
NAMES = {  # of rows that say only what was done to diffusers' model
    "bf16 eager": "diffusers, bf16, checkpointing",
    "bf16 compiled": "diffusers, bf16, compiled",
    "torchao compiled": "diffusers, torchao float8, compiled",
}
INK, PAPER, OTHERS, OURS = "#24292f", "#ffffff", "#8c959f", "#b5390a"


def is_ours(row: dict[str, Any]) -> bool:
    return row["what"].split("+")[0] in PRECISIONS


def drawn(rows: list[dict[str, Any]], title: str) -> str:
    """An SVG with a bar for each row, the slowest first.

    rows: `what`, `images_s` and `peak_gib`, as `python -m bench peers` prints them.
    """
    rows = sorted(rows, key=lambda row: row["images_s"])
    longest = rows[-1]["images_s"]
    height = TOP + ROW * len(rows) + BOTTOM
    said = ", ".join(f"{_name(row)} {row['images_s']:.2f}" for row in rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" font-family="system-ui, sans-serif" font-size="15">',
        f"<title>{html.escape(title)}: {html.escape(said)} images/s</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>',
        f'<text x="16" y="32" font-size="18" font-weight="600" fill="{INK}">{html.escape(title)}</text>',
    ]
    for number, row in enumerate(rows):
        parts += _bar(row, TOP + ROW * number, longest)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _name(row: dict[str, Any]) -> str:
    what = str(row["what"])
    return f"Kiln, {what}" if is_ours(row) else NAMES.get(what, what)


def _bar(row: dict[str, Any], y: int, longest: float) -> list[str]:
    length = round(row["images_s"] / longest * (WIDTH - LABELS - RIGHT))
    middle = y + ROW // 2 + 5
    weight, colour = ("600", OURS) if is_ours(row) else ("400", OTHERS)
    figures = f"{row['images_s']:.2f} images/s, {row['peak_gib']:.1f} GiB"
    return [
        f'<text x="{LABELS - 10}" y="{middle}" text-anchor="end" font-weight="{weight}" fill="{INK}">'
        f"{html.escape(_name(row))}</text>",
        f'<rect x="{LABELS}" y="{y + (ROW - BAR) // 2}" width="{length}" height="{BAR}" rx="3" fill="{colour}"/>',
        f'<text x="{LABELS + length + 8}" y="{middle}" font-weight="{weight}" fill="{INK}">{figures}</text>',
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="lines of JSON")
    parser.add_argument("picture", type=Path, help="the SVG to write")
    parser.add_argument("--title", default="Flux.1, 1280 x 768, batch of 4, one H200")
    asked = parser.parse_args(arguments)
    rows = [json.loads(line) for line in asked.rows.read_text(encoding="utf-8").splitlines() if line]
    asked.picture.write_text(drawn(rows, asked.title), encoding="utf-8")
