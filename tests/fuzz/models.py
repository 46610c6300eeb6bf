"""A miniature's folder with something changed in its configs, tokenizers and headers, and all that reads it.

A case is {"family", "files"}: name → its new content, as `tests.fuzz.draw` writes contents, or null for a file that is
gone. The other files are those of the miniature.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from tests.fuzz import draw
from tests.fuzz.draw import Case
from tests.support.miniatures import base
from trainer.base_model import loading, model_folder
from trainer.base_model.light_tokenizer import LightTokenizer
from trainer.base_model.single_file import convert_single_files
from trainer.spec.errors import SettingsError
from trainer.spec.family import family_names, get_family
from trainer.spec.plan import ModelPlan

TEXTS = ("a cat", "", "word " * 400, "猫の写真 \x8c", "</s> <|endoftext|> <pad>", "x" * 3000, "\u202e\u0301\ud7ff")
NUMBERS = (0, -1, 1, 2, 3, 7, 64, 10**6, 2**31, 2**63, 10**12, 10**400, 1.5, 1e308, float("nan"), float("inf"), True)
ODD = (None, "", "x", [], {}, [[]], ["code", "Evil"], [1] * 300, {"a": 1}, "\x1b[31m", "\ud800", "(a+)+$", "9" * 5000)


# ---- drawing


@cache
def miniature(family: str) -> dict[str, bytes]:
    folder = Path(get_family(family).FACTS.models[base(family)].source)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def model_case(rng: random.Random) -> Case:
    family = rng.choice(family_names())
    own = miniature(family)
    files: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice(sorted(own))
        if name.endswith(".safetensors") and rng.random() < 0.5:
            name = rng.choice(sorted(name for name in own if not name.endswith(".safetensors")))
        files[name] = _changed_file(rng, name, own)
    if rng.random() < 0.15:
        files |= _more_files(rng, sorted(own))
    return {"family": family, "files": files}


def _changed_file(rng: random.Random, name: str, own: dict[str, bytes]) -> Any:
    data = own[name]
    kind = rng.randrange(12)
    if kind == 0:
        return None if rng.random() < 0.3 else draw.odd_file(rng)
    if name.endswith(".safetensors"):
        return {"kind": "header", "of": name, "changes": _header_changes(rng, data)}
    if kind == 1 or not name.endswith(".json"):
        at = rng.randrange(len(data))
        noise = rng.choice((b"", b"\x00", b"\xff", b"}", b'"', b"9" * 500, b"[" * 3000))
        return (data[:at] + noise + data[at + rng.choice((0, 1, 1, 40)) :]).decode("latin-1")
    tree = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        tree = _changed(rng, tree)
    return json.dumps(tree)


def _changed(rng: random.Random, value: Any) -> Any:
    """`value` with something in it replaced, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {name: inner for name, inner in value.items() if name != key}
        if rng.random() < 0.1:
            return {**value, rng.choice((*sorted(value), "auto_map", "quantization_config", "x")): _odd(rng)}
        return {**value, key: _changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return [*value[:at], *value[at + 1 :]]
        return [*value[:at], _changed(rng, value[at]), *value[at + rng.choice((0, 1)) :]]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 2, 100)) if rng.random() < 0.5 else value * rng.choice((2, -1, 1000))
    if isinstance(value, str) and value and rng.random() < 0.4:
        return value + rng.choice(("x", "Fast", "\x00", " "))
    return _odd(rng)


def _odd(rng: random.Random) -> Any:
    return rng.choice((rng.choice(NUMBERS), rng.choice(ODD), draw.value_of(rng)))


