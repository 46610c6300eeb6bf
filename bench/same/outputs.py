"""What is kept of an output folder: hashes, numbers and lists that JSON can hold.

A recording has two parts. `results` are flat: a name → a value, a list, or an object of values. `words` are lists of
lines. File formats are read here by hand or by the libraries that define them, never by the code of a tree.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from bench.same.normalise import normal_lines, with_places, without

SHOWN = 16  # characters of a SHA-256 that are kept for parts of a file
EVENTS = "events.out.tfevents"  # then the time, the host's name and the process's number
# The part of a state with the global random generators of Python, NumPy and torch. The operating system seeds them, and
# no training step draws from them.
UNSEEDED = "random"
# Measured anew in each run.
CLOCKS = ("started", "job_started", "updated", "images_per_second", "eta_s", "spent")
# Written by the operating system's clock, or where a process was when it was killed.
MEASURED = ("images_per_second", "memory_gib")  # in TensorBoard's files
NOT_READ = ("run.json", "crashes.json", "hang.txt", ".lock")


def read_folder(out: Path, places: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """`results` and `words` of all files below `out`."""
    results: dict[str, Any] = {"files": sorted(_called(path, out) for path in out.rglob("*") if path.is_file())}
    words: dict[str, list[str]] = {}
    for path in sorted(out.rglob("*")):
        name = _called(path, out)
        if not path.is_file() or path.name in NOT_READ:
            continue
        if path.name == "plan.json":
            results[name], words[f"{name}, reasons"] = read_plan(path, places)
        elif path.name == "status.json":
            status = without(json.loads(path.read_text()), CLOCKS)
            words["status.json, message"] = normal_lines(str(status.pop("message", "")), places, timed=True)
            results[name] = status
        elif path.name == "metrics.jsonl":
            results[name] = read_metrics(path.read_text())
        elif path.name == "state.json":
            results |= {
                f"{_called(path.parent, out)}, {what}": value for what, value in read_state(path.parent, places).items()
            }
        elif path.name == "state.safetensors":
            continue  # read with its state.json
        elif path.suffix == ".safetensors":
            results |= {f"{name}, {what}": value for what, value in read_safetensors(path, places).items()}
        elif path.suffix == ".png":
            results[name] = read_png(path, places)
        elif path.name.startswith(EVENTS):
            results.setdefault("tensorboard", {}).update(read_events(path))
        elif path.suffix == ".txt":
            words[name] = normal_lines(path.read_text(), places, timed=False)
    return results, words


def _called(path: Path, out: Path) -> str:
    name = path.relative_to(out).as_posix()
    return name[: name.index(EVENTS) + len(EVENTS)] if EVENTS in name else name


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested objects and lists → {"data.datasets[0].resolution[1]": 128}. Empty ones stay, as [] and {}."""
    found: dict[str, Any] = {}
    if isinstance(value, dict) and value:
        for key, item in value.items():
            found |= flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            found |= flat(item, f"{name}[{index}]")
    else:
        found[name] = value
    return found


def read_plan(path: Path, places: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a plan.json, with folders as their labels; and the reasons, which are words."""
    plan = json.loads(with_places(path.read_text(), places))
    reasons = [str(reason) for reason in plan.pop("reasons", [])]
    return flat(plan), normal_lines("\n".join(reasons), places, timed=False)


def read_metrics(text: str) -> dict[str, Any]:
    """The numbers of metrics.jsonl by step; a step has a line, and another one where it was validated."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        row = json.loads(line)
        for varying in ("time", "images_per_second", "memory_gib"):
            row.pop(varying, None)
        step = row.pop("step", None)
        found |= {f"step {step}, {name}": value for name, value in row.items()}
    return found


def read_state(folder: Path, places: Mapping[str, str]) -> dict[str, Any]:
    """A digest for each part of a state's tree (plan, data, optimiser …) and its tensors; and whether its seals hold.

    state.json has the text of another JSON document and its SHA-256; that one has the SHA-256 of the tensors' file.
    """
    outer = json.loads((folder / "state.json").read_text())
    record = json.loads(outer["text"])
    file = read_safetensors(folder / "state.safetensors", places)
    seals = {
        "of state.json": digest(outer["text"], 64) == outer["sha256"],
        "of state.safetensors": file["bytes"] == record["sha256"],
    }
    tree: dict[str, Any] = dict(json.loads(with_places(outer["text"], places))["tree"]["dict"])
    unseeded = tree.pop(UNSEEDED, None)
    parts = {str(name): digest(json.dumps(value)) for name, value in tree.items()}
    tensors = file["tensors"]
    for name in tensor_names(unseeded):
        tensors[name] = tensors[name].rpartition(" ")[0]  # its type and shape, without the digest
    return {
        "parts": {"step": record["step"], UNSEEDED: unseeded is not None, **parts},
        "tensors": tensors,
        "seals": seals,
    }


def tensor_names(value: Any) -> list[str]:
    """The tensors that a part of a state's tree names, each as {"tensor": "60"}."""
    if isinstance(value, dict) and isinstance(value.get("tensor"), str):
        return [value["tensor"]]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [name for item in items for name in tensor_names(item)]


def read_safetensors(path: Path, places: Mapping[str, str]) -> dict[str, Any]:
    """Bytes, tensors, metadata, and the order of both in the header."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(with_places(data[8 : 8 + size].decode(), places))
    metadata = header.get("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, end = entry["data_offsets"]
            content = data[8 + size + first : 8 + size + end]
            tensors[name] = f"{entry['dtype']} {entry['shape']} {digest(content)}"
    return {
        "bytes": digest(data, 64),
        "tensors": tensors,
        "metadata": metadata,
        "order of the header": [*metadata, *header],
    }


def read_png(path: Path, places: Mapping[str, str]) -> dict[str, Any]:
    """Pixels and texts of an image."""
    with Image.open(path) as image:
        texts = {f"text {key}": with_places(str(value), places) for key, value in getattr(image, "text", {}).items()}
        return {"pixels": digest(image.tobytes()), "size": f"{image.width}x{image.height} {image.mode}", **texts}


def read_events(path: Path) -> dict[str, float]:
    """TensorBoard's scalars, without what is measured: it differs from run to run."""
    return {f"step {step}, {tag}": value for tag, step, value in _scalars(path) if tag not in MEASURED}


def _scalars(path: Path) -> Iterator[tuple[str, int, float]]:
    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            yield value.tag, event.step, value.simple_value


def digest(content: str | bytes, length: int = SHOWN) -> str:
    """The first characters of the SHA-256 of a text or of bytes."""
    data = content if isinstance(content, bytes) else content.encode()
    return hashlib.sha256(data).hexdigest()[:length]


def read_help(text: str) -> dict[str, Any]:
    """The table of `--help-env`: names in their order, defaults that are values, and choices.

    Defaults and ranges in words ("the base model's own") are compared as lines only.
    """
    names: list[str] = []
    found: dict[str, Any] = {"names": names}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) < 4 or not cells[0].startswith("`"):
            continue
        name = cells[0].strip("`")
        names.append(name)
        if cells[1].startswith("`"):
            found[f"{name}, default"] = cells[1]
        choices = cells[2].split(", ")
        if len(choices) > 1 and not any(" " in choice for choice in choices):
            found[f"{name}, choices"] = choices
    return found
