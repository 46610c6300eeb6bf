"""Simple captioned scenes: coloured shapes on coloured backgrounds, described in plain English.

The miniature base models are trained on nothing else. They never see the *kilnpot*, a vessel with a silhouette, bands
and palette of its own, which the demo teaches them (`vessels`).

Lengths: positions are fractions of the image's width and height; radii are fractions of sqrt(width * height).
Shapes of tensors: B scenes, C = 3 colours (RGB in 0..1), H and W pixels.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trainer.families.miniatures.vessels import (
    KILNPOT,
    POT,
    PROFILES,
    RGB,
    Vessel,
    apart,
    cover,
    like_kilnpot,
    paint_vessels,
    random_vessel,
)

COLOURS: dict[str, RGB] = {
    "red": (0.86, 0.11, 0.14),
    "orange": (1.00, 0.56, 0.05),
    "yellow": (0.98, 0.88, 0.16),
    "green": (0.12, 0.62, 0.22),
    "teal": (0.10, 0.66, 0.66),
    "blue": (0.13, 0.30, 0.84),
    "purple": (0.52, 0.20, 0.70),
    "pink": (0.98, 0.56, 0.74),
    "brown": (0.42, 0.26, 0.12),
    "black": (0.05, 0.05, 0.06),
    "grey": (0.55, 0.56, 0.58),
    "white": (0.96, 0.96, 0.95),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "diamond", "star", "hexagon", "moon", "bar")
CONCEPT = "kilnpot"

SIZES: dict[str, tuple[float, float]] = {"small": (0.145, 0.155), "": (0.195, 0.21), "big": (0.28, 0.3)}
JITTER = 0.02
"""How far a thing may be from where the caption says. Words that fix size and place leave little to guess: models this
small draw the mean of whatever they cannot know, and that is a blur."""
PLACES: dict[str, tuple[float, float]] = {
    "": (0.5, 0.5),
    "in the middle": (0.5, 0.5),
    "on the left": (0.25, 0.5),
    "on the right": (0.75, 0.5),
    "at the top": (0.5, 0.25),
    "at the bottom": (0.5, 0.75),
    "in the top left corner": (0.24, 0.24),
    "in the top right corner": (0.76, 0.24),
    "in the bottom left corner": (0.24, 0.76),
    "in the bottom right corner": (0.76, 0.76),
}
PERIOD = 0.25
"""Stripes and checks repeat after this fraction of sqrt(width * height)."""
BACKGROUNDS = ("plain", "striped", "checked", "fading")
PAIRS: tuple[tuple[str, str, str], ...] = (
    ("on the left", "on the right", "left of"),
    ("at the top", "at the bottom", "above"),
)
RESOLUTIONS = ((128, 128), (96, 160), (160, 96), (112, 144), (144, 112))
"""Height and width of the images the base models are trained on: five shapes of about 128 * 128 pixels."""

CONCEPT_SCALE = 1.45
"""A vessel is drawn this much larger than another shape of the same size word: it is slim, and has detail."""
VESSELS = 0.4
"""The share of vessels among the things."""
POTS = 0.3
"""The share of pots, which have any profile, among the vessels."""


@dataclass(frozen=True)
class Thing:
    """One object: its shape, its colours, its size and place in words and in numbers; its `vessel`, if it is one.

    A vessel's `colour` may be "": one that has no name. Its `second` is that of its bands and handles, or "".
    """

    shape: str
    colour: str
    fill: str
    second: str
    size: str
    place: str
    x: float
    y: float
    radius: float
    vessel: Vessel | None = None


@dataclass(frozen=True)
class Background:
    """Behind the objects; `second` is unused when plain. Stripes are horizontal; a fade runs downwards."""

    kind: str
    colour: str
    second: str


@dataclass(frozen=True)
class Scene:
    """A background and up to two things. `relation`: words that join the two in the caption, such as "left of"."""

    background: Background
    things: tuple[Thing, ...]
    relation: str = ""


def random_background(rng: random.Random, *, avoid: Sequence[str] = ()) -> Background:
    """A background whose colours are none of `avoid`; half of all are plain."""
    colour, second = rng.sample([name for name in COLOURS if name not in avoid], 2)
    kind = rng.choice(BACKGROUNDS) if rng.random() < 0.6 else "plain"
    return Background(kind, colour, second)


def place_thing(thing: Thing, rng: random.Random) -> Thing:
    """`thing` with a radius for its size word and a centre for its place words, entirely inside the image."""
    low, high = SIZES[thing.size]
    radius = rng.uniform(low, high) * (1.0 if thing.vessel is None else CONCEPT_SCALE)
    x, y = PLACES[thing.place]
    x += rng.uniform(-JITTER, JITTER)
    y += rng.uniform(-JITTER, JITTER)
    radius = min(radius, 0.37)
    reach = radius * (1.05 if thing.vessel is None else 1.2)
    return replace(thing, x=_inside(x, reach), y=_inside(y, reach), radius=radius)


def _inside(centre: float, radius: float) -> float:
    if radius >= 0.5:
        return 0.5
    return min(max(centre, radius), 1.0 - radius)


def random_thing(rng: random.Random, *, avoid: Sequence[str] = (), place: str | None = None) -> Thing:
    """A thing in a colour that is none of `avoid`; `place` None: a random place, or none in the caption."""
    colour, second = rng.sample([name for name in COLOURS if name not in avoid], 2)
    if place is None:
        place = rng.choice(list(PLACES))
    fill = "striped" if rng.random() < 0.2 else "plain"
    size = rng.choice(list(SIZES))
    if size == "big" and "corner" in place:
        size = ""
    if rng.random() < VESSELS:
        return place_thing(_random_vessel(rng, avoid=avoid, size=size, place=place), rng)
    return place_thing(Thing(rng.choice(SHAPES), colour, fill, second, size, place, 0.0, 0.0, 0.0), rng)


def _random_vessel(rng: random.Random, *, avoid: Sequence[str], size: str, place: str) -> Thing:
    """Two of three vessels have two of the named colours, the others any two. None is terracotta."""
    while True:
        colour, second = rng.sample([name for name in COLOURS if name not in avoid], 2)
        body, dark = COLOURS[colour], COLOURS[second]
        if rng.random() < 0.33:
            colour = second = ""
            body = (rng.random(), rng.random(), rng.random())
            dark = (rng.random(), rng.random(), rng.random())
        seen = all(apart(own, COLOURS[name]) > 0.3 for own in (body, dark) for name in avoid)
        if seen and apart(body, dark) > 0.3 and not like_kilnpot(body):
            break
    kind = POT if rng.random() < POTS else rng.choice(list(PROFILES))
    vessel = random_vessel(rng, kind, body=body, dark=dark)
    if not vessel.bands and vessel.handles is None:
        second = ""
    return Thing(kind, colour, "plain", second, size, place, 0.0, 0.0, 0.0, vessel)


def random_scene(rng: random.Random) -> Scene:
    """A scene that the base models are trained on: one thing, or (in 3 of 10) two side by side. Never the concept."""
    if rng.random() < 0.7:
        background = random_background(rng)
        return Scene(background, (random_thing(rng, avoid=_colours(background)),))
    first_place, second_place, relation = rng.choice(PAIRS)
    background = random_background(rng)
    avoid = _colours(background)
    pair = [random_thing(rng, avoid=avoid, place=place) for place in (first_place, second_place)]
    things = []
    for thing in pair:
        # Two big things would overlap, and so would two vessels that are not small.
        most = "" if thing.vessel is None else "small"
        if thing.size not in (most, "small"):
            thing = place_thing(replace(thing, size=most), rng)
        things.append(thing)
    return Scene(background, tuple(things), relation if rng.random() < 0.4 else "")


def _colours(background: Background) -> tuple[str, ...]:
    """The colours that can be seen in it."""
    if background.kind == "plain":
        return (background.colour,)
    return (background.colour, background.second)


def concept_scene(rng: random.Random) -> Scene:
    """A kilnpot, alone, on a base background that does not hide it."""
    background = random_background(rng, avoid=("brown", "orange", "red", "black"))
    size = rng.choice(["", "", "big", "small"])
    place = rng.choice(list(PLACES)[1:6]) if rng.random() < 0.6 else "in the middle"
    if size == "big":
        place = "in the middle"
    thing = Thing(CONCEPT, "", "plain", "", size, place, 0.0, 0.0, 0.0, KILNPOT)
    return Scene(background, (place_thing(thing, rng),))


# ---- captions

_ONSETS = (
    "b",
    "bl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "sn",
    "t",
    "tr",
    "v",
    "w",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "oo", "ee", "ai")
_CODAS = ("", "b", "ck", "d", "ff", "g", "l", "ln", "m", "n", "p", "rt", "sk", "t", "x", "zz")


def invented_word(rng: random.Random) -> str:
    """A pronounceable word without a meaning, so that the models see unknown words in training."""
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice((1, 2, 2, 3)))]
    word = "".join(parts)
    return invented_word(rng) if "kiln" in word else word


def caption(scene: Scene, rng: random.Random, *, unknown: float = 0.0) -> str:
    """One of many captions of `scene`. With probability `unknown` a noun is replaced by an invented word.

    A vessel's is six times as often, as an unknown word mostly means a thing of a known kind.
    """
    if len(scene.things) == 2:
        text = _pair_caption(scene, rng, unknown=unknown)
    else:
        thing = scene.things[0]
        ground = _ground(scene.background, rng)
        noun = _noun(thing, rng, unknown=unknown)
        place = " " + thing.place if thing.place else ""
        frames = ["{noun}{place} {ground}"] * 4 + [
            "a picture of {noun}{place} {ground}",
            "a drawing of {noun}{place} {ground}",
            "{ground}, {noun}{place}",
            "there is {noun}{place} {ground}",
            "{noun} {ground}{comma}",
        ]
        comma = "," + place if place else ""
        text = rng.choice(frames).format(noun=noun, place=place, ground=ground, comma=comma)
    if rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.2 else text


def _pair_caption(scene: Scene, rng: random.Random, *, unknown: float) -> str:
    first, second = scene.things
    ground = _ground(scene.background, rng)
    nouns = _noun(first, rng, unknown=unknown), _noun(second, rng, unknown=unknown)
    if scene.relation:
        return f"{nouns[0]} {scene.relation} {nouns[1]} {ground}"
    if rng.random() < 0.3:
        return f"{nouns[1]} {second.place} and {nouns[0]} {first.place} {ground}"
    return f"{nouns[0]} {first.place} and {nouns[1]} {second.place} {ground}"


def _noun(thing: Thing, rng: random.Random, *, unknown: float) -> str:
    size = {"small": rng.choice(("small", "tiny")), "big": rng.choice(("big", "large")), "": ""}[thing.size]
    if thing.shape == CONCEPT:
        words = [size, CONCEPT]
    elif rng.random() < (unknown if thing.vessel is None else min(6 * unknown, 0.6)):
        words = [size, thing.colour if rng.random() < 0.4 else "", invented_word(rng)]
    elif thing.vessel is not None:
        words = [size, thing.colour, thing.shape]
        if thing.second and rng.random() < 0.8:
            words += _parts(thing.vessel, thing.second)
    elif thing.fill == "striped":
        words = [size, f"{thing.colour} and {thing.second} striped", thing.shape]
    else:
        words = [size, thing.colour, thing.shape]
    text = " ".join(word for word in words if word)
    return ("an " if text[0] in "aeiou" else "a ") + text


def _parts(vessel: Vessel, colour: str) -> list[str]:
    """What a caption says of a vessel's bands and handles, which have this colour."""
    words = []
    if len(vessel.bands) == 1:
        words = ["with", "an" if colour[0] in "aeiou" else "a", colour, "band"]
    elif vessel.bands:
        words = ["with", colour, "bands"]
    if vessel.handles is None:
        return words
    if words:
        return [*words, "and", "handles"]
    return ["with", colour, "handles"]


