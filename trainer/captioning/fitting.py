"""How a captioning model is loaded so that it fits: in the job's type, in 16 bits, in 4 bits, or not at all.

It is alone on the device, since it is gone before the text encoders load. Memory for an image is not known before it is
looked at: where it does not suffice, a batch is halved (`vision_language`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.engine.device import limit_bytes, torch_dtype
from trainer.spec.errors import SettingsError
from trainer.spec.plan import EnginePlan
from trainer.spec.rules import captioners
from trainer.storage.atomic import GIB, human_size

# nf4: 4 bits, and a scale of 32 bits for each 64 weights. The image encoder, the embeddings and the output layer, about
# a seventh of a model of 8 billion weights, stay in 16 bits.
NF4_BYTES = 0.5625 * 6 / 7 + 2 / 7


@dataclass(frozen=True)
class Way:
    """The type of the weights; `four_bits`: the language model's are quantised (nf4)."""

    dtype: torch.dtype
    four_bits: bool = False

    def describe(self) -> str:
        """In words for the log."""
        return "nf4" if self.four_bits else str(self.dtype).removeprefix("torch.")


def choose_way(weights: int, engine: EnginePlan, *, variable: str) -> Way:
    """How a model with so many weights fits the device. Raises SettingsError, with the fix, where it does not."""
    free = _free_bytes(engine)
    ways: list[tuple[Way, float]] = [(Way(torch_dtype(engine)), torch_dtype(engine).itemsize), (Way(torch.bfloat16), 2)]
    if engine.device == "cuda":
        ways.append((Way(torch.bfloat16, four_bits=True), NF4_BYTES))
    needed = 0.0
    for way, size in ways:
        needed = captioners.needed_bytes(weights, size)
        if needed <= free:
            return way
    limit = f", MEMORY_LIMIT_GIB={engine.memory_limit_gib:g}" if engine.memory_limit_gib else ""
    raise SettingsError(
        f"{variable}: the model needs about {human_size(needed)} in its smallest form, and {human_size(free)} are free "
        f"on this device{limit}. Fix: a smaller model (CAPTION_WITH=florence-2 has 0.5 GiB), or a larger device."
    )


def _free_bytes(engine: EnginePlan) -> int:
    if engine.device == "cuda":
        left = limit_bytes() - torch.cuda.memory_reserved()
        return int(min(left, torch.cuda.mem_get_info()[0]))
    free = _available_host_bytes()
    limit = engine.host_gib or engine.memory_limit_gib
    return free if limit is None else int(min(free, limit * GIB))


def _available_host_bytes() -> int:
    """What Linux says is available without swapping; what a container may take is in the plan's `host_gib`."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
