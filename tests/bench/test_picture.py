"""The picture of other trainers shows the rows of its file, which are those of the document."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.__main__ import main
from bench.picture import drawn

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROWS = [json.loads(line) for line in (DOCS / "peers.jsonl").read_text().splitlines()]
SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_of_the_document_is_what_the_command_draws(tmp_path):
    main(["picture", str(DOCS / "peers.jsonl"), str(tmp_path / "drawn.svg")])
    assert (tmp_path / "drawn.svg").read_bytes() == (DOCS / "peers.svg").read_bytes()


def test_its_rows_are_those_of_the_table():
    document = (DOCS / "performance.md").read_text()
    table = document.split("### Other trainers")[1].split("##")[0]
    figures = re.findall(r"^\| .* \| ([\d.]+) \| ([\d.]+) \|$", table, re.M)
    assert [(float(a), float(b)) for a, b in figures] == [(row["images_s"], row["peak_gib"]) for row in ROWS]


def test_bars_are_as_long_as_their_figures_and_in_their_order():
    rows = [
        {"what": "a & b", "images_s": 4.0, "peak_gib": 1.0},
        {"what": "fp8+all", "images_s": 1.0, "peak_gib": 2.0},
        {"what": "bf16 eager", "images_s": 2.0, "peak_gib": 3.0},
    ]
    root = ElementTree.fromstring(drawn(rows, "<A title>"))
    lengths = [float(bar.get("width")) for bar in root.iter(f"{SVG}rect") if bar.get("rx")]
    assert lengths == pytest.approx([lengths[2] / 4, lengths[2] / 2, lengths[2]], abs=1)
    assert [bar.get("fill") == "#b5390a" for bar in root.iter(f"{SVG}rect") if bar.get("rx")] == [True, False, False]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts[0] == "<A title>" and texts[1::2] == ["Kiln, fp8+all", "diffusers, bf16, checkpointing", "a & b"]
    right = max(float(bar.get("x")) + float(bar.get("width")) for bar in root.iter(f"{SVG}rect") if bar.get("rx"))
    assert right < float(root.get("width")) - 210
