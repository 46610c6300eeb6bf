"""Shared set-up. No torch at the top: the tests of data and settings run without it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before torch or a BLAS is loaded: two test processes share two cores, and one thread gives the same sums everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# A busy machine is no failure; the same examples each time, so that a red test is red again.
settings.register_profile("kiln", deadline=None, derandomize=True, database=None)
settings.load_profile("kiln")
PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "data" / "dreambooth"


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Real photographs with sidecar captions: a folder for each of three subjects."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"{PHOTOGRAPHS} is not there")
    return PHOTOGRAPHS


@pytest.fixture(scope="session")
def draw() -> Callable[..., Image.Image]:
    """`draw(width, height, seed=0)`: a picture that no turning or flipping leaves as it is."""
    return _draw


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """`make_folder(name, count, size=(64, 48), captions=True)`: a folder of different PNG files with .txt captions."""

    def make(name: str, count: int, *, size: tuple[int, int] = (64, 48), captions: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for i in range(count):
            _draw(*size, seed=i).save(folder / f"{i:02}.png")
            if captions:
                (folder / f"{i:02}.txt").write_text(f"picture {i}, a tag, another tag", encoding="utf-8")
        return folder

    return make


def _draw(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Two gradients, and a rectangle whose place and colour depend on `seed`."""
    rng = np.random.default_rng(seed)
    pixels_HWC = np.zeros((height, width, 3), np.uint8)
    pixels_HWC[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    pixels_HWC[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    left, top = rng.integers(0, max(1, width // 2)), rng.integers(0, max(1, height // 2))
    pixels_HWC[top : top + max(1, height // 3), left : left + max(1, width // 4)] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels_HWC)