def _header_changes(rng: random.Random, data: bytes) -> list[Any]:
    """Steps that `content` makes of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    names = sorted(header)
    steps: list[Any] = []
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.randrange(8)
        name = rng.choice(names)
        key = rng.choice(("dtype", "shape", "data_offsets"))
        odd_type = rng.choice(
            ("F16", "F32", "F64", "BF16", "I8", "F8_E4M3", "F4", "BOOL", "C64", "X", "F8_E8M0", "I64")
        )
        if kind == 0:
            steps.append(["length", rng.choice((0, 1, 7, length - 1, length + 1, 2**40, 2**63))])
        elif kind == 1:
            steps.append(["cut", rng.randrange(len(data))])
        elif kind == 2:
            steps.append(["byte", rng.randrange(8 + length), rng.randrange(256)])
        elif kind == 3:
            steps.append(["rename", name, rng.choice((*names, "x", "\x1b[31m", "y" * 3000))])
        elif kind == 4:
            steps.append(["drop", name])
        elif kind == 5:
            steps.append(["set", name, "dtype", odd_type])
        elif kind == 6:
            steps.append(["set", name, key, _changed(rng, header[name].get(key, []))])
        else:
            steps.append(["nan", rng.randrange(8 + length, len(data))])
    return steps


def _more_files(rng: random.Random, names: list[str]) -> dict[str, Any]:
    """An index of shards, tokens beside a tokenizer, copies in 16 bits, code."""
    weights = [name for name in names if name.endswith(".safetensors")]
    name = rng.choice(weights)
    own = name.rpartition("/")[2]
    table = {f"t{i}": rng.choice((own, "../x.safetensors", "no.safetensors", 7, f"./{own}")) for i in range(2)}
    index = rng.choice(
        ({"weight_map": table}, {"metadata": {}, "weight_map": table}, {"metadata": {"total_size": -1}}, [])
    )
    return rng.choice(
        (
            {f"{name}.index.json": json.dumps(index)},
            {f"{name}.index.json": draw.odd_file(rng)},
            {"tokenizer/special_tokens_map.json": json.dumps(rng.choice(({"pad_token": _odd(rng)}, _odd(rng))))},
            {"tokenizer/added_tokens.json": json.dumps(rng.choice(({"x": _odd(rng)}, _odd(rng))))},
            {
                "tokenizer/vocab.json": json.dumps(_odd(rng)),
                "tokenizer/merges.txt": "a b c",
                "tokenizer/tokenizer.json": None,
            },
            {name.replace(".safetensors", ".fp16.safetensors"): "x", "vae/evil.py": "x", "tokenizer/x.jinja": "{{"},
            {"tokenizer_2/config.json": json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}})},
        )
    )


# ---- making


def content(own: dict[str, bytes], drawn: Any) -> bytes:
    """The bytes of a changed file of weights."""
    data = bytearray(own[drawn["of"]])
    for step, *values in drawn["changes"]:
        length = min(struct.unpack("<Q", data[:8].ljust(8, b"\0"))[0], max(0, len(data) - 8))
        if step == "cut":
            del data[values[0] :]
        elif step == "length" and len(data) >= 8:
            data[:8] = struct.pack("<Q", values[0])
        elif step == "byte" and data:
            data[values[0] % len(data)] = values[1]
        elif step == "nan" and len(data) > 8:
            data[values[0] % len(data)] = 0x7F
        else:
            data = _with_header(data, length, step, values)
    return bytes(data)


def _with_header(data: bytearray, length: int, step: str, values: list[Any]) -> bytearray:
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
    except ValueError:
        return data
    name = values[0]
    if name in header and step == "rename":
        header[values[1]] = header.pop(name)
    elif name in header and step == "drop":
        del header[name]
    elif name in header and step == "set":
        header[name][values[1]] = values[2]
    text = json.dumps(header).encode()
    return bytearray(struct.pack("<Q", len(text)) + text + data[8 + length :])


def prepare(case: Case, folder: Path, make: Callable[[Path, dict[str, Any]], None]) -> None:
    """The model's folder. `make`: of the other kinds of contents."""
    own = miniature(case["family"])
    for name, data in own.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name not in case["files"]:
            (folder / name).write_bytes(data)
    others = {}
    for name, drawn in case["files"].items():
        if isinstance(drawn, dict) and drawn.get("kind") == "header":
            (folder / name).write_bytes(content(own, drawn))
        elif drawn is not None:
            others[name] = drawn
    make(folder, others)


# ---- reading


@cache
def quiet() -> None:
    """As in a job, where the libraries are silenced before they are imported."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()


def read_all(case: Case, folder: Path, converted: Path) -> int:
    """As the entrypoint reads a model's folder, then as the trainer does, which shall not rely on the first.

    Of the trainer's readers those of the parts that changed: a miniature takes a second to load.
    """
    name = case["family"]
    family = get_family(name)
    facts = family.FACTS
    plan = ModelPlan(base(name), name, str(folder), path=str(folder))
    problems: list[SettingsError] = []

    def attempt(read: Callable[[], object]) -> None:
        try:
            read()
        except SettingsError as problem:
            problems.append(problem)

    attempt(lambda: model_folder.check_kind("MODEL_PATH=x", folder, plan))
    attempt(lambda: model_folder.check_folder("MODEL_PATH=x", folder, facts.files, facts))
    changed = {file.partition("/")[0] for file in case["files"]}
    for part in sorted(changed & facts.text_readers.keys()):
        attempt(partial(_count_tokens, folder / part))
    attempt(lambda: convert_single_files(plan, converted))
    fine = not problems
    if any(part.startswith("t") and part != "transformer" for part in changed):
        attempt(lambda: _encode(family, folder, changed, whole=fine))
    if "vae" in changed:
        attempt(lambda: family.load_vae(folder, device="cpu"))
    if facts.parts["denoiser"] in changed:
        attempt(lambda: family.load_denoiser(folder, device="cpu", dtype=torch.float32))
    if "scheduler" in changed:
        attempt(lambda: _scheduler(facts, folder))
    if problems:
        raise problems[0]
    return 0


def _count_tokens(folder: Path) -> None:
    files = [folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).is_file()]
    try:
        tokenizer = LightTokenizer(files)
    except ValueError as problem:
        raise SettingsError(str(problem)) from problem
    for text in TEXTS:
        tokenizer.encode(text)


def _encode(family: Any, folder: Path, changed: set[str], *, whole: bool) -> None:
    """Encode texts, if the folder seems to be `whole`; else load the text encoders that changed."""
    if whole:
        encoders = family.load_encoders(folder, device="cpu", dtype=torch.float32)
        family.encode_text(encoders, list(TEXTS[:2]))
        return
    for part in sorted(changed & family.FACTS.kinds.keys()):
        if part.startswith("tokenizer"):
            loading.load_tokenizer(folder / part, family.FACTS.kinds[part])
        elif part.startswith("text_encoder"):
            loading.load_model(family.FACTS.kinds[part], folder / part, device="cpu", dtype=torch.float32)


def _scheduler(facts: Any, folder: Path) -> None:
    """The model's schedule for four steps."""
    import diffusers

    names = {"flow": "FlowMatchEulerDiscreteScheduler", "denoising": "EulerDiscreteScheduler"}
    kind = facts.kinds["scheduler"]
    made = loading.load_scheduler(getattr(diffusers, names[facts.objective]), folder / "scheduler", kind)
    shift = {"mu": 1.0} if made.config.get("use_dynamic_shifting") else {}
    made.set_timesteps(4, **shift)
    if facts.objective == "denoising":
        loading.load_scheduler(diffusers.DDPMScheduler, folder / "scheduler", kind)
