"""A published model of a miniature's size: configs that the family states, tokenizers in an open repository."""

from __future__ import annotations

import json

from bench.original_names import miniature
from trainer.spec.family import BaseModel, Published, Tokenizer

OPEN, GATED = "org/open", "org/gated"


def small_model(name: str) -> BaseModel:
    """For `Facts.models` of the family `name`."""
    source = miniature(name)
    configs = {path.relative_to(source).as_posix(): json.loads(path.read_text()) for path in source.rglob("*.json")}
    tokenizers = {}
    for path in list(configs):
        if path.startswith("tokenizer"):
            config = configs.pop(path)
            if path.endswith("tokenizer_config.json"):
                folder = path.split("/")[0]
                tokenizers[folder] = Tokenizer(f"words of {folder}", f"{OPEN}-{folder}", ("tokenizer.json",), config)
    return BaseModel(GATED, 1.0, gated=True, resolution=128, published=Published(configs, tokenizers, {}))


def vocabularies(name: str) -> dict[str, dict[str, bytes]]:
    """Repository → its files."""
    found = {}
    for folder in miniature(name).glob("tokenizer*"):
        found[f"{OPEN}-{folder.name}"] = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    return found
