"""A state on disk: save and restore everything that makes the next step the same step.

A state is a folder `state/step-00000100` with two files and no pickle:
- `state.safetensors` has every tensor, by its number;
- `state.json` is `{"sha256": …, "text": …}`; the text is the JSON of step, SHA-256 of the other file, and the tree, in
  which `{"tensor": "7"}` stands for a tensor. JSON has neither tuples nor integer keys, so these are written as
  `{"tuple": [...]}` and `{"dict": [[key, value], ...]}`.

The folder is written under a temporary name, flushed, read back and renamed, so that a state under its own name is
complete. One whose hash is wrong (a failing disk) is set aside, and the one before it is used.
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
FOLDER_NAME = re.compile(r"step-(\d{8})")
TENSORS_FILE = "state.safetensors"
JSON_FILE = "state.json"


@dataclass(frozen=True)
class State:
    """A state read back."""

    step: int
    folder: Path
    tree: dict[str, Any]


def save(folder: Path, step: int, tree: dict[str, Any]) -> Path:
    """Write `tree` (nested dicts and lists of tensors and JSON values) as the state of `step`; return its folder.

    Tensors in the host's memory are not copied: nothing may change them meanwhile. Raises StorageError where it cannot
    be written or does not read back, and leaves nothing of it.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.{os.getpid()}.tmp"
    tensors: dict[str, torch.Tensor] = {}
    values = _split(tree, tensors)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        record = {"step": step, "sha256": _write_tensors(temporary / TENSORS_FILE, tensors), "tree": values}
        text = json.dumps(record)
        (temporary / JSON_FILE).write_text(json.dumps({"sha256": digests.digest(text), "text": text}))
        # Before the rename: otherwise, after a power loss, the name may be there without the contents.
        for path in (temporary / TENSORS_FILE, temporary / JSON_FILE, temporary):
            atomic.flush(path)
        if not _reads_back(temporary / TENSORS_FILE, tensors):
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
    """The newest undamaged state, by its step; damaged ones are renamed to `….damaged`, and the log says so.

    Raises StorageError if there are states and all are damaged: to start from nothing is the user's decision.
    """
    paths = sorted(_state_folders(folder), reverse=True)
    for path in paths:
        try:
            return read(path)
        except ValueError as problem:
            log.warning("%s is damaged (%s). It was renamed, and the state before it is used.", path, problem)
            path.rename(path.with_name(f"{path.name}.damaged"))
    if paths:
        raise StorageError(
            f"All {len(paths)} states in {folder} are damaged. Move the folder away to start from the beginning."
        )
    return None


def read(path: Path) -> State:
    """The state in folder `path`. Raises ValueError if it is damaged or not a state."""
    try:
        outer = json.loads((path / JSON_FILE).read_text())
        if digests.digest(outer["text"]) != outer["sha256"]:
            raise ValueError("state.json is not what was written")
        record = json.loads(outer["text"])
        if digests.sha256(path / TENSORS_FILE) != record["sha256"]:
            raise ValueError("state.safetensors is not what was written")
        tensors = load_file(path / TENSORS_FILE)
        return State(int(record["step"]), path, _join(record["tree"], tensors))
    except (OSError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as problem:
        raise ValueError(str(problem)) from problem


def prune(folder: Path, keep: int) -> list[int]:
    """Remove all states but the newest `keep`; return the steps that are left. 0 keeps all."""
    kept = sorted(_state_folders(folder))
    outdated: list[Path] = []
    if keep:
        outdated = kept[:-keep]
        kept = kept[-keep:]
    for path in outdated:
        doomed = path.with_name(f".{path.name}.old.tmp")
        path.rename(doomed)  # at once: a kill leaves no half of a state under its name
        shutil.rmtree(doomed)
    for orphan in folder.glob(".step-*.tmp"):
        shutil.rmtree(orphan, ignore_errors=True)
    return [int(path.name.removeprefix("step-")) for path in kept]


def _state_folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if FOLDER_NAME.fullmatch(path.name)]


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write a safetensors file; returns its SHA-256, which another thread computes meanwhile."""
    entries, data = safetensors_writer.layout(tensors)
    pieces: list[bytes | memoryview] = [safetensors_writer.encode_header(entries), *data]
    with ThreadPoolExecutor(1, "hash") as hasher:
        digest = hasher.submit(safetensors_writer.sha256, pieces)
        with path.open("wb") as file:
            file.writelines(pieces)
        return digest.result()


def _reads_back(path: Path, tensors: dict[str, torch.Tensor]) -> bool:
    back = load_file(path)
    if back.keys() != tensors.keys():
        return False
    return all(safetensors_writer.same_bits(back[name], tensor) for name, tensor in tensors.items())


def _split(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON; every tensor goes into `tensors`, and its number into its place."""
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
    """The inverse of `_split`."""
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(_join(v, tensors) for v in value["tuple"])
        return {k: _join(v, tensors) for k, v in value["dict"]}
    if isinstance(value, list):
        return [_join(v, tensors) for v in value]
    return value
