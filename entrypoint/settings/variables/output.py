"""Where results are written, and how often the job samples, saves and validates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# ruff: noqa: RUF009 (`row` only makes a dataclasses.field)
from entrypoint import DEFAULT_OUTPUT_PATH
from entrypoint.settings.row import LARGEST_COUNT, row
from trainer.spec.weight_formats import SAVE_PRECISIONS


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """What is written, where and how often. None: not set."""

    output_path: Path = row("OUTPUT_PATH", "path", default=DEFAULT_OUTPUT_PATH, meaning="where everything is written")
    output_name: str | None = row(
        "OUTPUT_NAME",
        "name",
        meaning="name of the LoRA file, without .safetensors",
        if_unset="hash of the job, and the start time",
    )
    sample_prompts: str | None = row(
        "SAMPLE_PROMPTS",
        "text",
        meaning="prompts.txt, .json or .toml: path, URL, or a JSON list itself",
        if_unset="the prompts.txt of this program",
    )
    sample_every_n_steps: int = row(
        "PARAMS_SAMPLE_EVERY_N_STEPS",
        "auto_count",
        default="auto",
        meaning="steps between samples; 0: off; auto: about ten rounds a run, each with a save",
        low=0,
        high=LARGEST_COUNT,
    )
    sample_strengths: tuple[float, ...] = row(
        "SAMPLE_STRENGTHS",
        "numbers",
        meaning="strengths of the LoRA, besides 1, at which the last samples are drawn too; 0 is the base model",
        low=0,
        high=4,
        if_unset="none",
    )
    save_every_n_steps: int = row(
        "PARAMS_SAVE_EVERY_N_STEPS",
        "auto_count",
        default="auto",
        meaning="steps between saves; 0 is off; auto: with the samples, about ten a run",
        low=0,
        high=LARGEST_COUNT,
    )
    validate_every_n_steps: int = row(
        "PARAMS_VALIDATE_EVERY_N_STEPS",
        "integer",
        default="0",
        meaning="steps between validations on held-out images; 0 is off",
        low=0,
        high=LARGEST_COUNT,
    )
    keep_checkpoints: int = row(
        "KEEP_CHECKPOINTS",
        "auto_count",
        default="auto",
        meaning="checkpoints that are kept, the newest; auto: all LoRA files, as far as there is room, and two states",
        low=1,
        high=LARGEST_COUNT,
    )
    save_precision: str = row(
        "PARAMS_SAVE_PRECISION",
        "choice",
        default="fp16",
        meaning="number format of the LoRA files; states are always fp32",
        choices=lambda: tuple(SAVE_PRECISIONS),
    )
