"""`os.environ` → frozen `Settings`. The only place that reads PARAMS_*; all problems are reported in one message.

Three steps for each variable: whose name is it (`settings.names`), what was meant by its text (`settings.clean`), and
which value is that (`settings.parsers`, by way of environs, which collects what does not convert). An empty value
counts as not set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from environs import Env, EnvValidationError

from entrypoint.settings import clean, names
from entrypoint.settings.checks import Notes, absolute
from entrypoint.settings.parsers import PARSERS, allowed_values
from entrypoint.settings.row import SECRET_KINDS, Row
from entrypoint.settings.variables import ALIASES, CONFIG_JSON, NAMES, ROWS, SECTIONS, Settings, section_rows
from trainer.network import addresses
from trainer.spec.errors import SettingsError
from trainer.spec.values import is_text, show
from trainer.storage.read import read_text

EXAMPLE = "docker run --gpus all -e BASE_MODEL={} -e DATASET_NAME=/data -v /path/of/your/images:/data ..."
_MAX_TOKEN_CHARACTERS = 10_000  # of HF_TOKEN_FILE: a file that is larger holds something else


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings in `environ` (os.environ) and in its CONFIG_JSON.

    Raises SettingsError with a line for each problem: the variable, its value, what is allowed, and what to do.
    """
    notes = Notes()
    written = names.variables(environ, notes)
    for name in NAMES:
        if not is_text(written.get(name, "")):
            notes.add(f"{name}: it is not UTF-8 text. Fix: write it again.")
            written.pop(name)
    _resolve_token(written, notes)
    values, refused = _clean(written, notes)
    _check_tokens(values, environ, notes)
    converted = _convert(values, notes)
    _check_required(values, refused, notes)
    _note_changes(written, values, converted, notes)
    notes.raise_if_any("The settings cannot be used")
    sections = {}
    for section, section_type in SECTIONS.items():
        fields = {field: converted[row.name] for field, row in section_rows(section).items()}
        sections[section] = section_type(**fields)
    return Settings(**sections, given=frozenset(values), reasons=tuple(notes.reasons), warnings=tuple(notes.warnings))


