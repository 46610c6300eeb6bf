"""What is optimised and how: optimiser, schedule, noise levels, loss, guards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# ruff: noqa: RUF009 (`row` only makes a dataclasses.field)
from entrypoint.settings.row import LARGEST_COUNT, row
from trainer.spec.family import timestep_samplings
from trainer.spec.optimizers import OPTIMIZERS, SCHEDULERS

TEXT_ENCODER_LR = "learning rate of the CLIP text encoders, or CLIP-L's and CLIP-G's"
LOSS_WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")  # by noise level; Esser et al. 2024, arXiv:2403.03206
MAX_TOKEN_LENGTHS = ("77", "150", "225")
PREDICTION_TYPES = ("auto", "epsilon", "v_prediction")  # by diffusers' names


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How the weights are optimised. None: not set, or auto; the plan then chooses."""

    max_epochs: int = row(
        "PARAMS_MAX_EPOCHS",
        "auto_count",
        default="auto",
        meaning="passes over images times repeats; auto: 1,000 steps or more, by the number of images",
        low=1,
        high=LARGEST_COUNT,
    )
    max_steps: int | None = row(
        "PARAMS_MAX_STEPS",
        "integer",
        meaning="optimiser steps; overrides PARAMS_MAX_EPOCHS",
        low=1,
        high=LARGEST_COUNT,
        if_unset="by epochs",
    )
    optimizer_type: str = row(
        "PARAMS_OPTIMIZER_TYPE", "choice", default="prodigy", meaning="optimiser", choices=lambda: OPTIMIZERS
    )
    optimizer_args: dict[str, Any] = row(
        "PARAMS_OPTIMIZER_ARGS", "pairs", meaning="more arguments of the optimiser: key=value ..."
    )
    learning_rate: float | None = row(
        "PARAMS_LEARNING_RATE",
        "number",
        meaning="learning rate",
        above=0,
        high=1000,
        if_unset="the optimiser's: 1 with prodigy, 1e-4 with adamw",
    )
    text_encoder_lr: tuple[float, ...] = row(
        "PARAMS_TEXT_ENCODER_LR", "numbers", default="0", meaning=f"{TEXT_ENCODER_LR}; 0: not trained", low=0, high=1000
    )
    d_coef: float | None = row(
        "PARAMS_D_COEF",
        "number",
        meaning="factor of the step size that Prodigy finds",
        above=0,
        high=1000,
        if_unset="2",
    )
    weight_decay: float = row("PARAMS_WEIGHT_DECAY", "number", default="0.1", meaning="weight decay", low=0, high=100)
    learning_scheduler: str = row(
        "PARAMS_LEARNING_SCHEDULER",
        "choice",
        default="constant",
        meaning="course of the learning rate",
        choices=lambda: SCHEDULERS,
    )
    warmup_steps: int = row(
        "PARAMS_WARMUP_STEPS",
        "integer",
        default="0",
        meaning="steps of a rising learning rate",
        low=0,
        high=LARGEST_COUNT,
    )
    num_cycles: int | None = row(
        "PARAMS_NUM_CYCLES",
        "integer",
        meaning="restarts of cosine_with_restarts",
        low=1,
        high=LARGEST_COUNT,
        if_unset="a third of PARAMS_MAX_EPOCHS, at least 1",
    )
    gradient_accumulation: int = row(
        "PARAMS_GRADIENT_ACCUMULATION", "integer", default="1", meaning="batches to a step", low=1, high=LARGEST_COUNT
    )
    max_grad_norm: float = row(
        "PARAMS_MAX_GRAD_NORM", "number", default="1.0", meaning="largest gradient norm; 0 is no limit", low=0, high=1e6
    )
    seed: int = row("PARAMS_SEED", "integer", default="42", meaning="of all that is random", low=0, high=2**32 - 1)
    timestep_sampling: str | None = row(
        "PARAMS_TIMESTEP_SAMPLING",
        "choice",
        meaning="how noise levels are drawn, as far as the model has it",
        choices=timestep_samplings,
        if_unset="the model's",
    )
    discrete_flow_shift: float | None = row(
        "PARAMS_DISCRETE_FLOW_SHIFT",
        "number",
        meaning="shift of noise levels, with shift",
        above=0,
        high=1000,
        if_unset="the model's",
    )
    loss_weighting: str = row(
        "PARAMS_LOSS_WEIGHTING",
        "choice",
        default="none",
        meaning="weight of the loss by noise level; flow matching only",
        choices=lambda: LOSS_WEIGHTINGS,
    )
    prediction_type: str = row(
        "PARAMS_PREDICTION_TYPE",
        "choice",
        default="auto",
        meaning="what the model predicts; auto: what its file or its scheduler says; not with flow matching",
        choices=lambda: PREDICTION_TYPES,
    )
    zero_terminal_snr: bool | None = row(
        "PARAMS_ZERO_TERMINAL_SNR",
        "auto_switch",
        default="auto",
        meaning="whether the last noise level has no signal left; auto: what the scheduler says; not with flow "
        "matching",
    )
    max_token_length: str = row(
        "PARAMS_MAX_TOKEN_LENGTH",
        "choice",
        default="77",
        meaning="tokens of a caption that CLIP reads; 150 and 225 in chunks of 75, where T5 does not read it",
        choices=lambda: MAX_TOKEN_LENGTHS,
    )
    min_snr_gamma: float = row(
        "PARAMS_MIN_SNR_GAMMA",
        "number",
        default="0",
        meaning="min-SNR loss weights, usually 5; 0: off",
        low=0,
        high=1000,
    )
    guidance_scale: float = row(
        "PARAMS_GUIDANCE_SCALE", "number", default="1.0", meaning="embedded guidance, if there is any", low=0, high=100
    )
    noise_offset: float = row(
        "PARAMS_NOISE_OFFSET", "number", default="0.1", meaning="brightness noise added to each channel", low=0, high=10
    )
    prior_loss_weight: float = row(
        "PARAMS_PRIOR_LOSS_WEIGHT",
        "number",
        default="1.0",
        meaning="weight of regularisation images",
        low=0,
        high=1000,
    )
    ema_decay: float = row(
        "PARAMS_EMA_DECAY",
        "number",
        default="0",
        meaning="decay of the averaged weights, 0.999 for example; 0 is off",
        low=0,
        high=0.999999,
    )
    max_skipped_steps: int = row(
        "PARAMS_MAX_SKIPPED_STEPS",
        "integer",
        default="3",
        meaning="steps whose loss or gradient is not finite, or a spike, that are skipped before the job stops",
        low=0,
        high=LARGEST_COUNT,
    )
    max_loss_spike: float = row(
        "PARAMS_MAX_LOSS_SPIKE",
        "number",
        default="10",
        meaning="a loss is a spike above this many times the largest of the last 64; 0 is off",
        low=0,
        high=1e6,
    )
