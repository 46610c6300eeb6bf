"""Text → a tree, in the forms that people write: JSON, JSON with comments (JSON5), YAML and TOML.

The same values come out of all of them. A tree has dictionaries with text keys, lists, texts, numbers, booleans and
null only, and nothing in it is absurdly large or deep.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from trainer.spec.documents.strict_json import RefusedJsonError, load_json, load_json5
from trainer.spec.values import Problems, show

if TYPE_CHECKING:
    import yaml

FORMAT_BY_SUFFIX = {
    **dict.fromkeys((".json", ".json5", ".jsonc"), "json"),
    **dict.fromkeys((".yaml", ".yml"), "yaml"),
    ".toml": "toml",
}
MAX_BYTES = 2**20  # of dataset.json or prompts.txt, which people write by hand: a larger file is another one
MAX_DEPTH = 32
MAX_TEXT = 16_384  # characters
BACKSLASH_PATH = re.compile(r"""["']?([A-Za-z]:\\\w|\\\\\w)[^"'\n]*["']?""")
# A backslash that begins no escape. An even number of them before it are escaped ones.
BAD_ESCAPE = re.compile(r"""(?<!\\)(?:\\\\)*\\([^"'\\/bfnrtu0\n]|u(?![0-9a-fA-F]{4}))""")


class BackslashError(ValueError):
    """A path of Windows whose backslashes the form reads as something else."""


def parse(text: str, text_format: str) -> tuple[Any, str | None]:
    """The tree, and a note if the text is not of `text_format` as it stands. Raises ValueError with the reason."""
    if not text.strip():
        raise ValueError("it is empty")
    readers: dict[str, Callable[[str], Any]] = {"json": load_json, "yaml": _load_yaml, "toml": _load_toml}
    note = None
    try:
        tree = readers[text_format](text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as problem:
        tree, note = _otherwise(text, text_format, problem)
    _check(tree)
    return _whole_letters(tree), note


def _otherwise(text: str, text_format: str, problem: ValueError) -> tuple[Any, str]:
    """The tree of a text that is not what its name says, if it is one of the other forms without doubt."""
    if BAD_ESCAPE.search(text) and (path := BACKSLASH_PATH.search(text)):
        quotes = ", or put it in single quotes" if text_format == "toml" else ""
        line = text.count("\n", 0, path.start()) + 1
        raise BackslashError(
            f"line {line}: {path[0].strip()[:200]} has backslashes, which begin an escape here. "
            f"Fix: write / instead{quotes}, and mount the folder where Kiln runs"
        ) from problem
    reason = ValueError(f"it is not {text_format.upper()}: {problem}")
    if isinstance(problem, RefusedJsonError):
        raise reason from problem
    if text_format == "json" and text.lstrip().startswith(("{", "[", "/")) and not _is_toml(text):
        return _load_json5(text, reason), "read as JSON5: it has comments, trailing commas or names without quotes"
    for other, read in (("toml", _load_toml), ("yaml", _load_yaml)):
        try:
            tree = read(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(tree, dict) and tree.keys() & {"datasets", "general", "prompt", "prompts"}:
            return tree, f"read as {other.upper()}, because it is not {text_format.upper()}"
    raise reason from problem


def _is_toml(text: str) -> bool:
    """`[general]` and `[[datasets]]` begin like a list of JSON."""
    return re.match(r"\s*\[\[?[\w.]+\]\]?\s*(#.*)?\n", text) is not None


def _load_json5(text: str, reason: ValueError) -> Any:
    """The tree of JSON5. Raises `reason`, why it is not JSON, where it is not JSON5 either."""
    if BAD_ESCAPE.search(text):
        raise reason
    try:
        return load_json5(text)
    except RefusedJsonError:
        raise
    except ValueError as problem:
        raise reason from problem


def _load_toml(text: str) -> Any:
    try:
        return tomllib.loads(text)
    except ValueError as problem:
        if "Cannot overwrite a value" in str(problem) or "Cannot declare" in str(problem):
            raise RefusedJsonError(f"a key is given twice ({problem})") from problem
        raise


# ---- YAML


def _load_yaml(text: str) -> Any:
    """YAML with the values of JSON alone: `no` and `2024-01-01` are texts, and nothing refers to anything else."""
    import yaml

    if "\t" in text:
        for number, line in enumerate(text.split("\n"), 1):
            if line[: len(line) - len(line.lstrip())].count("\t"):
                raise ValueError(f"line {number} begins with a tab. Fix: use spaces")
    try:
        return _yaml_loader()(text).get_single_data()
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark else ""
        reason = getattr(problem, "problem", None) or getattr(problem, "reason", None) or "it cannot be read"
        raise ValueError(f"{reason}{place}") from problem


def _yaml_loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Texts, numbers, true, false and null, as the core schema of YAML 1.2 has them."""

        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as the base class has it)

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                line = self.peek_event().start_mark.line + 1
                raise ValueError(f"line {line}: references (*name) are not read. Fix: write the values out")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ARG002 (as in the base)
            seen = set()
            for key, _ in node.value:
                if not isinstance(key.value, str):
                    raise ValueError(f"line {key.start_mark.line + 1}: a key is not text")
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise RefusedJsonError(f"line {line}: the key {show(key.value)} is given twice")
                seen.add(key.value)
            return dict(super().construct_mapping(node, deep=True))

    number = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    forms = {
        "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
        "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", "-+0123456789"),
        "tag:yaml.org,2002:float": (number, "-+0123456789."),
    }
    for tag, (pattern, first) in forms.items():
        Loader.add_implicit_resolver(tag, re.compile(rf"^(?:{pattern})$"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _yaml_float(loader.construct_scalar(node)))
    return Loader


def _yaml_float(text: str) -> float:
    return float(text.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").replace(".nan", "nan"))


# ---- what no dataset needs


def _check(tree: Any) -> None:
    """Raises ValueError that names the place of what is too deep, too long, or no value of JSON."""
    for place, value in _walk(tree):
        if place.count("\0") > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        where = place.replace("\0", "") or "it"
        if isinstance(value, str) and len(value) > MAX_TEXT:
            raise ValueError(f"{where[:80]} is a text of {len(value):,} characters. Allowed: up to {MAX_TEXT:,}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where[:80]}: {value} is not a number that can be used")
        if not isinstance(value, dict | list | str | int | float | bool | None):
            raise ValueError(f"{where[:80]}: {show(str(value))} is a date or a time. Fix: put it in quotes")


def _walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every value with its place; a zero byte marks each level."""
    waiting: list[tuple[str, Any]] = [("", tree)]
    while waiting:
        place, value = waiting.pop()
        yield place, value
        if place.count("\0") > MAX_DEPTH + 1:
            continue
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"{place.replace(chr(0), '') or 'it'}: the key {show(key)} is not text")
                waiting.append((f"{place}\0{'.' if place else ''}{key}", inner))
        elif isinstance(value, list):
            waiting.extend((f"{place}\0[{index}]", inner) for index, inner in enumerate(value))


def _whole_letters(tree: Any) -> Any:
    """The tree with letters that were escaped as two halves (JSON's `\\ud83d\\ude00`) put together."""
    if isinstance(tree, dict):
        return {_whole_letters(key): _whole_letters(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_whole_letters(value) for value in tree]
    if isinstance(tree, str):
        return tree.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return tree


def format_of(name: str, default: str) -> str:
    """The form of a file by its name's suffix: json, yaml, toml, or `default`."""
    return FORMAT_BY_SUFFIX.get(PurePath(name).suffix.lower(), default)


def decode(data: bytes) -> str:
    """UTF-8, or the UTF-16 that Windows' editors write. Raises UnicodeDecodeError."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    if data[1:2] == b"\0" and data[:1] != b"\0":  # without a mark: every other byte of ASCII text is zero
        return data.decode("utf-16-le")
    return data.decode("utf-8-sig")


def parse_text(text: str, *, text_format: str, origin: str, problems: Problems, notes: list[str] | None = None) -> Any:
    """The tree of a text; None, with a line in `problems`, if it is none. `notes` gets how it was read otherwise."""
    try:
        tree, note = parse(text, text_format)
    except BackslashError as problem:
        problems.add(f"{origin}, {problem}.")
    except ValueError as problem:
        problems.add(f"{origin}: {problem}.")
    else:
        if note and notes is not None:
            notes.append(f"{origin}: {note}")
        return tree
    return None
