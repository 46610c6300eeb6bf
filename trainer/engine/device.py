"""The accelerator: determinism, and its memory: the limit, what the rehearsal leaves free, and how it is released."""

from __future__ import annotations

import gc
import os

import torch
import torch.utils.deterministic

from trainer.spec.memory_model import USABLE_SHARE
from trainer.spec.plan import EnginePlan

# Of the device's memory, a rehearsal leaves this free, because later steps may find the same amount in pieces that are
# too small: 20 to 250 MiB under caps of 1 to 3 GiB (docs/lab-notes.md, "Fragmented free memory"). A captured graph has
# its memory already, and needs only the minimum.
MIN_RESERVE_BYTES = 2**26
EAGER_RESERVE_DIVISOR = 64


def set_up(plan: EnginePlan) -> None:
    """What holds for everything that this process computes: the cap of memory, and determinism.

    Where torch has no deterministic kernel for something, it raises RuntimeError, which names that.
    """
    limit_memory(plan.device, plan.memory_limit_gib)
    if plan.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it before its first product
        # Nothing reads memory before it is written; to fill it takes time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # of a module's class
    torch.use_deterministic_algorithms(plan.deterministic)


def limit_memory(device: str, gib: float | None) -> None:
    """Cap what this process allocates on the device from now on; None: no cap."""
    if gib and device == "cuda":
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total_bytes))


def limit_bytes() -> int:
    """The memory of the device that this process may take."""
    share = torch.cuda.get_per_process_memory_fraction()
    return int(share * torch.cuda.get_device_properties(0).total_memory)


def is_nearly_full() -> bool:
    """Whether less of the device's memory is left than a plan leaves free."""
    left = min(limit_bytes() - torch.cuda.memory_reserved(), torch.cuda.mem_get_info()[0])
    return left < (1 - USABLE_SHARE) * limit_bytes()


def rehearsal_reserve(device: str, *, eager: bool) -> int:
    """Bytes that a rehearsal leaves free. `eager`: steps are launched kernel by kernel."""
    if device != "cuda":
        return 0
    if not eager:
        return MIN_RESERVE_BYTES
    return max(MIN_RESERVE_BYTES, limit_bytes() // EAGER_RESERVE_DIVISOR)


def torch_dtype(plan: EnginePlan) -> torch.dtype:
    """The type of activations."""
    dtype: torch.dtype = getattr(torch, plan.dtype)
    return dtype


def release() -> None:
    """Free unused memory before the next model is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