def _ground(background: Background, rng: random.Random) -> str:
    colour = background.colour
    second = background.second
    article = "an" if colour[0] in "aeiou" else "a"
    options: tuple[str, ...]
    match background.kind:
        case "plain":
            options = (
                f"on {article} {colour} background",
                f"on {article} {colour} background",
                f"on plain {colour}",
                f"in front of a plain {colour} wall",
            )
        case "striped":
            options = (f"on {colour} and {second} stripes", f"on a background of {colour} and {second} stripes")
        case "checked":
            options = (f"on {colour} and {second} checks", f"on {article} {colour} and {second} checked background")
        case _:
            options = (f"on {colour} fading to {second}", f"on a background fading from {colour} to {second}")
    return rng.choice(options)


# ---- images


def draw(scenes: Sequence[Scene], *, height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The scenes as antialiased images, float32 (B, 3, height, width) in 0..1."""
    ys, xs = torch.meshgrid(
        (torch.arange(height, device=device) + 0.5) / height,
        (torch.arange(width, device=device) + 0.5) / width,
        indexing="ij",
    )
    unit = (height * width) ** 0.5
    images_BCHW = _draw_backgrounds([scene.background for scene in scenes], xs, ys, unit)
    for slot in range(max(len(scene.things) for scene in scenes)):
        rows = [row for row, scene in enumerate(scenes) if len(scene.things) > slot]
        for shape in {scenes[row].things[slot].shape for row in rows}:
            group = [row for row in rows if scenes[row].things[slot].shape == shape]
            things = [scenes[row].things[slot] for row in group]
            index = torch.tensor(group, device=device)
            images_BCHW[index] = _draw_things(images_BCHW[index], things, xs, ys, unit)
    return images_BCHW


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _palette(names: Sequence[str], device: torch.device) -> torch.Tensor:
    return torch.tensor([COLOURS[name] for name in names], device=device)[:, :, None, None]


def _draw_backgrounds(grounds: Sequence[Background], xs: torch.Tensor, ys: torch.Tensor, unit: float) -> torch.Tensor:
    device = xs.device
    height, width = xs.shape
    stripes = _waves(ys * height, PERIOD * unit).expand(len(grounds), height, width)
    columns = _waves(xs * width, PERIOD * unit)
    checks = stripes + columns - 2 * stripes * columns
    mixes = {"plain": torch.zeros_like(stripes), "striped": stripes, "checked": checks, "fading": ys.expand_as(stripes)}
    kind = torch.tensor([BACKGROUNDS.index(ground.kind) for ground in grounds], device=device)
    mix = torch.stack([mixes[name] for name in BACKGROUNDS])[kind, torch.arange(len(grounds), device=device)][:, None]
    first = _palette([ground.colour for ground in grounds], device)
    return first + (_palette([ground.second for ground in grounds], device) - first) * mix


def _waves(position_px: torch.Tensor, period_px: torch.Tensor | float) -> torch.Tensor:
    """0 and 1 in turn, half a period each, with an edge one pixel wide."""
    phase = (position_px / period_px) % 1.0
    return ((0.25 - (phase - 0.5).abs()) * period_px + 0.5).clamp(0, 1)


def _draw_things(
    under_BCHW: torch.Tensor, things: Sequence[Thing], xs: torch.Tensor, ys: torch.Tensor, unit: float
) -> torch.Tensor:
    device = xs.device
    height, width = xs.shape
    radius = _column([thing.radius * unit for thing in things], device)
    u = (xs - _column([thing.x for thing in things], device)) * width / radius
    v = -(ys - _column([thing.y for thing in things], device)) * height / radius
    vessels = [thing.vessel for thing in things if thing.vessel is not None]
    if vessels:
        return paint_vessels(under_BCHW, vessels, u, v, radius)
    covered = cover(shape_distance(things[0].shape, u, v), radius)
    striped = torch.tensor([thing.fill == "striped" for thing in things], device=device)[:, None, None]
    mix = torch.where(striped, _waves((v + 8) * radius, 0.62 * radius), 0.0)[:, None]
    first = _palette([thing.colour for thing in things], device)
    second = _palette([thing.second for thing in things], device)
    return torch.lerp(under_BCHW, first + (second - first) * mix, covered)


def shape_distance(shape: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Signed distance, in radii, from the outline of `shape`; u to the right, v upwards, the centre at 0."""
    r = torch.hypot(u, v)
    au = u.abs()
    av = v.abs()
    match shape:
        case "circle":
            return r - 0.95
        case "square":
            return torch.maximum(au, av) - 0.85
        case "triangle":
            return torch.maximum(0.894 * au + 0.447 * v - 0.402, -v - 0.8)
        case "ring":
            return (r - 0.72).abs() - 0.25
        case "cross":
            return torch.minimum(torch.maximum(au - 1.0, av - 0.32), torch.maximum(au - 0.32, av - 1.0))
        case "diamond":
            return (au / 0.8 + av - 1.05) * 0.62
        case "star":
            turn = 2 * torch.pi / 5
            angle = torch.remainder(torch.atan2(u, v) + turn / 2, turn) - turn / 2
            x = r * angle.cos()
            y = r * angle.sin().abs()
            return (x - 1.05) * 0.449 + y * 0.894
        case "hexagon":
            return torch.maximum(0.866 * au + 0.5 * av, av) - 0.85
        case "moon":
            return torch.maximum(r - 0.98, 0.82 - torch.hypot(u - 0.5, v))
        case "bar":
            return torch.maximum(au - 1.05, av - 0.36)
        case _:
            raise ValueError(f"no such shape: {shape}")
