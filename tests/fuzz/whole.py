"""Whole runs in this process: `--check`, a scan, a downloaded dataset, the start of a job in an odd output folder.

The input is a case of `tests.fuzz.draw` as JSON; any other bytes are the seed of one.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from entrypoint import __main__ as entrypoint
from entrypoint import job
from entrypoint.dataset_config import manifest
from entrypoint.fetch.http import RetryPolicy
from entrypoint.fetch.hub_dataset import hub_rows
from entrypoint.planning import summary
from entrypoint.settings.variables import NAMES
from entrypoint.system.machine import Machine
from tests.fuzz import draw, sandbox
from tests.fuzz.draw import Case
from trainer.data import report, scan
from trainer.spec.errors import KilnError, StopRequestedError
from trainer.spec.plan import DataPlan, Dataset, Plan, Source, Subset

CPU_S = 5.0
CODES = (0, 64, 65, 74, 75, 77, 78)  # docs/troubleshooting.md
STARTED = 0  # the exit code of a trainer that has read all that it starts with
NO_RETRIES = RetryPolicy(budget=0.0)
PLACES = ("out", "cache", "hf")  # in the sandbox, where a job may write


class UnexpectedError(AssertionError):
    """What must not happen."""


def root() -> Path:
    """The sandbox of this process."""
    return _root(os.getpid())


@functools.cache
def _root(_process: int) -> Path:
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="kiln-fuzz-", dir=shm if shm.is_dir() else None))


def known_variables() -> tuple[str, ...]:
    return tuple(sorted(NAMES))


def known_keys() -> tuple[str, ...]:
    return tuple(sorted({*manifest.DATASET_KEYS, *manifest.SHARED_KEYS, *manifest.OWN_KEYS}))


def case_of(data: bytes, drawn: Callable[[random.Random], Case]) -> Case:
    """The case that `data` is, or that it is the seed of."""
    try:
        case = json.loads(data)
        if isinstance(case, dict) and isinstance(case.get("files"), dict):
            return case
    except (ValueError, RecursionError):
        pass
    return drawn(random.Random(data))


def drawn_check(rng: random.Random) -> Case:
    return draw.check_case(rng, known_variables(), known_keys())


def drawn_scan(rng: random.Random) -> Case:
    return draw.scan_case(rng, known_keys())


def drawn_output(rng: random.Random) -> Case:
    return draw.output_case(rng, finished())


def as_json(drawn: Callable[[random.Random], Case]) -> Callable[[bytes], bytes]:
    """How an input is kept in the corpus: as its case, which stays the same when `draw` changes."""
    return lambda data: json.dumps(case_of(data, drawn), indent=1).encode()


# ---- the runs


def check(data: bytes) -> None:
    """`python -m entrypoint --check`. It writes nothing but unpacked archives, where the job finds them."""
    case = case_of(data, drawn_check)
    _prepare(case)
    _run(lambda: _entrypoint(case, launch=None), places=("cache/datasets",))


def start(data: bytes) -> None:
    """The start of a job in an output folder that has odd files: of the entrypoint, then of the trainer."""
    case = case_of(data, drawn_output)
    import trainer.job.run  # noqa: F401  (before the time counts)

    _prepare(case)
    _run(lambda: _entrypoint(case, launch=None), places=())
    _run(lambda: _entrypoint({**case, "arguments": []}, launch=_trainer_start), places=PLACES)


def scan_folder(data: bytes) -> None:
    """A scan and its two reports."""
    case = case_of(data, drawn_scan)
    _prepare(case)
    subset = {}
    for key, value in case.get("subset", {}).items():
        subset[key] = value.replace("{S}", str(root())) if isinstance(value, str) else value
    location = str(root() / "data")
    plan = DataPlan(
        (Dataset((Subset(Source("folder", location, path=location), **subset),), (64, 64)),), case["strict"]
    )

    def scanned() -> int:
        result = scan.scan(plan, cpu_workers=0)
        print(result.report())
        report.write_report(result, result.data, text=root() / "out" / "dataset-report.txt", seed=1)
        printed = (root() / "out" / "dataset-report.txt").read_text(encoding="utf-8")
        assert all(image.name for image in result.images) and printed.startswith("Images: ")
        result.check(strict=plan.strict)
        return 0

    _run(lambda: _code_of(scanned), places=PLACES)


def hub(data: bytes) -> None:
    """What a downloaded dataset becomes."""
    case = case_of(data, draw.hub_case)
    _prepare(case)
    (root() / "repo").mkdir(exist_ok=True)
    asked = hub_rows.Asked("DATASET_NAME", case["split"], case["subset"])
    target = root() / "cache" / "rows"
    target.mkdir(parents=True)

    def written() -> int:
        facts = hub_rows.write_dataset(root() / "repo", target, asked, scratch=str(root() / "hf"))
        for note in facts["notes"]:
            logging.getLogger().warning("%s", note)
        return 0

    _run(lambda: _code_of(written), places=PLACES)


def model(data: bytes) -> None:
    """A model's folder, by all that reads it before and in a job."""
    from tests.fuzz import models  # it imports torch and the libraries, before the time counts

    case = case_of(data, models.model_case)
    models.quiet()
    sandbox.emptied(root())
    (root() / "cwd").mkdir()
    (root() / "tmp").mkdir()
    models.prepare(case, root() / "model", sandbox.make)
    _run(lambda: _code_of(lambda: models.read_all(case, root() / "model", root() / "cache")), places=PLACES)


def as_model_case(data: bytes) -> bytes:
    from tests.fuzz import models

    return as_json(models.model_case)(data)


# ---- how they run


def _prepare(case: Case) -> None:
    sandbox.emptied(root())
    sandbox.make(root(), case["files"])
    (root() / "cwd").mkdir()
    (root() / "tmp").mkdir()
    (root() / "out").mkdir(exist_ok=True)


