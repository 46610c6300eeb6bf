"""One plan from start to end: wires the parts in order. The encoders are freed before the denoiser loads."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from trainer.base_model.single_file import convert_single_files
from trainer.checkpoints import state_files
from trainer.checkpoints.resume import resumable_state
from trainer.data import encode
from trainer.data.records import Scan
from trainer.engine.attention import flash_attention_4
from trainer.engine.device import limit_memory
from trainer.job import class_images, prepare
from trainer.job.build import adapter_summary, build_training_state, session_of
from trainer.job.class_images import Wanted
from trainer.job.crash_loop import CrashLog
from trainer.job.handover import HandedOver, hand_over, receive
from trainer.job.status import Status
from trainer.job.watchdog import OUTSIDE_STEPS_TIMEOUT_S, Watchdog
from trainer.spec.errors import HangError, KilnError, OutOfMemoryError, StorageError
from trainer.spec.family import base_models, get_family
from trainer.spec.plan import ALIVE_VARIABLE, Dataset, Plan, Prompt, Source
from trainer.storage import atomic
from trainer.storage.locks import locked
from trainer.training import distributed
from trainer.training.distributed import Workers
from trainer.training.objective import scheduler_changes
from trainer.training.stop_flag import StopFlag

log = logging.getLogger(__name__)


def run(plan: Plan, stop: StopFlag) -> None:
    """Do all that `plan` says and return when the final LoRA is in its place.

    Raises the errors of `trainer.spec.errors`; StopRequestedError after a signal, with the state saved.
    """
    out, workers = Path(plan.output.path), distributed.workers_from_environment(plan.engine.num_gpus, os.environ, stop)
    if plan.engine.attention == "flash_4":
        flash_attention_4.import_in_background()
    if not workers.is_first:
        _follow(plan, stop, out, workers=workers)
        return
    watchdog = Watchdog(
        plan.engine.step_timeout_s, alive=Path(os.environ[ALIVE_VARIABLE]) if ALIVE_VARIABLE in os.environ else None
    )
    with locked(out), _log_file(out / "run.log"), _told(Status(out)) as status:
        crashes = CrashLog(out, plan, step=lambda: status.step)
        crashes.check()

        def hung(problem: HangError) -> None:
            status.ended(problem)
            crashes.record(str(problem))

        with watchdog.watching(out, hung), crashes.counted(), _named(out):
            atomic.remove_leftovers(out)
            _whole(plan, stop, out, status=status, watchdog=watchdog, workers=workers)


def _follow(plan: Plan, stop: StopFlag, out: Path, *, workers: Workers) -> None:
    """The job of another process than the first: to train on what that one has prepared.

    It keeps a status of its own, in the folder that goes with the job. Its watchdog is patient: the first process's
    ends the job when any of them stands still.
    """
    watchdog = Watchdog(0.0 if plan.engine.step_timeout_s == 0 else OUTSIDE_STEPS_TIMEOUT_S)
    given = receive(workers, watchdog.heartbeat)
    with _log_file(out / "run.log", f"[process {workers.process_rank}] "), _told(Status(workers.own_folder)) as status:
        crashes = CrashLog(out, plan, step=lambda: status.step)

        def hung(problem: HangError) -> None:
            status.ended(problem)

        with watchdog.watching(workers.own_folder, hung), crashes.counted(), _named(out):
            plan, found = given.plan, Scan(given.images, (), ())
            limit_memory(plan.engine.device, plan.engine.memory_limit_gib)
            order, model = prepare.make_sampler(plan, found), Path(plan.model.path)
            cache = encode.open_cache(Path(plan.output.cache), model, precision=plan.engine.dtype)
            state = state_files.read(given.state) if given.state else None
            ready = prepare.PreparedData(plan, found, order, cache, state)
            _train(ready, stop, workers.own_folder, status=status, watchdog=watchdog, workers=workers)


def _whole(plan: Plan, stop: StopFlag, out: Path, *, status: Status, watchdog: Watchdog, workers: Workers) -> None:
    state = resumable_state(plan, out)
    atomic.write_text(out / "plan.json", plan.to_json())
    limit_memory(plan.engine.device, plan.engine.memory_limit_gib)
    whole = str(convert_single_files(plan.model, Path(plan.output.cache)))
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, path=whole))
    plan = _with_class_pictures(plan, status=status, check_in=lambda: _check_in(watchdog, stop))
    ready = prepare.prepare_data(plan, out, status=status, state=state, check_in=lambda: _check_in(watchdog, stop))
    hand_over(workers, HandedOver(plan, state.folder if state else None, ready.found.images))
    _train(ready, stop, out, status=status, watchdog=watchdog, workers=workers)


def _check_in(watchdog: Watchdog, stop: StopFlag) -> None:
    """Between two pieces of work: all is well, and a stop may be looked for."""
    watchdog.heartbeat()
    stop.check()


def _with_class_pictures(plan: Plan, *, status: Status, check_in: Callable[[], None]) -> Plan:
    """The plan with a folder for each source that the base model draws."""
    kind, model = get_family(plan.model.family), Path(plan.model.path)
    facts, base = kind.FACTS, base_models()[plan.model.base][1]
    common = {"steps": facts.prompt_steps, "guidance": facts.prompt_guidance, "cfg": facts.prompt_cfg, **base.defaults}
    precision, scheduler = plan.engine.precision, scheduler_changes(plan.train)
    drawn: list[tuple[Wanted, Path]] = []

    def with_folder(source: Source, dataset: Dataset) -> Source:
        if source.kind != "generated":
            return source
        width, height = (max(facts.multiple, side // facts.multiple * facts.multiple) for side in dataset.resolution)
        prompt = Prompt(text=source.location, width=width, height=height, seed=plan.train.seed, **common)
        wanted = Wanted(prompt, source.count)
        folder = wanted.folder(Path(plan.output.cache), model, precision=precision, scheduler=scheduler)
        drawn.append((wanted, folder))
        return dataclasses.replace(source, path=str(folder))

    with_folders = plan.map_sources(with_folder)
    if drawn:
        status.phase("drawing class pictures")
        class_images.fill(drawn, family=kind, model=model, engine=plan.engine, scheduler=scheduler, check_in=check_in)
    return with_folders


@contextlib.contextmanager
def _named(out: Path) -> Iterator[None]:
    """What the system refuses, as errors of the job: a trainer uses files and memory, and no network."""
    try:
        yield
    except OSError as problem:
        if problem.errno is None:
            raise
        left = f"; {atomic.free_space(out)} are free" if problem.errno in atomic.VOLUME_ERRORS else ""
        raise StorageError(f"{problem.filename or out}: {problem.strerror}{left}.") from problem
    except torch.OutOfMemoryError as problem:
        raise OutOfMemoryError(f"Out of memory: {str(problem).splitlines()[0]}") from problem


@contextlib.contextmanager
def _told(status: Status) -> Iterator[Status]:
    """status.json and run.log tell how the job ended, whatever ends it."""
    ending: KilnError | None = KilnError("An unexpected error: see run.log.")
    try:
        yield status
        ending = None
    except KilnError as problem:
        log.error("%s", problem)
        problem.logged = True
        ending = problem
        raise
    finally:
        with contextlib.suppress(OSError, StorageError):
            status.ended(ending)


class _Quiet(logging.FileHandler):
    """A full volume is told once, as the job's error, and not by each line that could not be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextlib.contextmanager
def _log_file(path: Path, of: str = "") -> Iterator[None]:
    handler = _Quiet(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {of}%(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def _train(
    ready: prepare.PreparedData, stop: StopFlag, out: Path, *, status: Status, watchdog: Watchdog, workers: Workers
) -> None:
    plan, kind, total = ready.plan, get_family(ready.plan.model.family), ready.total
    status.phase("loading the model")
    started = time.monotonic()
    workers.connect(plan.engine.device)
    training_state = build_training_state(plan, kind, model=Path(plan.model.path), total=total)
    log.info(
        "Loaded the model and put %s on it in %.1f s.", adapter_summary(training_state), time.monotonic() - started
    )
    _check_in(watchdog, stop)
    session = session_of(ready, training_state, out, stop, watchdog=watchdog, workers=workers)
    session.rehearse()
    if ready.state is not None:
        training_state.restore(ready.state.tree)
        log.info("Resumed at step %d of %d.", ready.state.step, total)
    workers.check_same(training_state.optimizer_params)
    session.train(status, first=ready.state.step if ready.state else 0)
    status.update({"output": f"{plan.output.name}.safetensors"})
