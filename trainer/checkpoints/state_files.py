"""Save and restore everything that makes the next step the same step.

A state is a folder `state/step-00000100` with `state.safetensors` (every tensor) and `state.json` (all else, and the
tensors' SHA-256). No pickle. It is written beside its place, flushed and renamed, so a state that is there is whole;
one whose hash is wrong is set aside and the one before is used.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer.spec.errors import StorageError
from trainer.storage import atomic, digests, safetensors_writer

log = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class State:
    """A state read back."""

    step: int
    folder: Path
    tree: dict[str, Any]


def save(folder: Path, step: int, tree: dict[str, Any]) -> Path:
    """Write `tree` (nested dicts and lists of tensors and JSON values) as the state of `step`; return its folder.

    Tensors of the host are not copied: nothing may change them meanwhile.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.{os.getpid()}.tmp"
    tensors: dict[str, torch.Tensor] = {}
    values = _split(tree, tensors)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        record = {"step": step, "sha256": _write(temporary / "state.safetensors", tensors), "tree": values}
        text = json.dumps(record)
        (temporary / "state.json").write_text(json.dumps({"sha256": digests.digest(text), "text": text}))
        for path in (temporary / "state.safetensors", temporary / "state.json", temporary):
            atomic.flush(path)
        back = load_file(temporary / "state.safetensors")
        if back.keys() != tensors.keys() or not all(
            safetensors_writer.same_bits(back[k], v) for k, v in tensors.items()
        ):
            raise StorageError(f"{final} does not read back as it was written.")
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        atomic.flush(folder)
    except (OSError, SafetensorError, StorageError) as problem:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(problem, StorageError):
            raise
        raise StorageError(f"The state of step {step} could not be written to {folder}: {problem}.") from problem
    return final


def latest(folder: Path) -> State | None:
    """The newest whole state, by its step; damaged ones are renamed `….damaged` and said in the log.

    Raises StorageError if there are states and none is whole: starting from nothing is not ours to decide.
    """
    found = sorted((p for p in folder.glob("step-*") if NAME.fullmatch(p.name)), reverse=True)
    for path in found:
        try:
            return read(path)
        except ValueError as problem:
            log.warning("%s is damaged (%s): set aside, the state before it is used.", path, problem)
            path.rename(path.with_name(f"{path.name}.damaged"))
    if found:
        raise StorageError(f"All {len(found)} states in {folder} are damaged. Move it away to start anew.")
    return None


def read(path: Path) -> State:
    """The state in folder `path`. Raises ValueError if it is damaged or not a state."""
    try:
        outer = json.loads((path / "state.json").read_text())
        if digests.digest(outer["text"]) != outer["sha256"]:
            raise ValueError("state.json is not what was written")
        record = json.loads(outer["text"])
        if digests.sha256(path / "state.safetensors") != record["sha256"]:
            raise ValueError("state.safetensors is not what was written")
        tensors = load_file(path / "state.safetensors")
        return State(int(record["step"]), path, _join(record["tree"], tensors))
    except (OSError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as problem:
        raise ValueError(str(problem)) from problem


def prune(folder: Path, keep: int) -> list[int]:
    """Remove all states but the newest `keep`; return the steps that are left. 0 keeps all."""
    found = sorted(p for p in folder.glob("step-*") if NAME.fullmatch(p.name))
    for path in found[:-keep] if keep else []:
        gone = path.with_name(f".{path.name}.old.tmp")
        path.rename(gone)  # at once: a kill leaves no half of a state under its name
        shutil.rmtree(gone)
    for orphan in folder.glob(".step-*.tmp"):
        shutil.rmtree(orphan, ignore_errors=True)
    return [int(p.name[5:]) for p in (found[-keep:] if keep else found)]


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write a file of `tensors`; returns its SHA-256, which another thread computes meanwhile."""
    entries, data = safetensors_writer.layout(tensors)
    pieces: list[bytes | memoryview] = [safetensors_writer.encode_header(entries), *data]
    with ThreadPoolExecutor(1, "hash") as aside:
        digest = aside.submit(safetensors_writer.sha256, pieces)
        with path.open("wb") as file:
            file.writelines(pieces)
        return digest.result()


def _split(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` with every tensor moved into `tensors` and its number in its place."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu()
        return {"tensor": name}
    if isinstance(value, dict):
        # Optimisers key their state by integers, which JSON has not.
        return {"dict": [[k, _split(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_split(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_split(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a state cannot hold {type(value).__name__}")


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(_join(v, tensors) for v in value["tuple"])
        return {k: _join(v, tensors) for k, v in value["dict"]}
    if isinstance(value, list):
        return [_join(v, tensors) for v in value]
    return value
