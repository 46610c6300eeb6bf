"""The jobs of JOBS, SWEEP and a BASE_MODEL with several names: their product, each with all its variables."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from entrypoint import DEFAULT_OUTPUT_PATH
from entrypoint.dataset_config.documents import read_text
from entrypoint.fetch.doors import buckets
from entrypoint.processes import store
from entrypoint.settings import names, read_settings
from entrypoint.settings.aliases import meant_variable
from entrypoint.settings.checks import Notes
from entrypoint.settings.clean import without_quotes
from entrypoint.settings.variables import CONFIG_JSON, ROWS, SECRETS, section_rows
from entrypoint.system.environment import QUEUED
from entrypoint.system.secrets import known
from trainer.network import addresses
from trainer.spec.errors import SettingsError
from trainer.spec.family import base_models
from trainer.spec.messages.secrets import without_secrets
from trainer.spec.values import nearest, show, some

MOST_JOBS = 1000
# Of the whole queue: a job cannot have its own.
WHOLE = ("JOBS", "SWEEP", "ON_FINISH", "MONITOR_PORT", "MONITOR_TOKEN", "LOG_WITH", "CONFIG_JSON")
SIGNED = "UPLOAD_TO"  # may hold a signature, which no name of a job may show
LIMITS = ("MAX_COST", "MAX_RUNTIME", "PRICE_PER_HOUR")  # beside the jobs: of the whole queue; in a line: of one job
UPLOADS = ("PUSH_TO_HUB", "UPLOAD_TO")
LONGEST_NAME = 100  # characters
MOST_PARTS = 3  # of a name


class QueuedJob(NamedTuple):
    """One job. `place`: where it comes from, for messages. `given`: what sets it apart from the others."""

    name: str
    place: str
    given: Mapping[str, str]
    environ: Mapping[str, str]

    @property
    def out(self) -> Path:
        return Path(self.environ["OUTPUT_PATH"]).expanduser()

    @property
    def digest(self) -> str:
        """Of all that decides the result: a job of the same name with other variables is another one."""
        finish = {row.name for row in section_rows("finish").values()}
        decisive = []
        # As they are meant: a name of another trainer decides as much as ours.
        for name, value in names.variables(self.environ, Notes()).items():
            if name != CONFIG_JSON and name not in finish and name not in SECRETS:
                decisive.append(f"{name}={value}")
        return _digest(sorted(decisive))

    @property
    def uploads(self) -> str:
        """A digest of the places that the results are uploaded to, whose addresses may hold keys; "" without any."""
        meant = names.variables(self.environ, Notes())
        places = [f"{name}={meant[name]}" for name in UPLOADS if name in meant]
        return _digest(places) if places else ""


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def whole_limits(environ: Mapping[str, str]) -> dict[str, str]:
    """The limits of a whole queue, and the price they count by: the common ones, "" where there are none."""
    common = names.variables(environ, Notes())
    return {name: common.get(name, "") for name in LIMITS}


def expand(environ: Mapping[str, str]) -> tuple[QueuedJob, ...]:
    """The jobs, in order; none where the variables are those of one job.

    Raises SettingsError with all problems of all jobs, each with its line, before anything starts; UnreachableError if
    JOBS cannot be read now.
    """
    written = names.variables(environ, Notes())  # what is wrong here, the jobs say
    lists = {name: without_quotes(written.get(name, "")) for name in ("JOBS", "SWEEP")}
    bases = _split(written.get("BASE_MODEL", ""))
    if not any(lists.values()) and len(bases) < 2:
        return ()
    notes = Notes()
    for name, text in lists.items():
        if text and not environ.get(name, "").strip():
            notes.add(f"CONFIG_JSON: {name} makes several jobs of it. Fix: set the variable {name} itself.")
    sweeps = _sweeps(lists["SWEEP"], notes)
    any_base = (bases or list(base_models()))[0]
    _note_problems({**environ, "JOBS": "", "SWEEP": "", "BASE_MODEL": any_base}, notes)
    notes.raise_if_any("The queue cannot be used")  # before an address is asked
    lines = _lines(lists["JOBS"], notes) if lists["JOBS"] else [("", {})]
    notes.raise_if_any("The queue cannot be used")
    labels = _labels([variables for _, variables in lines])
    found: list[tuple[str, str, dict[str, str]]] = []  # name, place, what is given
    for (place, variables), label in zip(lines, labels, strict=True):
        own_bases = _split(variables.get("BASE_MODEL", "")) or bases or [""]
        for base, combination in itertools.product(own_bases, sweeps):
            given = dict(variables)
            parts = [label] if label else []
            if base:
                given["BASE_MODEL"] = base
            if len(own_bases) > 1:
                parts.append(base)
            given |= combination
            parts += [_part(name, value) for name, value in combination.items()]
            said = [place] if place else []
            said += [f"{name}={_shown(value)}" for name, value in combination.items()]
            if len(own_bases) > 1:
                said.append(f"BASE_MODEL={base}")
            found.append(("_".join(parts), ", ".join(said), given))
    if len(found) > MOST_JOBS:
        raise SettingsError(f"JOBS and SWEEP make {len(found):,} jobs. Allowed: {MOST_JOBS:,}. Fix: fewer values.")
    return _checked(found, environ, written)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _lines(value: str, notes: Notes) -> list[tuple[str, dict[str, str]]]:
    """The place and the variables of each line of JOBS that says something."""
    text, _ = read_text(value, "JOBS", notes, default_format="jsonl")
    found = []
    for number, line in enumerate((text or "").splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        place = f"JOBS, line {number}"
        variables = names.from_json(line.strip(), notes, where=place)
        for name in WHOLE:
            if name in variables:
                notes.add(f"{place}: {name} belongs to the whole queue. Fix: set it beside JOBS.")
        found.append((place, variables))
    if text is not None and not found:
        notes.add('JOBS has no job. Fix: a line such as {"DATASET_NAME": "you/photos", "PARAMS_NETWORK_DIM": 16}.')
    return found


def _sweeps(text: str, notes: Notes) -> list[dict[str, str]]:
    """All combinations. Values have commas between them, or | where a value has commas itself."""
    names_and_values: dict[str, list[str]] = {}
    for word in text.split():
        name, equals, values = word.partition("=")
        variable = name if name in ROWS else meant_variable(name, "")
        if not equals or variable is None or variable not in ROWS:
            guess = nearest(name, ROWS)
            fix = f"did you mean {guess}?" if guess and guess != name else "write PARAMS_NETWORK_DIM=8,32."
            notes.add(f"SWEEP: {show(word)} is no variable with values. Fix: {fix}")
        elif variable in (*WHOLE, *SECRETS, SIGNED) or variable.endswith("_PATH"):
            notes.add(f"SWEEP: {variable} is the same for all jobs. Fix: remove it, or use JOBS.")
        else:
            parts = values.split("|") if "|" in values else values.split(",")
            found = [part.strip() for part in parts if part.strip()]
            if not found or len({*found}) < len(found):
                notes.add(f"SWEEP: {show(word)} has no value, or one twice. Fix: correct it.")
            names_and_values[variable] = found
    combinations = itertools.product(*names_and_values.values())
    return [dict(zip(names_and_values, values, strict=True)) for values in combinations]


# ---- names


def _labels(lines: Sequence[Mapping[str, str]]) -> list[str]:
    """A readable name for each line: its OUTPUT_NAME, else what differs between the lines, else its number."""
    if len(lines) == 1 and not lines[0]:
        return [""]
    varying = []
    for name in dict.fromkeys(name for line in lines for name in line):
        is_plain = name not in SECRETS and not name.startswith("OUTPUT_") and name not in ("BASE_MODEL", SIGNED)
        if is_plain and len({line.get(name) for line in lines}) > 1:
            varying.append(name)
    if len({line.get("BASE_MODEL") for line in lines}) > 1:
        varying.insert(0, "BASE_MODEL")
    width = len(str(len(lines)))
    found = []
    for number, line in enumerate(lines, start=1):
        parts = [_part(name, line[name]) for name in varying if name in line]
        is_short = 0 < len(parts) <= MOST_PARTS
        found.append(line.get("OUTPUT_NAME") or ("_".join(parts) if is_short else f"job-{number:0{width}}"))
    return found


def _part(name: str, value: str) -> str:
    """A piece of a name: "network_dim-8"; of what names a model or images, its last word alone."""
    if "://" in value:  # what stands before the host or behind a ? may be a key, and names of jobs become files
        value = addresses.shown(value)
    last = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    if name in ("BASE_MODEL", "DATASET_NAME"):
        return _safe(last)
    return _safe(f"{name.removeprefix('PARAMS_').lower()}-{last}")


def _shown(value: str) -> str:
    return addresses.shown(value) if "://" in value else show(value)


def _safe(text: str) -> str:
    """In characters that OUTPUT_NAME may have."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("._-")[:LONGEST_NAME] or "job"


