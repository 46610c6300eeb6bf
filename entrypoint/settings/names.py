"""Which variable is meant by each name in the environment and in CONFIG_JSON.

Our own names are taken as they are. Names of other trainers are taken where they mean the same (`settings.aliases`).
Mistyped names are refused; a name that may be another program's is never refused, and named in a warning at most.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from environs import EnvError

from entrypoint.settings import clean
from entrypoint.settings.aliases import NEAR, PREFIX, find_value, meant_variable, plain
from entrypoint.settings.checks import Notes, edits_apart, one_edit_apart
from entrypoint.settings.parsers import PARSERS
from entrypoint.settings.row import SECRET_KINDS
from entrypoint.settings.variables import CONFIG_JSON, NAMES, ROWS, SECRETS
from trainer.spec.documents.strict_json import load_json, load_json5
from trainer.spec.values import nearest, show

OTHER_PROGRAMS = frozenset({"CCACHE_PATH"})  # variables of other programs that look like a mistyped one of ours
HELP = "python -m entrypoint --help-env lists all variables."
MIN_LENGTH_FOR_TWO_EDITS = 10  # of a name: two wrong letters in a short one make another word (NODE_PATH)
CONFIG_EXAMPLE = '{"PARAMS_SEED": 1, "TRIGGER_WORD": "sks"}'


def variables(environ: Mapping[str, str], notes: Notes) -> dict[str, str]:
    """The text of each of our variables that is set, by environment or CONFIG_JSON; the environment wins.

    Values of names that are not ours are shown only where no secret can be among them.
    """
    texts = {name: value.strip() for name, value in environ.items() if value.strip()}
    found = {name: text for name, text in texts.items() if name in NAMES}
    for name in sorted(texts.keys() - found.keys() - OTHER_PROGRAMS):
        _read_other_name(name, texts[name], found, notes)
    return {**from_json(texts.get(CONFIG_JSON, ""), notes), **found}


# ---- names in the environment


def _read_other_name(name: str, text: str, found: dict[str, str], notes: Notes) -> None:
    """Add what `name` means to `found`, or say what is wrong with it. Names of other programs are left alone."""
    ours = name.upper().startswith(PREFIX)
    # Of single words in capitals, like SEED and RESOLUTION, many belong to other programs.
    specific = ours or name == name.lower() or "_" in name.strip("_")
    meant = meant_variable(name, text)
    if meant and specific:
        _take(name, text, meant, found, notes)
    elif meant:
        _warn_of_single_word(name, text, meant, found, notes)
    elif plain(name) in NEAR and specific:
        advice = NEAR[plain(name)]
        if ours or name == name.lower():
            notes.add(f"{show(name)} {_as_refusal(advice)}.")
        else:  # it may be another program's
            reason = f". {advice}" if advice[:1].isupper() else f": it {advice}"
            notes.warn(f"{name} is not read{reason}.")
    elif problem := _mistyped(name):
        notes.add(problem)
    elif guess := _perhaps_mistyped(name):
        notes.warn(f"{name} is not read. Did you mean {guess}?")


def _as_refusal(advice: str) -> str:
    """The rest of a sentence that begins with the name: some advice is that already, some is a sentence of its own."""
    return f"is not a variable of Kiln. {advice}" if advice[:1].isupper() else advice


def _take(name: str, text: str, meant: str, found: dict[str, str], notes: Notes) -> None:
    """Take `name` for the variable `meant`, unless that has another value already."""
    if meant not in found:
        found[meant] = text
        notes.reasons.append(f"{name}: read as {meant}")
        return
    if found[meant] == text or _same_choice(meant, found[meant], text):
        return
    if meant in SECRETS:
        notes.warn(f"{name} is not read: {meant} is set too.")
    else:
        notes.warn(
            f"{name}={show(text)} is not read: {meant}={show(found[meant])} is set too. Fix: remove one of them."
        )


def _same_choice(variable: str, first: str, second: str) -> bool:
    if variable not in ROWS or ROWS[variable].choices is None:
        return False
    return find_value(variable, first) == find_value(variable, second)


def _warn_of_single_word(name: str, text: str, meant: str, found: Mapping[str, str], notes: Notes) -> None:
    """Warn of SEED=42, say, which may be meant for this job: where the value is one that the variable may have."""
    row = ROWS.get(meant)
    if row is None or meant in found or row.kind in ("text", "path", "name", "repo", "names", "pairs", *SECRET_KINDS):
        return
    try:
        PARSERS[row.kind](clean.clean(text, row), row)
    except (EnvError, ValueError):
        return
    notes.warn(f"{name}={show(text)} is not read, since it may belong to another program. For this job, set {meant}.")


@functools.lru_cache(maxsize=4096)  # each job of a queue has the same environment
def _mistyped(name: str) -> str | None:
    """The problem with PARAMS_* that do not exist, and with names one edit away from one that does.

    Their values are never shown: a mistyped HF_TOKEN holds a token.
    """
    upper = name.upper()
    squeezed = upper.replace("_", "")
    close = [known for known in NAMES if one_edit_apart(upper, known) or squeezed == known.replace("_", "")]
    close += [known for bare, known in _without_prefix().items() if one_edit_apart(upper, bare)]
    if close:
        meant = nearest(upper, close) or close[0]
        return f"{show(name)} is not a variable. Fix: did you mean {meant}? {HELP}"
    if upper.startswith(PREFIX):
        guess = nearest(upper.removeprefix(PREFIX), [known.removeprefix(PREFIX) for known in NAMES])
        fix = f"did you mean {_with_prefix(guess)}?" if guess else "remove it."
        return f"{show(name)} is not a variable. Fix: {fix} {HELP}"
    return None


@functools.lru_cache(maxsize=4096)
def _perhaps_mistyped(name: str) -> str | None:
    """The variable that is two edits away from a longer name."""
    if len(name) < MIN_LENGTH_FOR_TWO_EDITS:
        return None
    upper = name.upper()
    candidates = {known: known for known in NAMES} | {**_without_prefix()}
    for bare, known in candidates.items():
        if upper[0] == bare[0] and edits_apart(upper, bare, limit=2) <= 2:
            return known
    return None


@functools.cache
def _without_prefix() -> Mapping[str, str]:
    """LEARNING_RATE → PARAMS_LEARNING_RATE; without single words, like SEED, which belong to other programs too."""
    bare = {name.removeprefix(PREFIX): name for name in NAMES if name.startswith(PREFIX)}
    return {short: name for short, name in bare.items() if "_" in short}


def _with_prefix(bare: str) -> str:
    return bare if bare in NAMES else f"{PREFIX}{bare}"


# ---- CONFIG_JSON


def from_json(text: str, notes: Notes, *, where: str = CONFIG_JSON) -> dict[str, str]:
    """The variables in CONFIG_JSON, or in the object at `where`, as text.

    Its values are never shown: a token may be among them.
    """
    if not text:
        return {}
    config = _load_config(text, notes, where=where)
    found: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, value in config.items():
        value_text = value if isinstance(value, str) else json.dumps(value)
        if name in ROWS or (name in NAMES and name != CONFIG_JSON):
            if value is not None and value_text.strip():
                found[name] = value_text.strip()
        elif value is not None:
            others[name] = value_text.strip()
        elif meant_variable(name, "") is None:
            others[name] = ""
    for name, value_text in others.items():
        meant = meant_variable(name, value_text)
        if meant and meant != CONFIG_JSON:
            if value_text:
                _take(name, value_text, meant, found, notes)
        elif isinstance(config[name], dict):
            fix = 'write its variables beside the others, as in {"TRIGGER_WORD": "zot", "PARAMS_SEED": 1}.'
            notes.add(f"{where}: {show(name)} holds an object, and no variable has that name. Fix: {fix}")
        elif plain(name) in NEAR:
            notes.add(f"{where}: {show(name)} {_as_refusal(NEAR[plain(name)])}.")
        else:
            guess = nearest(name, NAMES) or nearest(f"{PREFIX}{name}", NAMES)
            fix = f"did you mean {guess}?" if guess else "remove it."
            notes.add(f"{where}: {show(name)} is not a variable. Fix: {fix} {HELP}")
    return found


def _load_config(text: str, notes: Notes, *, where: str) -> dict[str, Any]:
    """The object in CONFIG_JSON, or at `where`; empty, with a problem in `notes`, if it is none."""
    mended = clean.without_quotes(text)
    config = None
    reason = "it is another kind of value"
    try:
        config = load_json(mended)
    except ValueError as problem:
        reason = str(problem)
        config = _load_relaxed(mended, notes, where=where)
    if isinstance(config, dict):
        return config
    allowed = f"Allowed: an object like {CONFIG_EXAMPLE}."
    if clean.is_env_file(mended):
        allowed = (
            f"It has NAME=value lines. Fix: set each variable by itself, or write an object like {CONFIG_EXAMPLE}."
        )
    elif mended.startswith(("/", "./", "~")):
        allowed = f"It is a path. Fix: put the text of that file here, an object like {CONFIG_EXAMPLE}."
    notes.add(f"{where} is not a JSON object: {reason}. {allowed}")
    return {}


def _load_relaxed(text: str, notes: Notes, *, where: str) -> Any:
    """JSON5, also with the backslashes before its quotes that a shell left; None if it is not that either."""
    for candidate in (text, text.replace('\\"', '"')):
        if not candidate.startswith("{"):
            continue
        try:
            config = load_json5(candidate)
        except ValueError:
            continue
        notes.reasons.append(f"{where}: read as JSON5, since it is not strict JSON")
        return config
    return None
