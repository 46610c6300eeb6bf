"""Optimisers and learning-rate schedules. The plan reads the tables, so torch is imported inside the functions."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
from trainer.spec.optimizers import OPTIMIZERS


def make_optimizer(
    name: str,
    params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    weight_decay: float,
    args: dict[str, Any],
    warmup_steps: int = 0,
) -> torch.optim.Optimizer:
    """The optimiser `name` of OPTIMIZERS, ready to train; `params` may be groups with an `lr` of their own.

    TypeError for an argument that its class does not take.
    """
    module, _, cls = OPTIMIZERS[name].path.rpartition(".")
    kind = getattr(importlib.import_module(module), cls)
    ready = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    if OPTIMIZERS[name].own_warmup:
        ready["warmup_steps"] = warmup_steps
    with contextlib.redirect_stdout(io.StringIO()):  # some greet with print
        own = [dict(p) if isinstance(p, dict) else p for p in params]  # torch writes its settings into these
        optimizer: torch.optim.Optimizer = kind(own, lr=learning_rate, weight_decay=weight_decay, **ready)
    set_training(optimizer, True)
    return optimizer


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int, num_cycles: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule `name` of SCHEDULERS, one tick an optimiser step (diffusers' definitions)."""
    from diffusers.optimization import get_scheduler

    # diffusers' plain cosine counts half waves: 0.5 ends at zero, which is what "cosine" means to everyone.
    cycles: float = num_cycles if name == "cosine_with_restarts" else 0.5
    schedule: torch.optim.lr_scheduler.LambdaLR = get_scheduler(
        name,
        optimizer=optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        num_cycles=cycles,
    )
    return schedule


def is_schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights to use are others than those it trains at."""
    return hasattr(optimizer, "eval")


def set_training(optimizer: torch.optim.Optimizer, on: bool) -> None:
    """Schedule-free optimisers hold two sets of weights: the ones to train at, and the averaged ones to use."""
    switch = getattr(optimizer, "train" if on else "eval", None)
    if switch is not None:
        switch()


def step_size(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate in force; for Prodigy, times its estimate `d`."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` that keeps the types of the tensors.

    torch casts every floating state to the parameter's type, which rounds nothing but makes an optimiser that keeps
    some of its state in bf16 go on in fp32, and so elsewhere. Raises ValueError for a state of other parameters.
    """
    import torch

    optimizer.load_state_dict(state)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, saved in state["state"].items():
        for key, value in saved.items():
            loaded = optimizer.state[params[number]]
            if isinstance(value, torch.Tensor) and value.dtype != loaded[key].dtype:
                loaded[key] = value.to(loaded[key].device, copy=True)