# ---- all variables of each


def _checked(
    found: Sequence[tuple[str, str, dict[str, str]]], environ: Mapping[str, str], written: Mapping[str, str]
) -> tuple[QueuedJob, ...]:
    """The jobs, each of whose variables can be used. Raises SettingsError with the problems of all of them."""
    jobs: list[QueuedJob] = []
    notes = Notes()
    taken: dict[str, str] = {}
    for label, place, given in found:
        name = next(candidate for candidate in _numbered(label or "job") if candidate not in taken)
        taken[name] = place
        job = QueuedJob(name, place, given, _environment(name, given, environ, written))
        jobs.append(job)
        _note_problems(job.environ, notes, place=place)
    folders: dict[Path, str] = {}
    for job in jobs:
        if job.out in folders:
            notes.add(
                f"{job.place}: OUTPUT_PATH={job.out} is that of {folders[job.out]} too. Fix: one folder for each."
            )
        folders[job.out] = job.place
    _note_shared_uploads(jobs, notes)
    notes.raise_if_any("The queue cannot be used")
    return tuple(jobs)


def _note_shared_uploads(jobs: Sequence[QueuedJob], notes: Notes) -> None:
    """Add the jobs that would replace each other's files in a bucket, or at one signed address."""
    taken: dict[str, str] = {}
    for job in jobs:
        address = without_quotes(job.environ.get("UPLOAD_TO", ""))
        if store.problem_of(address) is not None:  # the job says so
            continue
        place = address.partition("?")[0].rstrip("/")
        if place in taken:
            fix = (
                "UPLOAD_TO=s3://BUCKET/FOLDER gives each job a folder; or a line of JOBS with an own UPLOAD_TO for each"
            )
            notes.add(
                f"{job.place}: UPLOAD_TO={addresses.shown(address)} is that of {taken[place]} too, and one would "
                f"replace the other's files. Fix: {fix}."
            )
        taken[place] = job.place


