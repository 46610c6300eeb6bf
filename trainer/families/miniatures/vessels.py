"""Vessels as numbers: every vessel of the scenes, and the kilnpot, is drawn from a `Vessel` by the same few lines.

The base models see vessels of a few kinds, each with a name, and pots of all profiles, with and without bands and
handles, so that they know the kind of thing that the demo teaches, as a large model does. They never see one whose body
is about as terracotta as the kilnpot's.

All lengths are radii of the thing, u to the right and v upwards from its centre. Shapes of tensors: B vessels, C = 3
colours (RGB in 0..1), H and W pixels.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

RGB = tuple[float, float, float]

HEIGHTS = (-1.0, -0.86, -0.2, 0.3, 0.58, 0.8, 1.0)
"""Where a profile's half widths are given; it is smooth in between."""
MOST_BANDS = 3


@dataclass(frozen=True)
class Vessel:
    """One vessel: half widths at `HEIGHTS`, each band's centre and half height, and the handles, or None.

    `handles`: the centre's distance from the axis, its height, the ring's radius and half its thickness.
    """

    widths: tuple[float, ...]
    bands: tuple[tuple[float, float], ...]
    handles: tuple[float, float, float, float] | None
    body: RGB
    dark: RGB


TERRACOTTA: RGB = (0.80, 0.40, 0.26)
INDIGO: RGB = (0.15, 0.12, 0.36)
KILNPOT = Vessel(
    widths=(0.36, 0.40, 0.70, 0.46, 0.23, 0.25, 0.42),
    bands=((-0.55, 0.13), (-0.1, 0.13), (0.9, 0.1)),
    handles=(0.52, 0.44, 0.27, 0.1),
    body=TERRACOTTA,
    dark=INDIGO,
)
PROFILES: dict[str, tuple[float, ...]] = {
    "vase": (0.38, 0.42, 0.60, 0.62, 0.40, 0.34, 0.50),
    "bottle": (0.48, 0.52, 0.54, 0.50, 0.20, 0.18, 0.22),
    "cup": (0.34, 0.38, 0.58, 0.72, 0.78, 0.80, 0.84),
    "urn": (0.32, 0.30, 0.58, 0.80, 0.60, 0.42, 0.56),
    "jar": (0.56, 0.62, 0.72, 0.72, 0.64, 0.50, 0.50),
}
"""The half widths of the kinds of vessels that have a name."""
BANDS: tuple[tuple[tuple[float, float], ...], ...] = ((), (), ((-0.2, 0.15),), ((-0.5, 0.13), (0.1, 0.13)))
"""Those that a vessel of a kind may have: none, one or two."""
VARIES = 0.03
"""Vessels of a kind differ by so much in each half width."""
POT = "pot"
"""A vessel of no kind: of any profile, with bands anywhere."""
_POT_WIDTHS = ((0.2, 0.6), (0.25, 0.65), (0.4, 0.85), (0.3, 0.75), (0.15, 0.55), (0.15, 0.55), (0.2, 0.65))
NEAR = 0.25
"""The body of a vessel is at least this far, in RGB, from the kilnpot's: see `like_kilnpot`."""


def apart(one: RGB, other: RGB) -> float:
    """The Euclidean distance of two colours."""
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def random_vessel(rng: random.Random, kind: str, *, body: RGB, dark: RGB) -> Vessel:
    """A vessel of this kind in these colours, or a `POT`: up to three bands, and in half of all cases two handles."""
    if kind == POT:
        widths = [rng.uniform(low, high) for low, high in _POT_WIDTHS]
        bands = [(rng.uniform(-0.9, 0.9), rng.uniform(0.1, 0.15)) for _ in range(rng.randint(0, MOST_BANDS))]
    else:
        widths = [width + rng.uniform(-VARIES, VARIES) for width in PROFILES[kind]]
        bands = list(rng.choice(BANDS))
    handles = None
    if rng.random() < 0.5:
        handles = (0.5 * widths[3] + rng.uniform(0.26, 0.3), rng.uniform(0.36, 0.44), 0.27, 0.1)
    return Vessel(tuple(widths), tuple(bands), handles, body, dark)


def like_kilnpot(body: RGB) -> bool:
    """Whether a vessel of this colour could be taken for the kilnpot."""
    return apart(body, TERRACOTTA) < NEAR


def cover(distance: torch.Tensor, radius_px: torch.Tensor) -> torch.Tensor:
    """How much of each pixel lies inside, (B, 1, H, W), from a distance in radii (negative inside)."""
    return (0.5 - distance * radius_px).clamp(0, 1)[:, None]


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _half_width(vessels: Sequence[Vessel], v: torch.Tensor) -> torch.Tensor:
    at = [_column([vessel.widths[row] for vessel in vessels], v.device) for row in range(len(HEIGHTS))]
    width = at[0].expand_as(v)
    for (low, at_low), (high, at_high) in pairwise(zip(HEIGHTS, at, strict=True)):
        step = ((v - low) / (high - low)).clamp(0, 1)
        width = width + (at_high - at_low) * step * step * (3 - 2 * step)
    return width


def vessel_covers(
    vessels: Sequence[Vessel], u: torch.Tensor, v: torch.Tensor, radius_px: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of each pixel has the body's colour, and how much the dark one, each (B, 1, H, W) in 0..1."""
    device = v.device
    body = cover(torch.maximum((u.abs() - _half_width(vessels, v)) * 0.9, v.abs() - 1.0), radius_px)
    far, high, ring, thick = (
        _column([(vessel.handles or (0.0, 0.0, 0.0, -9.0))[part] for vessel in vessels], device) for part in range(4)
    )
    handles = cover((torch.hypot((u.abs() - far) * 0.9, v - high) - ring).abs() - thick, radius_px)
    bands = torch.zeros_like(body)
    for number in range(MOST_BANDS):
        here = [vessel.bands[number] if number < len(vessel.bands) else (0.0, -9.0) for vessel in vessels]
        centre = _column([band[0] for band in here], device)
        half = _column([band[1] for band in here], device)
        bands = torch.maximum(bands, cover((v - centre).abs() - half, radius_px))
    dark = torch.maximum(handles * (1 - body), body * bands)
    return body * (1 - bands), dark


def paint_vessels(
    under_BCHW: torch.Tensor, vessels: Sequence[Vessel], u: torch.Tensor, v: torch.Tensor, radius_px: torch.Tensor
) -> torch.Tensor:
    """The vessels over `under_BCHW`."""
    body, dark = vessel_covers(vessels, u, v, radius_px)
    colours = torch.tensor([(vessel.body, vessel.dark) for vessel in vessels], device=under_BCHW.device)
    return under_BCHW * (1 - body - dark) + colours[:, 0, :, None, None] * body + colours[:, 1, :, None, None] * dark
