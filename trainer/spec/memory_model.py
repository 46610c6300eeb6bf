"""What a plan takes of a device's memory, predicted without torch, and the fastest way to train within what there is.

A step takes: the frozen weights; the adapters with their gradients and their optimiser's state; and for each picture
and each token what the regions keep, which depends on what is recomputed, and what the region at work needs besides.
The constants (`trainer.spec.family.Footprint`) are measured by `python -m bench step`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from trainer.spec.adapter_columns import fits_adapter_columns, padding_for
from trainer.spec.family import Footprint
from trainer.spec.strategies import RESIDENT, described
from trainer.spec.weight_formats import PRECISIONS

GIB = 2**30
STATE_BYTES = {
    "prodigy": 24,
    "prodigy-schedulefree": 24,
    "adamw8bit": 10,
    "lion": 12,
}  # of one trained number, all in all
SPARE = 0.93  # of the memory there is: the driver's own, and gaps between tensors
TIGHT = 0.97  # likewise, before a way that is much slower is taken: the rehearsal sees whether it fits


# of what waits on the host: so much is on its way there, and as much on its way back
# (trainer.engine.memory.activation_offload)
SHARE = 1 / 16
# regions on the device where weights are streamed (trainer.engine.memory.weight_streaming): the one at work, and the
# next
RESIDENT_REGIONS = 2
# Seconds of a step by what is recomputed, as a multiple of those with everything kept, of Flux.1 in FP8 on one
# accelerator (docs/performance.md); and what a step costs besides, in the time of so many thousands of tokens.
COST = {"none": 1.0, "products": 1.01, "attention": 1.2, "all": 1.28}
# Times as long, by what waits on the host: measured with batches of 4 and of 1, of which the larger hides more.
BUS = {"none": 1.0, "activations": 1.02, "weights": 1.4}
OUTPUTS = 0.54  # of the sides of all layers that have adapters
STREAMED = 1.0  # GiB that a step takes besides where weights are streamed
STEP = 1.0
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
WORTH = 1.02  # times the images per second that a larger batch must bring to be chosen
# The VAE of all families, in fp32: its weights, and GiB for a million (2^20) pixels of one picture.
VAE, ENCODE, DECODE = 0.31, 2.6, 3.2
ENCODE_BATCH_MEGAPIXELS = 2.0  # megapixels that the VAE encodes at once, where there is room


@dataclass(frozen=True)
class Strategy:
    """One way to run a step, and its predicted peak."""

    precision: str
    recompute: str
    kept_blocks: int
    offload: str
    gib: float
    turned: bool = False  # weights are kept turned round as well

    def __str__(self) -> str:
        how = described(self.recompute, self.kept_blocks, self.offload)
        return f"{self.precision}, {how}{', weights both ways round' if self.turned else ''}: {self.gib:.1f} GiB"


@dataclass(frozen=True)
class Workload:
    """What is trained: sizes in pixels of one picture, pictures at once, the adapters' rank, the optimiser's name."""

    pixels: int
    batch: int
    rank: int
    optimizer: str

    def kilotokens(self, of: Footprint) -> float:
        """Thousands (1,024) of tokens in a batch."""
        return self.batch * (self.pixels / 256 + of.text_tokens) / 1024


def _wide(precision: str) -> int:
    """Bytes of an activation."""
    return 4 if PRECISIONS[precision].dtype == "float32" else 2


def weights(of: Footprint, rank: int, precision: str, offload: str = "none", *, turned: bool = False) -> float:
    """The denoiser's frozen weights on the device with what adapters have beside them, in GiB.

    `turned`: with a copy turned round.
    """
    each = PRECISIONS[precision].bytes or _wide(precision)
    inside = RESIDENT_REGIONS * of.largest_region_weights if offload == "weights" else of.block_weights
    copies = of.fp8_weights if turned else 0.0  # of 8 bits
    beside = 0.0
    if PRECISIONS[precision].weight_format == "fp8" and fits_adapter_columns(rank, of.hidden_size):
        beside = (
            (1.0 if turned else OUTPUTS)
            * of.adapter_weights_per_rank
            * padding_for(rank, of.hidden_size)
            * inside
            / of.block_weights
        )
    return (inside * each + copies + of.other_weights * _wide(precision) + beside) / GIB


def predicted(
    of: Footprint,
    work: Workload,
    *,
    precision: str,
    recompute: str,
    kept_blocks: int = 0,
    offload: str = "none",
    turned: bool = False,
) -> float:
    """The peak of training, in GiB."""
    trained = of.adapter_weights_per_rank * work.rank * STATE_BYTES.get(work.optimizer, 16) / GIB
    everything = of.saved_gib["none"] * (1.0 if PRECISIONS[precision].weight_format == "fp8" else of.unfused_factor)
    kept, share = everything if recompute == "none" else of.saved_gib[recompute], kept_blocks / of.region_count
    kept = of.saved_gib["host"] + 2 * SHARE * kept if offload != "none" else kept * (1 - share) + everything * share
    tokens = work.kilotokens(of) * _wide(precision) / 2
    each = of.working_gib + kept
    streamed = STREAMED if offload == "weights" else 0.0
    return weights(of, work.rank, precision, offload, turned=turned) + streamed + trained + tokens * each


def on_host(of: Footprint, work: Workload, way: Strategy) -> float:
    """What a way keeps in the host's memory, in GiB."""
    if way.offload == "none":
        return 0.0
    streamed = weights(of, work.rank, way.precision) if way.offload == "weights" else 0.0
    return of.saved_gib[way.recompute] * work.kilotokens(of) * _wide(way.precision) / 2 + streamed


