"""The optimisers and schedules that a plan may name, known without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.spec.values import inside, span

_ALMOST_ONE = 0.9999999  # of a decay: at 1 an average never takes anything in, and some optimisers divide by 1 - it


@dataclass(frozen=True)
class Argument:
    """What one argument of an optimiser may be.

    The ranges are those in which the optimiser steps with finite numbers, on matrices of zeros too: half of a LoRA has
    no gradient at its first step, so that an epsilon of 0 divides zero by zero.
    """

    kind: str  # number | integer | switch | pair (two numbers)
    low: float | None = None
    high: float | None = None
    above: float | None = None
    first_low: float | None = None  # of a pair: the least first number, where it is not `low`
    or_none: bool = False
    only: bool | None = None  # of a switch: the one value that Kiln can use ...
    reason: str = ""  # ... and why

    def __str__(self) -> str:
        limits = span(self.low, self.high, above=self.above)
        words = {
            "number": f"a number, {limits}",
            "integer": f"a whole number, {limits}",
            "switch": "true or false",
            "pair": f"two numbers, {limits} each, like 0.9,0.99",
        }[self.kind]
        if self.first_low is not None:
            words += f", the first at least {self.first_low:g}"
        return f"{words}, or none" if self.or_none else words

    def problem(self, value: Any) -> str | None:
        """Why `value` (from JSON) cannot be used, as the rest of a sentence that names it."""
        if value is None and self.or_none:
            return None
        if self.kind == "switch":
            if not isinstance(value, bool):
                return "is neither true nor false"
            return self.reason if self.only is not None and value != self.only else None
        if self.kind == "pair":
            return None if self._is_pair(value) else f"is not {self}"
        if not _is_number(value) or (self.kind == "integer" and not isinstance(value, int)):
            return f"is not {self}"
        return None if inside(value, self.low, self.high, above=self.above) else f"is not {self}"

    def _is_pair(self, value: Any) -> bool:
        if not isinstance(value, list) or len(value) != 2 or not all(_is_number(number) for number in value):
            return False
        if self.first_low is not None and value[0] < self.first_low:
            return False
        return all(inside(number, self.low, self.high) for number in value)


def _is_number(value: Any) -> bool:
    """JSON's true is an instance of Python's int, but no number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class OptimizerSpec:
    """One value of PARAMS_OPTIMIZER_TYPE."""

    path: str  # module and class
    rules: dict[str, Argument]  # what PARAMS_OPTIMIZER_ARGS may name
    learning_rate: float = 1e-4  # where PARAMS_LEARNING_RATE is not given
    usual_rates: tuple[float, float] = (1e-5, 1e-3)  # learning rates that people train LoRAs at
    defaults: dict[str, Any] = field(default_factory=dict)  # keyword arguments besides lr and weight_decay
    schedule_free: bool = False  # keeps an average of its own: only a constant schedule, and train/eval modes
    own_warmup: bool = False  # has a warm-up of its own
    one_rate: bool = False  # all groups of parameters must have the same learning rate, or 0
    by_shape: bool = False  # its step depends on a parameter's rows and columns, or on its norm: none are joined
    least: int = 0  # numbers in a parameter; bitsandbytes keeps the state of a smaller one in another format

    @property
    def arguments(self) -> frozenset[str]:
        return frozenset(self.rules)

    @property
    def prodigy(self) -> bool:
        """Whether it estimates its own step size `d`, so that PARAMS_D_COEF means something."""
        return "d_coef" in self.rules


# Arguments that the classes have, and Kiln sets itself or does without.
_KILNS_OWN = "is Kiln's own to set. Fix: remove it"
NOT_OFFERED: dict[str, str] = {
    "maximize": "would train away from the images. Fix: remove it",
    "use_schedulefree": "is what prodigy-schedulefree is. Fix: remove it; without averaging, it is "
    "PARAMS_OPTIMIZER_TYPE=prodigy",
    "optim_bits": "is chosen by the name. Fix: remove it; PARAMS_OPTIMIZER_TYPE=adamw8bit or lion8bit has 8 bits",
    "block_wise": _KILNS_OWN,
    "percentile_clipping": "is not in this version of bitsandbytes. Fix: remove it, and set PARAMS_MAX_GRAD_NORM",
    "foreach": _KILNS_OWN,
    "fused": _KILNS_OWN,
    "capturable": _KILNS_OWN,
    "differentiable": _KILNS_OWN,
    "args": _KILNS_OWN,
    "fsdp_in_use": _KILNS_OWN,
    "fused_back_pass": _KILNS_OWN,
    "stochastic_rounding": "is for weights in bf16, and a LoRA's are fp32. Fix: remove it",
}

