"""The LoRA: its type, rank and targets, and what it starts from."""

from __future__ import annotations

from dataclasses import dataclass

from entrypoint.settings.row import row
from trainer.spec.plan import LoraPlan

LORA_TYPES = ("lora", "rslora", "dora")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """The LoRA that is trained. None: not set, or auto; the plan then chooses."""

    lora_type: str = row(
        "PARAMS_LORA_TYPE", "choice", default="lora", meaning="few tools read dora", choices=lambda: LORA_TYPES
    )
    network_dim: int | None = row(
        "PARAMS_NETWORK_DIM",
        "integer",
        meaning="the LoRA's rank",
        low=1,
        high=4096,
        if_unset=f"{LoraPlan.rank}; or the resumed file's",
    )
    network_alpha: float = row(
        "PARAMS_NETWORK_ALPHA",
        "number",
        default="4",
        meaning="the LoRA counts alpha divided by rank",
        above=0,
        high=1e6,
    )
    split_qkv: bool | None = row(
        "PARAMS_SPLIT_QKV",
        "auto_switch",
        default="auto",
        meaning="true: an adapter each for q, k and v; false: one together; auto: that, or as the resumed file has it",
    )
    target_modules: tuple[str, ...] | None = row(
        "PARAMS_TARGET_MODULES",
        "names",
        meaning="ends of the names of the layers that get adapters; * in them stands for any characters but a dot",
        if_unset="the model's; or the resumed file's",
    )
    training_adapter: str | None = row(
        "PARAMS_TRAINING_ADAPTER",
        "text",
        meaning="a LoRA that is part of the base model while it trains and not in the result: a .safetensors file, or "
        "one of the Hub (owner/name/file.safetensors); for models that were distilled to few steps",
    )
    resume_from: str | None = row(
        "PARAMS_RESUME_FROM",
        "text",
        meaning="a LoRA file to start from (weights only), or a state folder (everything)",
        if_unset="an interrupted run in OUTPUT_PATH resumes automatically",
    )
    resume_with_changes: bool = row(
        "RESUME_WITH_CHANGES",
        "switch",
        default="false",
        meaning="true: the last run in OUTPUT_PATH goes on with other settings or images, where its state fits them; "
        "false: they begin a new run beside it",
    )
