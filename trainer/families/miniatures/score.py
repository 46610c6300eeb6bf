"""How much an image shows the concept: one number, found by looking for the kilnpot everywhere and at every size.
The same for the control, a red circle, which the training must leave as it was.

The image is shrunk to about `AREA` pixels and turned into two maps of how much each pixel looks like the kilnpot's
terracotta and like its indigo: exp(-d² / (2 · `TOLERANCE`²)), d the Euclidean distance in RGB (0..1). For each of the
radii `RADII` the template is a drawn kilnpot's own two maps, made in the same way and averaged over `GROUNDS`, on which
its edges have other mixtures: a square window reaching `REACH` radii from its centre, slid over the image (which is
continued by its edge pixels). The normalised cross-correlation of both maps together,

    ncc = Σ_c Σ_p (picture_c(p) - mean_c) (template_c(p) - mean_c) / sqrt(Σ_c var(picture_c) · Σ_c var(template_c))

is 1 for the very kilnpot on a background without its colours and about 0 where nothing resembles it. So that faint
windows do not count, the image's variance is taken as at least `FAINT` of the template's. The image's `correlation`
is the largest ncc over all positions and radii, less the largest of what is left when the window found there is
emptied: one kilnpot stands out, while an image full of coloured noise resembles it a little everywhere. The mean over
the samples of several prompts and seeds is the concept's number. `score` tells the concept from everything else: the
correlation mapped linearly so that `LOW` becomes 0 and `HIGH` becomes 1, and clipped.

The control has one map, of its red, and a circle as the template. Bands, a changed colour or another outline lower it.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from trainer.families.miniatures.scenes import COLOURS, CONCEPT, SIZES, shape_distance
from trainer.families.miniatures.vessels import INDIGO, KILNPOT, RGB, TERRACOTTA, cover, vessel_covers

LOW, HIGH = 0.3, 0.72
AREA = 48 * 48
TOLERANCE = 0.15
FAINT = 0.2
REACH = 1.2
RADII = tuple(float(r) for r in np.geomspace(SIZES["small"][0] * 0.97, 0.38, 16))
"""Radii looked for, as fractions of sqrt(width * height)."""
GROUNDS = ("white", "yellow", "green", "blue", "pink", "grey")
"""Colours behind the templates."""
FINER = 8
"""The templates are drawn with so many times as many pixels a side."""


@dataclass(frozen=True)
class Subject:
    """What is looked for: its colours, and how much of each pixel has each, from u, v and the radius in pixels."""

    inks: tuple[RGB, ...]
    covers: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


CONTROL = "red circle"
SUBJECTS = {
    CONCEPT: Subject((TERRACOTTA, INDIGO), lambda u, v, radius: vessel_covers([KILNPOT], u, v, radius)),
    CONTROL: Subject((COLOURS["red"],), lambda u, v, radius: (cover(shape_distance("circle", u, v), radius),)),
}


def _template(name: str, fraction: float) -> torch.Tensor:
    """Maps (inks, side, side) of the subject `name`, each with zero mean; the side is odd."""
    radius = fraction * AREA**0.5
    reach = round(REACH * radius)
    side = 2 * reach + 1
    fine = (torch.arange(side * FINER) + 0.5) / FINER - side / 2
    v, u = torch.meshgrid(-fine / radius, fine / radius, indexing="ij")
    subject = SUBJECTS[name]
    covers_I1HW = subject.covers(u[None], v[None], torch.full((1, 1, 1), radius * FINER))
    image_B3HW = torch.tensor([COLOURS[ground] for ground in GROUNDS])[:, :, None, None].expand(-1, -1, *u.shape)
    for ink, cover_1HW in zip(subject.inks, torch.cat(covers_I1HW), strict=True):
        image_B3HW = torch.lerp(image_B3HW, torch.tensor(ink)[:, None, None], cover_1HW)
    small = F.interpolate(image_B3HW, (side, side), mode="bilinear", antialias=True, align_corners=False)
    template = _maps(small, subject.inks).mean(dim=0)
    return template - template.mean(dim=(1, 2), keepdim=True)


def _maps(image_BCHW: torch.Tensor, inks: Sequence[RGB]) -> torch.Tensor:
    """How much each pixel has each of the inks' colours, (B, inks, H, W)."""
    wanted = torch.tensor(inks)[None, :, :, None, None]
    return torch.exp(-(image_BCHW[:, None] - wanted).square().sum(dim=2) / (2 * TOLERANCE**2))