def _run(run: Callable[[], int], *, places: Sequence[str]) -> None:
    """Raises UnexpectedError for another exit code than those documented, odd words, or files outside."""
    before = sandbox.state_of(root())
    _machine()  # before the time counts
    variables = {"PATH": "/usr/bin:/bin", "HOME": str(root() / "home"), "TMPDIR": str(root() / "tmp")}
    with (
        sandbox.listening() as heard,
        sandbox.without_network(),
        sandbox.environment(variables, root() / "cwd"),
        sandbox.bounded(CPU_S),
    ):
        code = run()
    faults = heard.faults()
    if code not in CODES and not _is_crash_loop(code, heard):
        faults.append(f"exit code {code}: {' / '.join(heard.messages)[-1500:]}")
    changed = []
    after = sandbox.state_of(root())
    own = tuple(f"{root()}/{name}/" for name in places)
    above = {str(folder) for name in places for folder in (root() / name).parents}
    for path, _ in before.items() ^ after.items():
        is_made_for_them = path in above and path not in before
        if not f"{path}/".startswith(own) and not is_made_for_them:
            changed.append(path)
    if changed:
        faults.append(f"files were changed: {changed[:5]}")
    if faults:
        raise UnexpectedError("; ".join(faults))


def _is_crash_loop(code: int, heard: sandbox.Heard) -> bool:
    return code == 70 and any(message.startswith("This job has failed") for message in heard.messages)


def _code_of(run: Callable[[], int]) -> int:
    """What a command makes of the errors."""
    try:
        return run()
    except KilnError as problem:
        logging.getLogger().error("%s", problem)
        return problem.exit_code


def _entrypoint(case: Case, *, launch: Callable[..., int] | None) -> int:
    for name, value in case["env"].items():
        text = str(value).replace("{S}", str(root())).replace("\0", "")
        if name.replace("\0", "").replace("=", "") == name and name:
            os.environ[name] = text.encode("utf-8", "surrogateescape" if _is_escaped(text) else "replace").decode(
                "utf-8", "surrogateescape"
            )
    with (
        mock.patch.object(summary, "cpu_workers", lambda: 0),  # no other processes
        mock.patch.object(entrypoint, "Machine", _machine),
        mock.patch.object(job, "CHECK_RETRIES_S", 0.0),
        mock.patch.object(job.http, "USUAL", NO_RETRIES),
        mock.patch.object(job, "Trainers", functools.partial(_Trainers, launch)),
    ):
        return entrypoint.main([str(argument).replace("\0", "") for argument in case["arguments"]])


@functools.cache
def _machine() -> Machine:
    """One for all runs: the tool of a GPU's driver and the import of torch take a hundred times as long as the rest."""
    machine = Machine()
    if machine.hardware.vendor != "cpu":
        _ = machine.kernels
    return machine


def _is_escaped(text: str) -> bool:
    """Whether an environment can hold `text`: bytes that are no UTF-8 are there as surrogates of one kind."""
    return re.search("[\ud800-\udc7f\udd00-\udfff]", text) is None


class _Trainers:
    """In place of the processes: `launch` does their work; None: a check, which has none."""

    stopped = False

    def __init__(
        self, launch: Callable[[Plan], int] | None, _plan: Plan, *, environment: Mapping[str, str], nodes: object
    ) -> None:
        if launch is None:
            raise UnexpectedError("A check began to train.")
        self.run = launch

    def __enter__(self) -> _Trainers:
        return self

    def __exit__(self, *_problem: object) -> None:
        pass


def _trainer_start(plan: Plan) -> int:
    """The trainer, up to where it would encode."""
    from trainer import __main__ as trainer
    from trainer.job import prepare, run

    def started(*_arguments: Any, **_named: Any) -> None:
        raise StopRequestedError("Started.", exit_code=STARTED)

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "plan.json"
        place.write_text(plan.to_json(), encoding="utf-8")
        with (
            mock.patch.object(trainer, "faulthandler"),  # it wants a real file as stderr
            mock.patch.object(run, "prepare_data", started),
            mock.patch.object(prepare, "cpu_workers", lambda: 0),
        ):
            return trainer.main([str(place)])


@functools.cache
def finished() -> dict[str, str]:
    """The small files that a run of three steps leaves, but for its weights. {S} stands for the sandbox."""
    data = {"data/good.png": {"kind": "image", "width": 64, "height": 64, "format": "PNG", "colour": 7}}
    case = {"env": {**draw.ENGINE, **draw.PLACES, "OUTPUT_NAME": "test"}, "arguments": [], "files": data}
    import trainer.job.run  # noqa: F401  (before the time counts)

    _prepare(case)
    _run(lambda: _entrypoint(case, launch=_trainer_start), places=PLACES)
    out = root() / "out"
    files = {}
    for name in ("plan.json", "run.json", "status.json", "run.log", "dataset-report.txt"):
        files[name] = (out / name).read_text(encoding="utf-8").replace(str(root()), "{S}")
    record = json.loads(files["run.json"])
    files["run.json"] = json.dumps({**record, "done": True, "total": 3, "finished": [3], "files": ["test.safetensors"]})
    files["metrics.jsonl"] = "".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in (1, 2, 3))
    files["crashes.json"] = json.dumps({"plan": "x", "step": 2, "count": 1, "reason": "numbers"})
    files["upload.json"] = json.dumps({"repo": "owner/name", "files": {"test.safetensors": [1, 2]}})
    files["pod.json"] = json.dumps({"attempts": 1, "step": 0, "done": False, "run": "test"})
    return files


def end() -> None:
    sandbox.emptied(root())
    root().rmdir()
    _root.cache_clear()
