"""The state of every random number generator, to save and to restore."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The global random generators of Python, NumPy and torch."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": json.loads(json.dumps(random.getstate())),
        "numpy": [str(kind), [int(k) for k in keys], position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the global generators back to where `random_state` found them."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