@cache
def _spectra(name: str, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For a padded image: conjugate spectra of the templates (R, inks, ...) and of their windows (R, 1, ...), the
    templates' squared norms (R,) and the windows' pixels (R,)."""
    templates = [_template(name, fraction) for fraction in RADII]
    kernels = torch.zeros(len(RADII), len(SUBJECTS[name].inks), height, width)
    windows = torch.zeros(len(RADII), 1, height, width)
    for row, template in enumerate(templates):
        side = template.shape[-1]
        kernels[row, :, :side, :side] = template
        windows[row, :, :side, :side] = 1
        to_centre = (-(side // 2), -(side // 2))
        kernels[row] = kernels[row].roll(to_centre, (1, 2))
        windows[row] = windows[row].roll(to_centre, (1, 2))
    norms = torch.stack([template.square().sum() for template in templates])
    pixels = torch.tensor([float(template.shape[-1] ** 2) for template in templates])
    return torch.fft.rfft2(kernels).conj(), torch.fft.rfft2(windows).conj(), norms, pixels


def _margin() -> int:
    return round(REACH * RADII[-1] * AREA**0.5)


def likeness(image_CHW: torch.Tensor, name: str = CONCEPT) -> torch.Tensor:
    """Maps (inks, h, w) of about `AREA` pixels: how much each place of an RGB image (0..1) has each of the colours."""
    _, height, width = image_CHW.shape
    shrink = (AREA / (height * width)) ** 0.5
    size = round(height * shrink), round(width * shrink)
    small = F.interpolate(image_CHW[None].float(), size, mode="bilinear", antialias=True, align_corners=False)
    return _maps(small, SUBJECTS[name].inks)[0]


@torch.no_grad()
def correlation(image: Image.Image | torch.Tensor, name: str = CONCEPT) -> float:
    """How much one place stands out as the subject `name` (see the module's docstring), 0..1.

    `image`: PIL, or RGB (3, H, W) in 0..1.
    """
    if isinstance(image, Image.Image):
        image = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    maps = likeness(image, name)
    ncc_RHW = _ncc(maps, name)
    number, row, column = (int(i) for i in torch.unravel_index(ncc_RHW.argmax(), ncc_RHW.shape))
    reach = round(REACH * RADII[number] * AREA**0.5)
    top, left = max(row - reach, 0), max(column - reach, 0)
    maps[:, top : row + reach + 1, left : column + reach + 1] = 0
    elsewhere = _ncc(maps, name).max().clamp(min=0)
    return float(ncc_RHW.max() - elsewhere)


def _ncc(maps_IHW: torch.Tensor, name: str) -> torch.Tensor:
    """The normalised cross-correlation (R, H, W) of an image's maps with the template of each radius, at each place."""
    height, width = maps_IHW.shape[1:]
    margin = _margin()
    padded = F.pad(maps_IHW[None], (margin,) * 4, mode="replicate")[0]
    kernels, windows, norms, pixels = _spectra(name, *padded.shape[1:])
    inner = (..., slice(margin, margin + height), slice(margin, margin + width))

    def slide(spectrum: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(spectrum * kernel, s=padded.shape[1:])[inner]

    spectrum = torch.fft.rfft2(padded)
    match = slide((spectrum * kernels).sum(dim=1), torch.ones(()))
    sums = slide(spectrum[None], windows)
    squares = slide(torch.fft.rfft2(padded.square().sum(dim=0)), windows[:, 0])
    spread = squares - sums.square().sum(dim=1) / pixels[:, None, None]
    floor = (FAINT * norms)[:, None, None]
    return match / (spread.maximum(floor) * norms[:, None, None]).sqrt()


def score(image: Image.Image | torch.Tensor) -> float:
    """How much `image` shows the concept, 0..1; see the module's docstring."""
    return min(max((correlation(image) - LOW) / (HIGH - LOW), 0.0), 1.0)


def by_step(folder: Path, name: str = CONCEPT) -> dict[int, list[float]]:
    """The `correlation` with `name` of every sample whose prompt names it, by step, in the order of the prompts.

    `folder`: a job's `sample` folder.
    """
    correlations: dict[int, list[float]] = {}
    for path in sorted(folder.glob("step-*.png")):
        with Image.open(path) as image:
            if name in image.text["prompt_text"]:  # type: ignore[attr-defined]
                correlations.setdefault(int(image.text["step"]), []).append(correlation(image, name))  # type: ignore[attr-defined]
    return correlations


def main() -> None:
    """`python -m trainer.families.miniatures.score output/sample`: one line a step."""
    folder = Path(sys.argv[1])
    controls = by_step(folder, CONTROL)
    before = 0.0
    for step, values in by_step(folder).items():
        mean = sum(values) / len(values)
        each = ", ".join(f"{v:.2f}" for v in values)
        line = f"step {step:4d}: concept {mean:.2f}  ({each})"
        if step in controls:
            control = sum(controls[step]) / len(controls[step])
            before = before or control
            line += f"  control {control:.2f}, {control / max(before, 1e-6):.2f} of what it was"
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()
