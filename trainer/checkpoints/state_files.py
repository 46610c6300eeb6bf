"""A state on disk: save and restore everything that makes the next step the same step.

A state is a folder `state/step-00000100` with two files and no pickle:
- `state.safetensors` has every tensor, by its number;
- `state.json` is `{"sha256": …, "text": …}`; the text is the JSON of step, SHA-256 of the other file, and the tree, in
  which `{"tensor": "7"}` stands for a tensor. JSON has neither tuples nor integer keys, so these are written as
  `{"tuple": [...]}` and `{"dict": [[key, value], ...]}`.

The folder is written under a temporary name, flushed, read back and renamed, so that a state under its own name is
complete. One whose hash is wrong (a failing disk) is set aside, and the one before it is used. Where a user has put
files into the folder of a state, its two files are removed and the others stay.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from trainer.spec.errors import StorageError
from trainer.storage import atomic, digests, json_files, safetensors_writer
from trainer.storage.read import read_text
from trainer.storage.run_records import STATE_FILES, state_folders

log = logging.getLogger(__name__)
TENSORS_FILE, JSON_FILE = STATE_FILES
# A state that is being written, and one that is being removed.
UNFINISHED = re.compile(r"\.step-[0-9]{8}\.kiln\.(tmp|old)")
LARGEST_JSON = 1 << 30  # bytes of state.json: digests of some millions of images


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
    temporary = folder / f".step-{step:08d}.kiln.tmp"
    tensors: dict[str, torch.Tensor] = {}
    values = _split(tree, tensors)
    try:
        _make_room(temporary)
        temporary.mkdir(parents=True)
        record = {"step": step, "sha256": _write_tensors(temporary / TENSORS_FILE, tensors), "tree": values}
        text = json.dumps(record)
        (temporary / JSON_FILE).write_text(json.dumps({"sha256": digests.digest(text), "text": text}))
        # Before the rename: otherwise, after a power loss, the name may be there without the contents.
        for path in (temporary / TENSORS_FILE, temporary / JSON_FILE, temporary):
            atomic.flush(path)
        if not _reads_back(temporary / TENSORS_FILE, tensors):
            raise StorageError(f"{final} does not read back as it was written.")
        _make_room(final)
        temporary.rename(final)
        atomic.flush(folder)
    except (OSError, SafetensorError, StorageError) as problem:
        _remove(temporary)
        if isinstance(problem, StorageError):
            raise
        raise StorageError(f"The state of step {step} could not be written to {folder}: {problem}.") from problem
    return final


def latest(folder: Path) -> State | None:
    """The newest undamaged state, by its step; damaged ones are renamed to `….damaged`, and the log says so.

    Raises StorageError if there are states and all are damaged: to start from nothing is the user's decision. Then they
    keep their names, so that the next start says the same.
    """
    damaged: dict[Path, ValueError] = {}
    for path in sorted(state_folders(folder), reverse=True):
        try:
            state = read(path)
        except ValueError as problem:
            damaged[path] = problem
            continue
        for other, reason in damaged.items():
            log.warning("%s is damaged (%s). It was renamed, and the state before it is used.", other, reason)
            _rename_damaged(other)
        return state
    if damaged:
        raise StorageError(
            f"All {len(damaged)} states in {folder} are damaged. Move the folder away to start from the beginning."
        )
    return None


def read(path: Path) -> State:
    """The state in folder `path`. Raises ValueError if it is damaged or not a state."""
    try:
        outer = json.loads(read_text(path / JSON_FILE, limit=LARGEST_JSON))
        if digests.digest(outer["text"]) != outer["sha256"]:
            raise ValueError("state.json is not what was written")
        record = json.loads(outer["text"])
        if digests.sha256(path / TENSORS_FILE) != record["sha256"]:
            raise ValueError("state.safetensors is not what was written")
        tensors = load_file(path / TENSORS_FILE)  # a regular file, since its digest was read
        return State(int(record["step"]), path, _join(record["tree"], tensors))
    except (OSError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as problem:
        raise ValueError(str(problem)) from problem


def prune(folder: Path, keep: int, *, own: Collection[str]) -> list[str]:
    """Remove all but the newest `keep` of the states whose names are in `own`, and what a killed save or removal left.

    Returns the names of those that were removed. 0 keeps all.
    """
    states = sorted(path for path in state_folders(folder) if path.name in own)
    outdated = states[:-keep] if keep else []
    for path in outdated:
        doomed = path.with_name(f".{path.name}.kiln.old")
        _make_room(doomed)
        with contextlib.suppress(OSError):
            # At once, so that a kill leaves no half of a state under its name. A user's files would go along.
            if {entry.name for entry in path.iterdir()} <= {*STATE_FILES}:
                path.rename(doomed)
                path = doomed
        _remove(path)
    remove_unfinished(folder)
    return [path.name for path in outdated]


def remove_unfinished(folder: Path) -> None:
    """Remove what a save or removal that was killed left."""
    with contextlib.suppress(OSError):  # there is no such folder yet
        for path in list(folder.iterdir()):
            if UNFINISHED.fullmatch(path.name):
                _remove(path)


def remove_damaged(folder: Path, *, own: Collection[str]) -> None:
    """Remove the damaged states that were renamed of those whose names are in `own`."""
    for name in own:
        _remove(folder / f"{name}.damaged")


def _remove(path: Path) -> None:
    """Remove the files of a state, and its folder if nothing else is in it."""
    for name in reversed(STATE_FILES):  # state.json first: without it, it is none
        with contextlib.suppress(OSError):
            (path / name).unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


def _make_room(path: Path) -> None:
    """Free the name of a folder that is about to be made; what is not ours there is set aside. Raises StorageError."""
    if os.path.lexists(path):
        if not path.is_symlink():
            _remove(path)
        json_files.set_aside_unless(path, lambda _: False, "has files that Kiln did not write")


def _rename_damaged(path: Path) -> None:
    number = 1
    aside = path.with_name(f"{path.name}.damaged")
    while os.path.lexists(aside):
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(aside)


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
