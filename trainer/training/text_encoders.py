"""CLIP text encoders that train along with the denoiser: adapters on them, and captions encoded anew in each step.

Everything else that a caption means (T5's tokens, an encoder that stays frozen) comes from the cache as ever.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.engine import adapters
from trainer.lora_files import key_names, peft_bridge, weights
from trainer.spec.family import ClipOutput, Family

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Encoder:
    """One text encoder with its tokenizer."""

    model: Any
    tokenizer: Any

    def __call__(self, captions: Sequence[str]) -> ClipOutput:
        """As diffusers' pipelines encode, with a gradient where one is wanted."""
        ids_BL = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        out = self.model(ids_BL.to(self.model.device), output_hidden_states=True)
        pooled_BD = out.pooler_output if "pooler_output" in out else out.text_embeds
        return ClipOutput(out.hidden_states[-2], pooled_BD)


@dataclass(frozen=True)
class TextEncoders:
    """Those that train, by diffusers' names (text_encoder, text_encoder_2); none, if the captions are all cached."""

    family: Family
    encoders: dict[str, Encoder] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Any]:
        return {component: encoder.model for component, encoder in self.encoders.items()}

    def renewed(self, text: dict[str, torch.Tensor], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """The cached `text` of `captions`, with what the trained encoders say now."""
        if not self.encoders:
            return text
        return self.family.with_clip_outputs(text, {c: encoder(captions) for c, encoder in self.encoders.items()})


def load(folder: Path, components: Collection[str], *, family: Family, device: str, dtype: torch.dtype) -> TextEncoders:
    """The frozen encoders `components` of the model in `folder`."""
    from transformers import AutoTokenizer

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    found = {}
    for component in components:
        library, name = index[component]
        kind: Any = getattr(importlib.import_module(library), name)
        model = kind.from_pretrained(folder / component, dtype=dtype, use_safetensors=True, device_map=device)
        tokenizer = AutoTokenizer.from_pretrained(folder / component.replace("text_encoder", "tokenizer"))
        found[component] = Encoder(model.requires_grad_(False).eval(), tokenizer)
    return TextEncoders(family, found)


def blocks(model: Any) -> list[tuple[str, torch.nn.Module]]:
    """The layers of a CLIP text encoder, by name: one level deeper where transformers adds a projection."""
    inner = getattr(model, "text_model", model)
    level = "" if inner is model else "text_model."
    return [(f"{level}encoder.layers.{i}", layer) for i, layer in enumerate(inner.encoder.layers)]


def modules(state: dict[str, torch.Tensor], component: str, *, family_name: str, scale: float) -> weights.LoraModules:
    """What is being trained in one encoder (`lora.state`), under the names that files have."""
    found = peft_bridge.from_peft_state(state, prefix=component, fused={}, scale=scale)
    return {key_names.name_in_files(name, family_name): adapter for name, adapter in found.items()}


def start(model: Any, component: str, given: weights.LoraModules, *, family_name: str, scale: float) -> None:
    """Begin with what a LoRA file has for one encoder. Raises ValueError where it does not fit."""
    state = adapters.state(model)
    names = {f"{component}.{key.removesuffix('.lora_A.weight')}" for key in state if key.endswith(".lora_A.weight")}
    ours = {key_names.name_in_files(name, family_name): name for name in names}
    own = {ours.get(name, name): a for name, a in given.items() if name.partition(".")[0] == component}
    adapters.load(model, peft_bridge.to_peft_state(own, state, prefix=component, fused={}, scale=scale))
