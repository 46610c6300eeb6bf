"""Images that are drawn for tests."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def draw(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Two gradients, and a rectangle whose place and colour depend on `seed`: no flipping leaves it as it is."""
    rng = np.random.default_rng(seed)
    pixels_HWC = np.zeros((height, width, 3), np.uint8)
    pixels_HWC[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    pixels_HWC[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    left, top = rng.integers(0, max(1, width // 2)), rng.integers(0, max(1, height // 2))
    pixels_HWC[top : top + max(1, height // 3), left : left + max(1, width // 4)] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels_HWC)


def spots(folder: Path) -> Path:
    """Fill `folder` with six images of two shapes with sidecar captions."""
    for i in range(6):
        image = Image.new("RGB", (128, 128) if i % 2 else (160, 96), (30 * i, 200 - 30 * i, 90))
        ImageDraw.Draw(image).ellipse((20 + 5 * i, 20, 60 + 5 * i, 60), fill=(250, 40 * i, 0))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a spot, number {i}")
    return folder
