"""CLIP text encoders that train along with the denoiser: adapters on them, and captions encoded anew in each step.

Everything else that belongs to a caption (T5's tokens, an encoder that stays frozen) comes from the cache as ever.

Letters: B captions, L tokens, D features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trainer.base_model import loading
from trainer.engine import adapters
from trainer.engine.encoders import clip_output
from trainer.lora_files import key_names, peft_bridge, weights
from trainer.spec.family import CLIP_TOKENS, ClipOutput, Family

# All linear layers of a CLIP block, as in sd-scripts.
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Encoder:
    """One text encoder with its tokenizer, both of transformers."""

    model: Any
    tokenizer: Any
    max_tokens: int = CLIP_TOKENS

    def __call__(self, captions: Sequence[str]) -> ClipOutput:
        """Second to last hidden states (B, L, D) and pooled output (B, D), as the cached ones were encoded."""
        return clip_output(self.model, self.tokenizer, captions, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class TextEncoders:
    """Those that train, by diffusers' names (text_encoder, text_encoder_2); none if all texts come from the cache."""

    family: Family
    encoders: dict[str, Encoder] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Any]:
        return {component: encoder.model for component, encoder in self.encoders.items()}

    def encode_trained(self, text: dict[str, torch.Tensor], captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """The cached `text` of `captions`, with the outputs of the trained encoders in the place of the cached ones."""
        if not self.encoders:
            return text
        encoded = {component: encoder(captions) for component, encoder in self.encoders.items()}
        return self.family.with_clip_outputs(text, encoded)


def load(
    folder: Path,
    components: Collection[str],
    *,
    family: Family,
    device: str,
    dtype: torch.dtype,
    max_tokens: int = CLIP_TOKENS,
) -> TextEncoders:
    """The frozen encoders `components` of the model in `folder` (diffusers layout)."""
    encoders = {}
    kinds = family.FACTS.kinds
    for component in components:
        model = loading.load_model(kinds[component], folder / component, device=device, dtype=dtype)
        place = component.replace("text_encoder", "tokenizer")
        tokenizer = loading.load_tokenizer(folder / place, kinds[place])
        loading.check_tokens(tokenizer, model, folder / place)
        encoders[component] = Encoder(model.eval(), tokenizer, max_tokens)
    return TextEncoders(family, encoders)


def blocks(model: Any) -> list[tuple[str, torch.nn.Module]]:
    """The layers of a CLIP text encoder, by name: one level deeper where transformers adds a projection."""
    inner = getattr(model, "text_model", model)
    level = "" if inner is model else "text_model."
    return [(f"{level}encoder.layers.{i}", layer) for i, layer in enumerate(inner.encoder.layers)]


def modules(state: dict[str, torch.Tensor], component: str, *, family_name: str, scale: float) -> weights.LoraModules:
    """The adapters of one encoder (`adapters.state`), under the names that LoRA files use."""
    by_own_name = peft_bridge.from_peft_state(state, prefix=component, fused={}, scale=scale)
    return {key_names.name_in_files(name, family_name): adapter for name, adapter in by_own_name.items()}


def start(model: Any, component: str, loaded: weights.LoraModules, *, family_name: str, scale: float) -> None:
    """Overwrite the adapters of one encoder with those of a LoRA file. Raises ValueError where they do not fit.

    `loaded`: all modules of the file, by the names that files use.
    """
    state = adapters.state(model)
    own_names = {}  # name in files → name in the model
    for key in state:
        if key.endswith(".lora_A.weight"):
            name = f"{component}.{key.removesuffix('.lora_A.weight')}"
            own_names[key_names.name_in_files(name, family_name)] = name
    own_modules = {}
    for name, adapter in loaded.items():
        if name.partition(".")[0] == component:
            own_modules[own_names.get(name, name)] = adapter
    adapters.load(model, peft_bridge.to_peft_state(own_modules, state, prefix=component, fused={}, scale=scale))
