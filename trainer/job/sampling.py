"""Sample images during a job: prompts at fixed seeds, and one contact sheet (rows: prompts; columns: steps)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from trainer.spec.plan import Prompt
from trainer.storage import atomic

NAME = re.compile(r"step-(\d{8})-(\d{2,})\.png")
SHEET = "contact-sheet.png"
MARGIN, LABEL = 6, 34  # pixels


def draw_all(
    folder: Path,
    prompts: Sequence[Prompt],
    *,
    step: int,
    draw: Callable[[Prompt], Image.Image],
    stopped: Callable[[], bool],
) -> int:
    """Draw the prompts that have no picture of `step` yet, and renew the contact sheet; return how many.

    Each goes into `folder` as step-00000100-00.png with its prompt in the PNG. `stopped` is asked before each.
    """
    count = 0
    for number, prompt in enumerate(prompts):
        path = folder / f"step-{step:08d}-{number:02d}.png"
        if path.exists():
            continue
        if stopped():
            break
        image = draw(prompt)
        with atomic.replacing(path) as temporary:
            image.save(temporary, pnginfo=_info(prompt, step))
        count += 1
    if count:
        contact_sheet(folder, prompts)
    return count


def _info(prompt: Prompt, step: int) -> PngImagePlugin.PngInfo:
    """The text chunks that picture viewers of image generators show, and each value by itself."""
    info = PngImagePlugin.PngInfo()
    negative = f"\nNegative prompt: {prompt.negative}" if prompt.negative else ""
    info.add_itxt(
        "parameters",
        f"{prompt.text}{negative}\nSteps: {prompt.steps}, CFG scale: {prompt.cfg}, Distilled CFG Scale: "
        f"{prompt.guidance}, Seed: {prompt.seed}, Size: {prompt.width}x{prompt.height}",
    )
    info.add_itxt("prompt_text", prompt.text)
    info.add_text("step", str(step))
    info.add_text("seed", str(prompt.seed))
    return info


def contact_sheet(folder: Path, prompts: Sequence[Prompt]) -> Path:
    """All samples of a run on one picture, thumbnails at most 256 pixels wide and high."""
    found = [(int(m[1]), int(m[2]), p) for p in folder.glob("step-*.png") if (m := NAME.fullmatch(p.name))]
    steps = sorted({step for step, _, _ in found})
    width = min(256, max(p.width for p in prompts)) + MARGIN
    height = min(256, max(p.height for p in prompts)) + MARGIN
    wide = max(width * len(steps), 360) + MARGIN
    sheet = Image.new("RGB", (wide, len(prompts) * (height + LABEL) + LABEL), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, step in enumerate(steps):
        pen.text((MARGIN + column * width, MARGIN), "before" if step == 0 else f"step {step}", "black", font)
    for row, prompt in enumerate(prompts):
        top = LABEL + row * (height + LABEL)
        pen.text((MARGIN, top), _fit(prompt.text, wide - 2 * MARGIN, font), "black", font)
    for step, row, path in found:
        if row < len(prompts):
            with Image.open(path) as image:
                small = image.convert("RGB")
            small.thumbnail((256, 256))
            sheet.paste(small, (MARGIN + steps.index(step) * width, LABEL + row * (height + LABEL) + LABEL // 2))
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompts", json.dumps([p.text for p in prompts], ensure_ascii=False))
    with atomic.replacing(folder / SHEET) as temporary:
        sheet.save(temporary, pnginfo=info)
    return folder / SHEET


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text
