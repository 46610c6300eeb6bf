"""Optimisers and learning-rate schedules, made by their names in trainer.spec.optimizers."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterable
from typing import Any

import torch

from trainer.spec.optimizers import OPTIMIZERS
from trainer.spec.rules.resume_rules import FREE_ARGUMENTS


def make_optimizer(
    name: str,
    params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    weight_decay: float,
    args: dict[str, Any],
    warmup_steps: int = 0,
) -> torch.optim.Optimizer:
    """The optimiser `name` of OPTIMIZERS, in training mode; `params` may be groups with an `lr` of their own.

    `warmup_steps`: only for those with a warm-up of their own. Raises TypeError for an argument that its class lacks.
    """
    spec = OPTIMIZERS[name]
    module, _, class_name = spec.path.rpartition(".")
    optimizer_class = getattr(importlib.import_module(module), class_name)
    keywords = {}
    for key, value in args.items():
        # JSON has no tuples; and torch takes no pair of a float and a whole number, such as 0.
        keywords[key] = tuple(float(number) for number in value) if isinstance(value, list) else value
    if spec.own_warmup:
        keywords["warmup_steps"] = warmup_steps
    # torch writes its settings into the groups, and the caller may make another optimiser of them.
    groups = [dict(p) if isinstance(p, dict) else p for p in params]
    with contextlib.redirect_stdout(io.StringIO()):  # some greet with print
        optimizer: torch.optim.Optimizer = optimizer_class(
            groups, lr=learning_rate, weight_decay=weight_decay, **keywords
        )
    set_training(optimizer, True)
    return optimizer


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int, num_cycles: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule `name` of SCHEDULERS as diffusers defines it, stepped once for each optimiser step."""
    from diffusers.optimization import get_scheduler  # slow to import

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
    """Whether the optimiser trains at other weights than those to use."""
    return hasattr(optimizer, "eval")


def set_training(optimizer: torch.optim.Optimizer, on: bool) -> None:
    """Switch a schedule-free optimiser between the weights that it trains at and the averaged ones to use.

    Other optimisers have one set of weights, and nothing to switch.
    """
    switch = getattr(optimizer, "train" if on else "eval", None)
    if switch is not None:
        switch()


def step_size(optimizer: torch.optim.Optimizer) -> float:
    """The current learning rate; for Prodigy, times its estimate `d`."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * float(group.get("d", 1.0))


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the plan has set in each group of parameters, besides the parameters."""
    kept = ("lr", "initial_lr", "weight_decay", *FREE_ARGUMENTS)
    groups = []
    for group in optimizer.param_groups:
        groups.append({key: value for key, value in group.items() if key in kept})
    return groups


def renew(
    optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, settings: list[dict[str, Any]]
) -> None:
    """Let an optimiser and a schedule that were restored go on by `settings` and by the schedule's own course.

    A state brings the settings that it was made with, and the learning rate of its own course.
    """
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        return
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    rates = []
    for group, base, course in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * course(schedule.last_epoch)
        rates.append(group["lr"])
    schedule._last_lr = rates


def estimate(optimizer: torch.optim.Optimizer) -> float | None:
    """Prodigy's estimate `d` of the distance to the solution (arXiv:2306.06101); None for other optimisers."""
    d = optimizer.param_groups[0].get("d")
    return None if d is None else float(d)


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict` that keeps the dtypes of the saved tensors.

    torch casts every floating-point state to the parameter's dtype. That rounds nothing, but an optimiser that keeps
    some of its state in bf16 would continue in fp32, and so to other weights. Raises ValueError for a state of other
    parameters.
    """
    optimizer.load_state_dict(state)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, saved in state["state"].items():
        loaded = optimizer.state[params[number]]
        for key, value in saved.items():
            if isinstance(value, torch.Tensor) and value.dtype != loaded[key].dtype:
                loaded[key] = value.to(loaded[key].device, copy=True)
