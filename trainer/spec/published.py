"""What a published base model's repository holds besides its weights, written down: configs, and where tokenizers are.

With these, a job whose weights are local files needs no repository of the model, which may be gated. Tokenizers are
megabytes of vocabulary, so they come from the open repositories of the text encoders' authors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer's vocabulary in an open repository, and the config that goes with it."""

    name: str  # for messages
    repository: str  # of the Hub; neither gated nor private
    files: tuple[str, ...]
    config: Config  # tokenizer_config.json, in which base models differ


@dataclass(frozen=True)
class Published:
    """A model's folder in diffusers' layout, without weights."""

    configs: dict[str, Config]  # file in the folder → its JSON
    tokenizers: dict[str, Tokenizer]  # subfolder → what is in it
    # Tensors that tell this model's denoiser from its family's others: original name → shape, or None if it has none.
    marks: dict[str, tuple[int, ...] | None]


@dataclass(frozen=True)
class Lookalike:
    """A model that is none of a family's, though its denoiser has the family's names."""

    what: str  # for messages
    tensor: str  # that it has, by its original name or by diffusers'
    shape: tuple[int | None, ...] | None = None  # of that tensor; None: any
