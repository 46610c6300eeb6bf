"""The state of every global random number generator, to save and to restore.

Steps seed a generator of their own (`gradients.seeded`) and need none of these; libraries may.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of the global generators of Python, NumPy and torch, as JSON values and tensors."""
    generator, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": json.loads(json.dumps(random.getstate())),
        "numpy": [str(generator), [int(k) for k in keys], position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the global generators from what `random_state` returned."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    generator, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((generator, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
