"""What a plan takes of a device's memory, predicted without torch, and the fastest way to train within what there is.

A step takes: the frozen weights; the adapters with their gradients and their optimiser's state; and for each picture
and each token what the regions keep, which depends on what is recomputed, and what the region at work needs besides.
The constants (`trainer.families.Footprint`) are measured by `python -m bench.engine`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from trainer.families import Footprint
from trainer.precision import PRECISIONS

GIB = 2**30
STATE_BYTES = {
    "prodigy": 24,
    "prodigy-schedulefree": 24,
    "adamw8bit": 10,
    "lion": 12,
}  # of one trained number, all in all
SPARE = 0.93  # of the memory there is: the driver's own, and gaps between tensors


@dataclass(frozen=True)
class Way:
    """One way to run a step, and its predicted peak."""

    precision: str
    recompute: str
    kept_blocks: int
    offload: str
    gib: float

    def __str__(self) -> str:
        return f"{self.precision}, {described(self.recompute, self.kept_blocks, self.offload)}: {self.gib:.1f} GiB"


def described(recompute: str, kept_blocks: int, offload: str) -> str:
    """A way in words, for the log."""
    what = {"none": "everything kept", "attention": "all but attention recomputed", "all": "all recomputed"}[recompute]
    kept = f", {kept_blocks} blocks kept whole" if kept_blocks else ""
    return f"{what}{kept}{', kept on the host' if offload != 'none' else ''}"


@dataclass(frozen=True)
class Work:
    """What is trained: sizes in pixels of one picture, pictures at once, the adapters' rank, the optimiser's name."""

    pixels: int
    batch: int
    rank: int
    optimizer: str

    def kilotokens(self, of: Footprint) -> float:
        """Thousands (1,024) of tokens in a batch."""
        return self.batch * (self.pixels / 256 + of.text_tokens) / 1024


def predicted(
    of: Footprint, work: Work, *, precision: str, recompute: str, kept_blocks: int = 0, offload: str = "none"
) -> float:
    """The peak of training, in GiB."""
    kind = PRECISIONS[precision]
    wide = 4 if kind.dtype == "float32" else 2
    weights = (of.blocks * kind.bytes + of.rest * wide) / GIB
    trained = of.adapters * work.rank * STATE_BYTES.get(work.optimizer, 16) / GIB
    tokens = work.kilotokens(of)
    kept = of.kept["host"] if offload != "none" else of.kept[recompute]
    share = kept_blocks / of.regions
    return weights + trained + tokens * wide / 2 * (of.working + kept * (1 - share) + of.kept["none"] * share)


def on_host(of: Footprint, work: Work) -> float:
    """What keeping attention in the host's memory takes there, in GiB."""
    return of.kept["attention"] * work.kilotokens(of)


def ways(of: Footprint, work: Work, precisions: Iterable[str]) -> list[Way]:
    """Fastest first, for each precision in its turn."""
    orders = (
        ("none", "none"),
        ("attention", "none"),
        ("attention", "activations"),
        ("all", "none"),
        ("all", "activations"),
    )
    return [
        Way(
            precision,
            recompute,
            0,
            offload,
            predicted(of, work, precision=precision, recompute=recompute, offload=offload),
        )
        for precision in precisions
        for recompute, offload in orders
    ]


def best(of: Footprint, work: Work, choices: Sequence[Way], *, have_gib: float, host_gib: float) -> Way:
    """The first way that fits, or the one that takes least. Blocks keep all as far as the memory goes."""
    room = have_gib * SPARE
    possible = [way for way in choices if way.offload == "none" or on_host(of, work) <= host_gib] or list(choices)
    way = next((way for way in possible if way.gib <= room), min(possible, key=lambda way: way.gib))
    whole = predicted(of, work, precision=way.precision, recompute="none")
    if way.recompute != "attention" or way.offload != "none" or way.gib > room:
        return way
    kept = int((room - way.gib) / (whole - way.gib) * of.regions)
    return replace(way, kept_blocks=kept, gib=way.gib + (whole - way.gib) * kept / of.regions)