_SWITCH = Argument("switch")
_DECAY = Argument("number", low=0, high=_ALMOST_ONE, or_none=True)
_BETAS = Argument("pair", low=0, high=_ALMOST_ONE)
# Schedule-free optimisers divide by the first: what they train at is between its average and its newest weights.
_AVERAGED_BETAS = Argument("pair", low=0, high=_ALMOST_ONE, first_low=0.1)
_EPS = Argument("number", low=1e-20, high=1)
_D0 = Argument("number", low=1e-12, high=1)
_D_COEF = Argument("number", above=0, high=1000)
_COUNT = Argument("integer", low=0, high=10**8)
_NO_AMSGRAD = Argument(
    "switch", only=False, reason="is not in bitsandbytes' 8-bit AdamW. Fix: remove it, or PARAMS_OPTIMIZER_TYPE=adamw"
)
_RELATIVE = "would replace PARAMS_LEARNING_RATE with Adafactor's own step sizes. Fix: remove it"

OPTIMIZERS: dict[str, OptimizerSpec] = {
    "prodigy": OptimizerSpec(
        "prodigyopt.Prodigy",
        {
            "betas": _BETAS,
            "beta3": _DECAY,
            "eps": _EPS,
            "decouple": _SWITCH,
            "use_bias_correction": _SWITCH,
            "safeguard_warmup": _SWITCH,
            "d0": _D0,
            "d_coef": _D_COEF,
            "growth_rate": Argument("number", low=1, high=1e18),
            "slice_p": Argument("integer", low=1, high=10**6),
        },
        learning_rate=1.0,
        usual_rates=(0.1, 2.0),
        one_rate=True,
        defaults={
            "betas": [0.9, 0.999],
            "decouple": True,
            "use_bias_correction": False,
            "safeguard_warmup": False,
            "d_coef": 2.0,
        },
    ),
    "adamw": OptimizerSpec("torch.optim.AdamW", {"betas": _BETAS, "eps": _EPS, "amsgrad": _SWITCH}),
    "adamw8bit": OptimizerSpec(
        "bitsandbytes.optim.AdamW8bit",
        {"betas": _BETAS, "eps": _EPS, "amsgrad": _NO_AMSGRAD, "min_8bit_size": _COUNT, "is_paged": _SWITCH},
        least=4096,
    ),
    "lion": OptimizerSpec(
        "bitsandbytes.optim.Lion",
        {"betas": _BETAS, "min_8bit_size": _COUNT, "is_paged": _SWITCH},
        learning_rate=3e-5,
        usual_rates=(1e-6, 3e-4),
        least=4096,
    ),
    "lion8bit": OptimizerSpec(
        "bitsandbytes.optim.Lion8bit",
        {"betas": _BETAS, "min_8bit_size": _COUNT, "is_paged": _SWITCH},
        learning_rate=3e-5,
        usual_rates=(1e-6, 3e-4),
        least=4096,
    ),
    # torch's Adafactor always scales the step by the weights' size, which is zero where an adapter begins.
    "adafactor": OptimizerSpec(
        "transformers.optimization.Adafactor",
        {
            "eps": Argument("pair", low=1e-37, high=1),  # of the squared gradient, and of the weights' size
            "clip_threshold": Argument("number", low=1e-6, high=1e6),
            "decay_rate": Argument("number", low=-10, high=0),
            "beta1": _DECAY,
            "scale_parameter": _SWITCH,
            "relative_step": Argument("switch", only=False, reason=_RELATIVE),
            "warmup_init": Argument("switch", only=False, reason=_RELATIVE),
        },
        defaults={"scale_parameter": False, "relative_step": False, "warmup_init": False},
        by_shape=True,
    ),
    "adamw-schedulefree": OptimizerSpec(
        "schedulefree.AdamWScheduleFree",
        {
            "betas": _AVERAGED_BETAS,
            "eps": _EPS,
            # Powers of the number of steps and of the learning rate: larger ones overflow.
            "r": Argument("number", low=0, high=20),
            "weight_lr_power": Argument("number", low=0, high=20),
        },
        learning_rate=1e-3,
        usual_rates=(1e-4, 1e-2),
        schedule_free=True,
        own_warmup=True,
    ),
    "prodigy-schedulefree": OptimizerSpec(
        "prodigyplus.ProdigyPlusScheduleFree",
        {
            "betas": _AVERAGED_BETAS,
            "beta3": _DECAY,
            "weight_decay_by_lr": _SWITCH,
            "d0": _D0,
            "d_coef": _D_COEF,
            "d_limiter": _SWITCH,
            "prodigy_steps": _COUNT,
            "schedulefree_c": Argument("number", low=0, high=1e6),
            "eps": Argument("number", low=1e-20, high=1, or_none=True),  # none: Adam-atan2
            "split_groups": _SWITCH,
            "split_groups_mean": _SWITCH,
            "factored": _SWITCH,
            "factored_fp32": _SWITCH,
            "use_bias_correction": _SWITCH,
            "use_stableadamw": _SWITCH,
            "use_speed": _SWITCH,
            "use_cautious": _SWITCH,
            "use_grams": _SWITCH,
            "use_adopt": _SWITCH,
            "use_orthograd": _SWITCH,
            "use_focus": _SWITCH,
        },
        learning_rate=1.0,
        usual_rates=(0.1, 2.0),
        defaults={"d_coef": 2.0, "stochastic_rounding": False},
        schedule_free=True,
        by_shape=True,
    ),
}

STRETCHED_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial")  # they depend on the last step
SCHEDULERS: tuple[str, ...] = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
