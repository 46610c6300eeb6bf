"""The accelerator's memory: its limit, what is reserved, and how it is released."""

from __future__ import annotations

import gc

import torch

from trainer.spec.plan import EnginePlan


def limit_memory(device: str, gib: float | None) -> None:
    """Hold all that this process allocates from now on under a cap of the device's memory."""
    if gib and device == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / whole))


def rehearsal_reserve(device: str, *, eager: bool) -> int:
    """Bytes that a rehearsal does without, for later steps may find theirs in smaller pieces (docs/lab-notes.md)."""
    if device != "cuda":
        return 0
    if not eager:
        return 2**26
    share = torch.cuda.get_per_process_memory_fraction()
    return max(2**26, int(share * torch.cuda.get_device_properties(0).total_memory / 64))


def torch_dtype(plan: EnginePlan) -> torch.dtype:
    """What activations are computed in."""
    dtype: torch.dtype = getattr(torch, plan.dtype)
    return dtype


def release() -> None:
    """Give memory back before the next model is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
