"""Weights that are no numbers are found while they are loaded, and named, before images or settings are blamed.

`torch.aminmax` reads a tensor once and makes nothing of its size; a NaN in a tensor becomes its result. The 24 GB of
the largest denoiser take some 10 ms at the memory speed of a GPU, and 4 s on one core of a CPU (5.6 GB/s).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from trainer.spec.errors import SettingsError
from trainer.spec.values import some
from trainer.storage import safetensors_header

log = logging.getLogger(__name__)
NAMED_ZEROS = 3  # weights that are all zero and that the log names
FIX = "Nothing can be trained on such weights. Fix: download or convert the file again, or take another file"
Named = Iterable[tuple[str, torch.Tensor]]


class NotFiniteError(ValueError):
    """A weight has NaN or infinite values."""


def extremes(tensor: torch.Tensor) -> torch.Tensor:
    """The smallest and the largest value, (2,) in float32, on the tensor's device; NaN if there is one in it."""
    return torch.stack(torch.aminmax(tensor)).float()


def problem(name: str, low: float, high: float, dtype: torch.dtype) -> str | None:
    """What is wrong with a weight whose values lie between `low` and `high`."""
    if math.isnan(low) or math.isnan(high):
        return f"{name} has values that are not numbers (NaN)"
    if math.isinf(low) or math.isinf(high):
        return f"{name} has infinite values, or values too large for {str(dtype).removeprefix('torch.')}"
    return None


def check_tensor(name: str, tensor: torch.Tensor) -> None:
    """Raises NotFiniteError for a weight with NaN or infinite values."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = extremes(tensor).tolist()
        if found := problem(name, low, high, tensor.dtype):
            raise NotFiniteError(found)


def check_weights(named: Named, folder: Path | None) -> None:
    """Check weights that are loaded, with one wait for their device. `folder`: of their files, for messages.

    Raises SettingsError with the first that is not finite. Warns of matrices that are all zero.
    """
    weights = [(name, tensor) for name, tensor in named if tensor.is_floating_point() and tensor.numel()]
    weights = [(name, tensor) for name, tensor in weights if not tensor.is_meta]
    if not weights:
        return
    values = torch.stack([extremes(tensor).to(weights[0][1].device) for _, tensor in weights]).tolist()
    zeros = []
    for (name, tensor), (low, high) in zip(weights, values, strict=True):
        if found := problem(name, low, high, tensor.dtype):
            raise SettingsError(f"{_file_of(name, folder)}: {found}. {FIX}.")
        if low == high == 0 and tensor.ndim > 1:
            zeros.append(name)
    if zeros:
        listed = some(zeros, most=NAMED_ZEROS)
        log.warning("%s: all zero, as if not trained: %s.", _file_of(zeros[0], folder), listed)


def _file_of(name: str, folder: Path | None) -> str:
    """The file in `folder` that has the weight `name`; the folder, if none has it."""
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        try:
            entries = safetensors_header.read_header(file).entries
        except ValueError:
            continue
        if name in entries or f"text_model.{name}" in entries or name.removeprefix("text_model.") in entries:
            return str(file)
    return str(folder or "The base model")
