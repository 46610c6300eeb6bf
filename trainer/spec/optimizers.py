"""The optimisers and schedules that a plan may name, known without importing torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class OptimizerSpec:
    """One value of PARAMS_OPTIMIZER_TYPE."""

    path: str  # module and class
    arguments: frozenset[str]  # what PARAMS_OPTIMIZER_ARGS may name
    learning_rate: float = 1e-4  # where PARAMS_LEARNING_RATE is not given
    defaults: dict[str, Any] = field(default_factory=dict)  # keyword arguments besides lr and weight_decay
    schedule_free: bool = False  # keeps an average of its own: only a constant schedule, and train/eval modes
    own_warmup: bool = False  # has a warm-up of its own
    one_rate: bool = False  # all groups of parameters must have the same learning rate, or 0
    by_shape: bool = False  # its step depends on a parameter's rows and columns, or on its norm: none are joined
    least: int = 0  # numbers in a parameter; bitsandbytes keeps the state of a smaller one in another format

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

STRETCHED_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial")  # they depend on the last step
SCHEDULERS: tuple[str, ...] = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
