"""All samples of a run in one image: a row for each prompt, a column for each step, and for each strength after it.

Every thumbnail is as wide as its column, and a row is as high as its prompt's images, so that images of several shapes
leave no gaps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from trainer.data.decode import read_sample
from trainer.spec.plan import Prompt
from trainer.spec.values import one_line
from trainer.storage import atomic, json_files, own_files
from trainer.storage.own_files import SHEET_NAME, read_sample_name

# Pixels.
COLUMN_WIDTH = 384  # of a thumbnail, where there are few columns
MAX_WIDTH = 8192  # of the sheet: viewers refuse images that are much wider
MIN_COLUMN_WIDTH = 128
MIN_WIDTH = 640  # so that a prompt can be read where there are few columns
MARGIN = 8
FONT_SIZE = 16
LINE_HEIGHT = 22
EMPTY = "#dddddd"  # in the place of an image that was not drawn: memory ran out, or the job was stopped


def contact_sheet(folder: Path, prompts: Sequence[Prompt], *, labels: Mapping[int, str] | None = None) -> Path:
    """Write the contact sheet of the samples in `folder`; returns its path. Samples of unknown prompts are left out.

    `labels`: step → what stands above its column, where it is not the step of a job.
    """
    images = _images(folder, most=len(prompts))
    columns = sorted({column for column, _ in images})
    column_width = COLUMN_WIDTH
    if columns:
        column_width = max(MIN_COLUMN_WIDTH, min(COLUMN_WIDTH, (MAX_WIDTH - MARGIN) // len(columns) - MARGIN))
    width = max(MARGIN + len(columns) * (column_width + MARGIN), MIN_WIDTH)
    heights = [round(column_width * prompt.height / prompt.width) for prompt in prompts]
    height = LINE_HEIGHT + 2 * MARGIN + sum(2 * LINE_HEIGHT + row + MARGIN for row in heights)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    lefts = {column: MARGIN + place * (column_width + MARGIN) for place, column in enumerate(columns)}
    for column, left in lefts.items():
        label = _label(column)
        if labels and column.step in labels:
            label = labels[column.step]
        pen.text((left, MARGIN), _shortened(label, column_width, font), "black", font)
    top = LINE_HEIGHT + MARGIN
    for number, prompt in enumerate(prompts):
        pen.text((MARGIN, top), _shortened(prompt.text, width - 2 * MARGIN, font), "black", font)
        pen.text((MARGIN, top + LINE_HEIGHT), _shortened(_settings(prompt), width - 2 * MARGIN, font), "gray", font)
        top += 2 * LINE_HEIGHT
        size = (column_width, heights[number])
        for column, left in lefts.items():
            image = read_sample(images[column, number]) if (column, number) in images else None
            if image is None:
                pen.rectangle((left, top, left + size[0] - 1, top + size[1] - 1), EMPTY)
            else:
                sheet.paste(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), (left, top))
        top += heights[number] + MARGIN
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompts", json.dumps([prompt.text for prompt in prompts], ensure_ascii=False))
    json_files.set_aside_unless(folder / SHEET_NAME, own_files.is_sheet)
    with atomic.replacing(folder / SHEET_NAME) as temporary:
        sheet.save(temporary, pnginfo=info)
    return folder / SHEET_NAME


class _Column(NamedTuple):
    """What the images of a column have in common. In the order of the sheet: strength 1 before all others."""

    step: int
    is_other: bool  # strength than 1
    strength: float


def _images(folder: Path, *, most: int) -> dict[tuple[_Column, int], Path]:
    """The samples by column and number of the prompt, which is below `most`."""
    found = {}
    for path in folder.glob("step-*.png"):
        known = read_sample_name(path.name)
        if known is not None and known[1] < most:
            step, number, strength = known
            found[_Column(step, strength != 1, strength), number] = path
    return found


def _label(column: _Column) -> str:
    if column.is_other and column.strength == 0:
        return f"step {column.step}, strength 0: the base"
    if column.step == 0:
        return "before training"
    return f"step {column.step}, strength {column.strength:g}"


def _settings(prompt: Prompt) -> str:
    """What else decides the images of a prompt. In characters that the font of Pillow has."""
    parts = [f"seed {prompt.seed}", f"{prompt.width}x{prompt.height}", f"{prompt.steps} steps"]
    if prompt.cfg != 1.0:
        parts.append(f"CFG {prompt.cfg:g}")
    if prompt.guidance:
        parts.append(f"guidance {prompt.guidance:g}")
    if prompt.negative:
        parts.append(f"without: {prompt.negative}")
    return ", ".join(parts)


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of `text` as is `width` pixels wide, on one line, with an ellipsis where it is cut."""
    text = one_line(" ".join(text.split()))
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text
