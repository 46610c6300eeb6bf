"""The newest samples of all jobs of a queue in one image: a column for each job, a row for each prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from entrypoint.queue.jobs import QueuedJob
from entrypoint.report.gather import Sample, gather
from trainer.data.decode import read_sample
from trainer.storage import atomic, json_files, own_files
from trainer.storage.own_files import SHEET_NAME

# Pixels.
COLUMN_WIDTH = 256
MAX_WIDTH = 8192  # viewers refuse images that are much wider
MARGIN = 8
FONT_SIZE = 14
LINE_HEIGHT = 20
EMPTY = "#dddddd"  # a job without samples of a prompt


def write(out: Path, jobs: Sequence[QueuedJob]) -> Path | None:
    """Write the sheet to `out`; None where no job has samples. Raises StorageError."""
    columns: list[tuple[str, dict[int, Sample]]] = []
    prompts: dict[int, str] = {}
    for job in jobs:
        newest: dict[int, Sample] = {}
        for sample in gather(job.out).samples:
            if sample.number not in newest or sample.step > newest[sample.number].step:
                newest[sample.number] = sample
                prompts.setdefault(sample.number, sample.prompt)
        columns.append((job.name, newest))
    if not prompts:
        return None
    width = min(COLUMN_WIDTH, max(64, (MAX_WIDTH - MARGIN) // len(columns) - MARGIN))
    row_height = width + LINE_HEIGHT + MARGIN
    size = (MARGIN + len(columns) * (width + MARGIN), MARGIN + LINE_HEIGHT + len(prompts) * row_height)
    drawn = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(FONT_SIZE)
    for column, (name, samples) in enumerate(columns):
        left = MARGIN + column * (width + MARGIN)
        pen.text((left, MARGIN), _shortened(name, width, font), "black", font)
        for row, number in enumerate(sorted(prompts)):
            top = MARGIN + LINE_HEIGHT + row * row_height
            if column == 0:
                pen.text((left, top), _shortened(prompts[number], size[0] - 2 * MARGIN, font), "black", font)
            image = read_sample(samples[number].path) if number in samples else None
            if image is None:
                box = (left, top + LINE_HEIGHT, left + width - 1, top + LINE_HEIGHT + width - 1)
                pen.rectangle(box, EMPTY)
                continue
            fitted = image.convert("RGB")
            fitted.thumbnail((width, width), Image.Resampling.LANCZOS)
            drawn.paste(fitted, (left, top + LINE_HEIGHT))
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompts", json.dumps([prompts[number] for number in sorted(prompts)], ensure_ascii=False))
    json_files.set_aside_unless(out / SHEET_NAME, own_files.is_sheet)
    with atomic.replacing(out / SHEET_NAME) as temporary:
        drawn.save(temporary, pnginfo=info)
    return out / SHEET_NAME


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of `text` as is `width` pixels wide, with an ellipsis where it is cut."""
    text = " ".join(text.split())
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text