def ways(of: Footprint, work: Workload, precisions: Iterable[str]) -> list[Strategy]:
    """The ways to be tried, the best first: weights that stay on the device, in each precision in its turn; then
    weights that are streamed; and 4 bits after all others."""
    named = list(precisions)
    wide = [p for p in named if (PRECISIONS[p].bytes or 2) >= 1]
    orders = [
        (precision, *order)
        for some in (wide, [p for p in named if p not in wide])
        for precision, *order in (
            *((p, *o) for p in some for o in RESIDENT),
            *((p, "all", "weights") for p in some[-1:]),
        )
    ]
    return [Strategy(p, r, 0, o, predicted(of, work, precision=p, recompute=r, offload=o)) for p, r, o in orders]


def best(
    of: Footprint,
    work: Workload,
    choices: Sequence[Strategy],
    *,
    have_gib: float,
    host_gib: float,
    recorded: bool = False,
) -> Strategy:
    """The first way that fits, or the one that takes least, with as much kept as the memory lets it."""
    room = have_gib * SPARE
    possible = [way for way in choices if on_host(of, work, way) <= host_gib] or list(choices)
    rooms = {"none": room, "activations": have_gib * TIGHT, "weights": room}
    way = next((way for way in possible if way.gib <= rooms[way.offload]), min(possible, key=lambda way: way.gib))
    return _filled(of, work, way, room=room, recorded=recorded)


def _filled(of: Footprint, work: Workload, way: Strategy, *, room: float, recorded: bool) -> Strategy:
    """What memory is left over goes to blocks that keep more, or to a copy of the weights."""

    def changed(*, turned: bool = False, kept_blocks: int = 0) -> Strategy:
        given = {"precision": way.precision, "recompute": way.recompute, "offload": way.offload}
        gib = predicted(of, work, kept_blocks=kept_blocks, turned=turned, **given)
        return replace(way, kept_blocks=kept_blocks, turned=turned, gib=gib)

    if (way.recompute, way.offload) == ("none", "none") and PRECISIONS[way.precision].weight_format == "fp8":
        both = changed(turned=True)
        return both if both.gib <= room else way
    if way.recompute not in ("products", "attention") or way.offload != "none" or way.gib > room:
        return way
    whole = changed(kept_blocks=of.region_count).gib
    left = max(0.0, room - way.gib - (of.capture_gib if recorded else 0.0))
    return changed(kept_blocks=min(of.region_count, int(left / (whole - way.gib) * of.region_count)))


def speed(of: Footprint, work: Workload, way: Strategy) -> float:
    """Images for a unit of time; only to compare batches of the same pictures on the same hardware."""
    share = way.kept_blocks / of.region_count
    cost = COST[way.recompute] * (1 - share) + COST["none"] * share
    return work.batch / (STEP + work.kilotokens(of) * cost * BUS[way.offload])


def fastest(of: Footprint, tried: Iterable[tuple[Workload, Strategy]]) -> tuple[Workload, Strategy]:
    """Of several batches, smallest first, that with the most images per second; a larger one must be worth it."""
    chosen, most = None, 0.0
    for work, way in tried:
        if (found := speed(of, work, way)) > most * WORTH:
            chosen, most = (work, way), found
    assert chosen is not None
    return chosen


def phases(
    of: Footprint, work: Workload, way: Strategy, *, streamed: bool, tiled: bool, drawn_pixels: int, encoded_pixels: int
) -> dict[str, float]:
    """The predicted peak of each phase, in GiB. `drawn_pixels`: of the largest sample; `encoded_pixels`: of the largest
    picture. `tiled`: samples are decoded in pieces, and pictures encoded one by one.
    """
    encoders = of.encoder_weights * _wide(way.precision) / GIB
    images = 1 if tiled else math.ceil(ENCODE_BATCH_MEGAPIXELS * 1e6 / encoded_pixels)
    return {
        "texts": 0.5 + (encoders / 12 if streamed else encoders),  # two of 24 layers
        "latents": VAE + ENCODE * images * encoded_pixels / 2**20,
        "training": way.gib,
        "samples": weights(of, work.rank, way.precision, way.offload, turned=way.turned)
        + of.adapter_weights_per_rank * work.rank * STATE_BYTES.get(work.optimizer, 16) / GIB
        + VAE
        + (1.0 if tiled else DECODE * drawn_pixels / 2**20),
    }