def _note_problems(environ: Mapping[str, str], notes: Notes, *, place: str = "") -> None:
    """Add what is wrong with the variables of one job, or of all of them."""
    try:
        nodes = read_settings(environ).engine.nodes
        if nodes != 1:
            raise SettingsError(
                f"NODES={nodes or 'auto'}: a queue runs on one machine. Fix: remove NODES, or start this job by itself."
            )
    except SettingsError as problem:
        lines = [line.strip() for line in str(problem).splitlines()]
        problems = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
        for text in problems or [str(problem)]:
            notes.add(f"{place}: {text}" if place else text)


def _numbered(name: str) -> Iterator[str]:
    cut = _safe(name)
    yield cut
    for number in itertools.count(2):
        yield f"{cut}-{number}"


def _environment(
    name: str, given: Mapping[str, str], environ: Mapping[str, str], written: Mapping[str, str]
) -> dict[str, str]:
    """All variables of a job: the common ones, then its own, then what keeps jobs apart."""
    own = {key: value for key, value in environ.items() if key not in ("JOBS", "SWEEP", "MAX_COST", "MAX_RUNTIME")}
    own |= given
    if "OUTPUT_PATH" not in given:
        own["OUTPUT_PATH"] = str(Path(written.get("OUTPUT_PATH", DEFAULT_OUTPUT_PATH)) / name)
    if "OUTPUT_NAME" not in given:
        common = written.get("OUTPUT_NAME", "")
        own["OUTPUT_NAME"] = f"{common}-{name}" if common else name
    if "PUSH_TO_HUB" not in given and written.get("PUSH_TO_HUB"):  # saves and model cards would collide
        own["PUSH_TO_HUB"] = f"{written['PUSH_TO_HUB']}-{name}"
    place = without_quotes(written.get("UPLOAD_TO", ""))
    if "UPLOAD_TO" not in given and buckets.is_one(place):
        own["UPLOAD_TO"] = f"{place.rstrip('/')}/{name}"
    return own | {"ON_FINISH": "exit"}


def describe(jobs: Sequence[QueuedJob]) -> str:
    """For the log."""
    return f"{len(jobs)} jobs: {some([job.name for job in jobs])}."


def tell_queue(environ: Mapping[str, str], message: str) -> None:
    """For a job of a queue that ends before it has a status.json: why, for the queue's record."""
    path = environ.get(QUEUED)
    if path:
        with suppress(OSError):
            Path(path).write_text(without_secrets(known(environ).hide(message)), encoding="utf-8")