def help_env() -> str:
    """The table of all variables, as Markdown; the README has it too."""
    lines = ["| variable | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for section in SECTIONS:
        lines.append(f"| **{section}** | | | |")
        for row in section_rows(section).values():
            default = f"`{row.default}`" if row.default else row.if_unset
            lines.append(f"| `{row.name}` | {default} | {allowed_values(row)} | {row.meaning} |")
    everything = "any of the variables above in one JSON object; those that are set by themselves win"
    lines.append(f"| `{CONFIG_JSON}` | | a JSON object | {everything} |")
    return "\n".join(lines) + "\n"


def _resolve_token(values: dict[str, str], notes: Notes) -> None:
    """Set HF_TOKEN from the first of its forms: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, the file HF_TOKEN_FILE."""
    file_variable, other_variable = ALIASES
    file = values.pop(file_variable, None)
    token = values.pop(other_variable, None) or ""
    if "HF_TOKEN" in values or not (file or token):
        return
    if not token and file:
        try:
            token = read_text(Path(absolute(file)), limit=_MAX_TOKEN_CHARACTERS).strip()
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or "it is not text"
            notes.add(f"{file_variable}={show(file)} cannot be read: {reason}. Allowed: a file with the token alone.")
            return
    if token:
        values["HF_TOKEN"] = token
    else:
        notes.add(f"{file_variable}={show(file)} is empty. Fix: write the token into it.")


# ---- from text to values


def _clean(written: Mapping[str, str], notes: Notes) -> tuple[dict[str, str], set[str]]:
    """The texts that were meant, without those that stand for no value; and the names of those that are refused."""
    values = {}
    refused = set()
    for name, row in ROWS.items():
        if name not in written:
            continue
        try:
            text = clean.clean(written[name], row)
        except ValueError as problem:
            allowed = f" Allowed: {allowed_values(row)}." if row.kind in clean.NUMBERS else ""
            notes.add(f"{_shown(row, written[name])} {problem}.{allowed}")
            refused.add(name)
            continue
        if text:
            values[name] = text
    return values, refused


def _check_tokens(values: dict[str, str], environ: Mapping[str, str], notes: Notes) -> None:
    """Refuse what cannot be a token of huggingface.co; another host (HF_ENDPOINT) may have others."""
    try:
        endpoint = addresses.hub_endpoint(environ)
    except SettingsError as refused:
        notes.add(str(refused))
        return
    if endpoint != addresses.HUB:
        return
    for name, row in ROWS.items():
        if row.kind == "secret" and name in values and (problem := clean.token_problem(values[name])):
            notes.add(f"{name} {problem}.")
            values.pop(name)


def _check_required(values: Mapping[str, str], refused: set[str], notes: Notes) -> None:
    """Name all that is missing at once. Whether DATASET_NAME is needed beside DATASET_CONFIG, the plan knows."""
    if "BASE_MODEL" in values or "BASE_MODEL" in refused:
        return
    row = ROWS["BASE_MODEL"]
    allowed = allowed_values(row)
    example = EXAMPLE.format(next(iter(row.choices()))) if row.choices else ""
    if values.keys() & {"DATASET_NAME", "DATASET_CONFIG"} or "DATASET_NAME" in refused:
        notes.add(f"BASE_MODEL is not set. Allowed: {allowed}. Fix: set it to one of these.")
    else:
        notes.add(
            f"BASE_MODEL is not set, nor DATASET_NAME, the images. Allowed for BASE_MODEL: {allowed}; for "
            f"DATASET_NAME: a folder, an archive or its URL, or a Hub dataset. For example: {example}"
        )


def _note_changes(
    written: Mapping[str, str], values: Mapping[str, str], converted: Mapping[str, Any], notes: Notes
) -> None:
    """Say which values are used otherwise than they are written."""
    for name, text in written.items():
        row = ROWS.get(name)
        if row is None or name not in values:
            if row is not None and not _is_refused(name, notes):
                notes.chose(name, "not set", f"written as {show(text)}")
            continue
        value = converted[name]
        if row.kind in SECRET_KINDS:
            if values[name] != text:
                notes.chose(name, "***", "without what stood around it")
        elif row.kind == "choice" and value is not None and str(value).lower() != text.lower():
            notes.chose(name, value, f"written as {show(text)}")
        elif row.kind != "choice" and values[name] != text:
            notes.chose(name, values[name], f"written as {show(text)}")


def _is_refused(name: str, notes: Notes) -> bool:
    return any(line.startswith(name) for line in notes.lines)


class _MappingEnv(Env):
    """environs, reading from a mapping instead of os.environ."""

    def __init__(self, values: Mapping[str, str]) -> None:
        super().__init__(eager=False)
        self._texts = values

    def _get_value(self, env_key: str, default: Any) -> Any:
        return self._texts.get(env_key, default)


def _convert(values: Mapping[str, str], notes: Notes) -> dict[str, Any]:
    """The values of all variables by name. Those that do not convert are None, with a line in `notes`."""
    env = _MappingEnv(values)
    for kind, parser in PARSERS.items():
        env.add_parser(f"kiln_{kind}", _for_environs(parser))
    converted = {}
    for name, row in ROWS.items():
        converted[name] = getattr(env, f"kiln_{row.kind}")(name, row.default, row=row)
    try:
        env.seal()
    except EnvValidationError as problem:
        messages: Any = problem.error_messages
        for name, row in ROWS.items():
            for message in messages.get(name, ()):
                notes.add(_describe(row, values[name], message))
    return converted


def _describe(row: Row, text: str, message: str) -> str:
    """One line about a value that did not convert; the value of a secret is left out."""
    default = row.default or row.if_unset
    fix = "correct it"
    if default:
        fix += f", or leave it empty for the default ({default})"
    return f"{_shown(row, text)} {message}. Allowed: {allowed_values(row)}. Fix: {fix}."


def _shown(row: Row, text: str) -> str:
    return row.name if row.kind in SECRET_KINDS else f"{row.name}={show(text)}"


def _for_environs(parser: Callable[[str, Row], Any]) -> Callable[..., Any]:
    """environs hands what it does not know itself to the parser by keyword."""

    def parse(text: str, *, row: Row) -> Any:
        return parser(text, row)

    return parse
