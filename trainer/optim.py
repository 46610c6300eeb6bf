"""Optimisers and learning-rate schedules. The plan reads the tables, so torch is imported inside the functions."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OptimizerSpec:
    """One value of PARAMS_OPTIMIZER_TYPE."""

    path: str  # module and class
    arguments: frozenset[str]  # what PARAMS_OPTIMIZER_ARGS may name
    learning_rate: float = 1e-4  # where PARAMS_LEARNING_RATE is not given
    defaults: dict[str, Any] = field(default_factory=dict)  # keyword arguments besides lr and weight_decay
    schedule_free: bool = False  # keeps an average of its own: no schedule but a constant one, and train/eval modes
    own_warmup: bool = False  # warms up by itself
    one_rate: bool = False  # all groups of parameters have the same learning rate, or 0
    by_shape: bool = False  # rows and columns of a parameter matter, or its norm
    least: int = 0  # numbers; the state of a smaller parameter is kept in another format

    @property
    def prodigy(self) -> bool:
        """Whether it estimates its own step size `d`, so that PARAMS_D_COEF means something."""
        return "d_coef" in self.arguments


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


OPTIMIZERS: dict[str, OptimizerSpec] = {
    "prodigy": OptimizerSpec(
        "prodigyopt.Prodigy",
        _names("betas beta3 eps decouple use_bias_correction safeguard_warmup d0 d_coef growth_rate slice_p"),
        learning_rate=1.0,
        one_rate=True,
        defaults={
            "betas": [0.9, 0.999],
            "decouple": True,
            "use_bias_correction": False,
            "safeguard_warmup": False,
            "d_coef": 2.0,
        },
    ),
    "adamw": OptimizerSpec("torch.optim.AdamW", _names("betas eps amsgrad")),
    "adamw8bit": OptimizerSpec(
        "bitsandbytes.optim.AdamW8bit",
        _names("betas eps amsgrad min_8bit_size is_paged"),
        least=4096,
    ),
    "lion": OptimizerSpec(
        "bitsandbytes.optim.Lion", _names("betas min_8bit_size is_paged"), learning_rate=3e-5, least=4096
    ),
    # torch's Adafactor always scales the step by the weights' size, which is zero where an adapter begins.
    "adafactor": OptimizerSpec(
        "transformers.optimization.Adafactor",
        _names("eps clip_threshold decay_rate beta1 scale_parameter relative_step warmup_init"),
        defaults={"scale_parameter": False, "relative_step": False, "warmup_init": False},
        by_shape=True,
    ),
    "adamw-schedulefree": OptimizerSpec(
        "schedulefree.AdamWScheduleFree",
        _names("betas eps r weight_lr_power"),
        learning_rate=1e-3,
        schedule_free=True,
        own_warmup=True,
    ),
    "prodigy-schedulefree": OptimizerSpec(
        "prodigyplus.ProdigyPlusScheduleFree",
        _names(
            "betas beta3 weight_decay_by_lr d0 d_coef d_limiter prodigy_steps schedulefree_c eps split_groups "
            "split_groups_mean factored factored_fp32 use_bias_correction use_stableadamw use_speed use_cautious "
            "use_grams use_adopt use_orthograd use_focus"
        ),
        learning_rate=1.0,
        defaults={"d_coef": 2.0, "stochastic_rounding": False},
        schedule_free=True,
        by_shape=True,
    ),
}

SCHEDULERS: tuple[str, ...] = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)


PIECE = 2**24  # numbers: an optimiser's intermediate results are as large as a parameter


def pieces(sizes: Sequence[int], *, alone: Callable[[int], bool] = lambda _: False) -> list[list[int]]:
    """Places of neighbours with `PIECE` numbers at most together; what is `alone`, or larger, is a piece by itself."""
    found: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if size > room or alone(size):
            found.append([])
            room = PIECE
        found[-1].append(i)
        room = 0 if alone(size) else room - size
    return found


def joined(name: str, params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """What the optimiser `name` shall train in their place: a few long parameters, of which they are views from now on.

    What an optimiser costs the host is so much for each parameter, and adapters are hundreds of small ones. They stay
    as they are where their shapes matter to it, or their size.
    """
    import torch

    spec = OPTIMIZERS[name]
    if spec.by_shape:
        return params
    wholes = []
    for places in pieces([p.numel() for p in params], alone=lambda count: count < spec.least):
        piece = [params[i] for i in places]
        wholes.append(torch.nn.Parameter(torch.cat([p.detach().flatten() for p in piece])))
        for p, view in zip(piece, wholes[-1].detach().split([p.numel() for p in piece]), strict=True):
            p.data = view.view_as(p)
    return wholes


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
