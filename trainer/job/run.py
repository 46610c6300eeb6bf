"""One plan from start to end: wires the parts in order.

The steps of a run, in order:
1. Lock the output folder, so that no second job writes there; open run.log and status.json; refuse a crash loop.
2. Bring single files into a model folder (`base_model.single_file`), and draw missing class images.
3. Scan the images. Settings and images together say which run of the folder this is, or that it is a new one
   (`storage.choose_run`): open it and write its plan.json (`checkpoints.open_run`). Before that, a model captions the
   images that have no caption, where CAPTION_WITH asks for it (`captioning`).
4. Find the state to resume from: the newest of the run; else the folder that PARAMS_RESUME_FROM names. A LoRA file
   there gives the weights alone (step 7).
5. Hand the images and the plan to the other processes (`handover`; `several_nodes` for those of other machines). A run
   that has all its steps already ends here.
6. Encode into the cache (`prepare`), each process its share. The encoders are freed before the denoiser loads.
7. Load the denoiser, put adapters on it, make the optimiser (`build`).
8. Rehearse: memory runs out here or never (`rehearsal`).
9. Restore the state, if there is one.
10. Train, save, sample; export and verify the final LoRA (`session`).
Other processes than the first begin at 5, and do the rest in step with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.base_model.single_file import convert_single_files
from trainer.checkpoints import state_files
from trainer.checkpoints.open_run import OpenRun, adopt_older_run, remove_leftovers
from trainer.checkpoints.resume import resumable_state, total_steps
from trainer.data.identity import fingerprint
from trainer.data.records import Scan
from trainer.engine.attention import flash_attention_4
from trainer.engine.device import release, set_up
from trainer.job import several_nodes
from trainer.job.build import (
    adapter_summary,
    build_training_state,
    check_targets,
    make_session,
    with_reachable_shards,
)
from trainer.job.class_images import draw_class_images
from trainer.job.crash_loop import CrashLog
from trainer.job.handover import HandedOver, hand_over, receive
from trainer.job.prepare import PreparedData, cache_of, find_run, is_over, prepare_data
from trainer.job.reporting.status import Status
from trainer.job.rolling.rolling_cache import RollingCache, fill, make_sampler
from trainer.job.watchdog import OUTSIDE_STEPS_TIMEOUT_S, Watchdog
from trainer.process import memory_kills, streams
from trainer.spec.errors import HangError, KilnError, OutOfMemoryError, StopRequestedError, StorageError
from trainer.spec.family import get_family
from trainer.spec.log_lines import LineFormatter
from trainer.spec.optimizers import STRETCHED_SCHEDULERS
from trainer.spec.plan import Plan
from trainer.spec.rules.resume_rules import changes
from trainer.storage import atomic, json_files, own_files
from trainer.storage.choose_run import HOW_TO_GO_ON, already_trained, asked_length
from trainer.storage.locks import locked
from trainer.storage.run_records import RunRecord
from trainer.training import distributed, optimizers
from trainer.training.distributed import Workers
from trainer.training.state import TrainingState
from trainer.training.stop_flag import StopFlag

log = logging.getLogger(__name__)


def run(plan: Plan, stop: StopFlag) -> None:
    """Do all that `plan` says, and return when the final LoRA is in its place.

    Raises the errors of `trainer.spec.errors`; StopRequestedError after a signal, with the state saved.
    """
    workers = distributed.workers_from_environment(
        plan.engine.processes, os.environ, stop, per_node=plan.engine.num_gpus
    )
    if plan.engine.attention == "flash_4":
        flash_attention_4.import_in_background()
    if workers.is_first:
        _run_first(plan, stop, workers)
    else:
        _run_other(plan, stop, workers)


def _run_first(plan: Plan, stop: StopFlag, workers: Workers) -> None:
    """The whole job: of one process, or of the first of several."""
    out = Path(plan.output.path)
    watchdog = Watchdog(plan.engine.step_timeout_s, shared=stop.vitals)
    was_cut_short = cut_short(json_files.read_object(out / "status.json") or {})
    with (
        locked(out),
        _log_file(out / "run.log") as log_file,
        _printed_once(plan.printed, log_file),
        _report_ending(Status(out)) as status,
    ):
        own_files.set_aside_foreign(out, own_files.OF_JOB)
        if was_cut_short:
            log.warning("%s", was_cut_short)
        for problem in streams.problems():
            log.warning("%s", problem)
        _record_decisions(plan, log_file)
        crashes = CrashLog(out, plan, step=lambda: status.step)
        crashes.check()

        def on_hang(problem: HangError) -> None:
            status.ended(problem)
            crashes.record(str(problem))

        with watchdog.watching(out, on_hang), crashes.counted(), _as_job_errors(out):
            remove_leftovers(out)
            adopt_older_run(out)
            opened, data = _prepare(plan, stop, status=status, watchdog=watchdog)
            if is_over(opened, data):
                _report_over(opened, data, status)
                return
            hand_over(workers, several_nodes.to_hand_over(data))
            status.phase("encoding")
            first = data.state.step if data.state else 0
            rolling = _encode(data, workers, first=first, check_in=partial(_check_in, watchdog, stop))
            several_nodes.give_state(workers, data.state)
            _train(opened, data, stop, status=status, watchdog=watchdog, workers=workers, rolling=rolling)


def cut_short(status: Mapping[str, Any]) -> str:
    """What to say of an earlier start that has not written how it ended; "" where it has. `status`: its status.json."""
    phase = status.get("phase")
    if not isinstance(phase, str) or "exit_code" in status:
        return ""
    step = f", after step {status['step']}" if isinstance(status.get("step"), int) else ""
    return (
        f"The start before this one ended without a word in the phase '{phase}'{step}: it was killed, or its machine "
        "went away. Most often a container was killed because its memory ran out (exit code 137). If it comes again: "
        f"{memory_kills.FIX.removeprefix('Fix: ')}"
    )


def _run_other(plan: Plan, stop: StopFlag, workers: Workers) -> None:
    """The job of a process other than the first: train on what that one has prepared.

    It keeps a status of its own, in the folder that the processes share. Its watchdog only guards against a wait
    without end: if any process hangs, the first one's watchdog ends the job.
    """
    # Only the first machine writes into OUTPUT_PATH.
    out = workers.own_folder if workers.node else Path(plan.output.path)
    out.mkdir(parents=True, exist_ok=True)
    watchdog = Watchdog(0.0 if plan.engine.step_timeout_s == 0 else OUTSIDE_STEPS_TIMEOUT_S)
    handed = receive(workers, watchdog.heartbeat)
    log_file = _log_file(out / "run.log", f"[process {workers.process_rank}] ")
    with log_file, _report_ending(Status(workers.own_folder)) as status:
        crashes = CrashLog(out, plan, step=lambda: status.step)
        with watchdog.watching(workers.own_folder, status.ended), crashes.counted(), _as_job_errors(out):
            own = workers.own_folder
            workers.meet(handed.plan.engine.device, watchdog.heartbeat)
            handed = several_nodes.on_this_node(plan, handed, workers, status=status, check_in=watchdog.heartbeat)
            data = _received(handed)
            first = 0
            if data.plan.output.window_bytes and handed.state is not None:
                first = state_files.read(handed.state).step
            check_in = watchdog.heartbeat
            rolling = _encode(data, workers, first=first, with_first=handed.shares_cache, check_in=check_in)
            data = dataclasses.replace(data, state=several_nodes.take_state(workers, handed))
            opened = OpenRun(data.plan, own, own, RunRecord(own), was_done=False)
            _train(opened, data, stop, status=status, watchdog=watchdog, workers=workers, rolling=rolling)


def _prepare(plan: Plan, stop: StopFlag, *, status: Status, watchdog: Watchdog) -> tuple[OpenRun, PreparedData]:
    """Steps 2 to 5: the run, and everything that training needs but the denoiser."""

    def check_in() -> None:
        _check_in(watchdog, stop)

    set_up(plan.engine)
    model_folder = str(convert_single_files(plan.model, Path(plan.output.cache)))
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, path=model_folder))
    check_targets(plan)
    plan = draw_class_images(plan, status=status, check_in=check_in)
    opened, scanned = find_run(plan, status=status, check_in=check_in)
    output = opened.plan.output
    status.update({"run": output.name, "run_folder": output.folder or "."})
    state = resumable_state(opened.plan, opened.home, fingerprint(scanned.images))
    if state is not None:
        status.step = state.step
        status.update({"step": state.step, "saved_step": state.step})
    return opened, prepare_data(opened, scanned, state=state)


def _received(handed: HandedOver) -> PreparedData:
    """What the first process has prepared, in this one."""
    plan = handed.plan
    set_up(plan.engine)
    scanned = Scan(handed.images, (), ())
    return PreparedData(plan, scanned, make_sampler(plan, scanned), cache_of(plan), None)


def _encode(
    data: PreparedData, workers: Workers, *, first: int, with_first: bool = True, check_in: Callable[[], None]
) -> RollingCache | None:
    """Each process encodes its share of what the cache lacks; returns when all have.

    Where the cache holds one window at a time, it is that of the step after `first`, and what brings the next ones is
    returned. `with_first`: whether this machine's cache is the first one's.
    """
    plan = data.plan
    workers.meet(plan.engine.device, check_in)
    workers.wait_for_all(check_in)  # another machine may have to read its images first
    share = workers.share_cache(with_first)
    if plan.output.window_bytes:
        rolling = RollingCache(
            plan, data.sampler, data.cache, workers, data.steps_per_epoch, data.total, check_in, share
        )
        rolling.bring(min(first, data.total - 1))
        return rolling
    fill(plan, data.sampler, data.cache, check_in=check_in, share=share)
    workers.wait_for_all(check_in)
    data.cache.refresh()  # with what the others have written
    return None


def _train(
    opened: OpenRun,
    data: PreparedData,
    stop: StopFlag,
    *,
    status: Status,
    watchdog: Watchdog,
    workers: Workers,
    rolling: RollingCache | None,
) -> None:
    """Steps 7 to 10."""
    status.phase("loading the model")
    started = time.monotonic()
    workers.connect(data.plan.engine.device)
    plan, peers = with_reachable_shards(data.plan, workers)
    data = dataclasses.replace(data, plan=plan)
    family = get_family(plan.model.family)
    training_state = build_training_state(plan, family, model=Path(plan.model.path), total=data.total, peers=peers)
    log.info("Loaded the model and added %s in %.1f s.", adapter_summary(training_state), time.monotonic() - started)
    _check_in(watchdog, stop)
    first = data.state.step if data.state else 0
    session = make_session(opened, data, training_state, stop, watchdog=watchdog, workers=workers, rolling=rolling)
    if plan.engine.device == "cuda":
        release()
        gc.freeze()  # the model stays: Python need not look through its million objects again and again
    session.rehearse(first)
    if data.state is not None:
        _restore(opened.plan, data, data.state, training_state)
    workers.check_same(training_state.optimizer_params)
    if workers.is_first:
        opened.record.update({"done": False, "total": data.total})
    final = session.train(status, first=first)
    if final is not None:
        if rolling is not None:
            rolling.close()
        finished = sorted({*opened.record.finished, data.total})
        opened.record.update({"done": True, "finished": finished, "asked": asked_length(opened.plan)})
        status.update({"output": final.name})


def _restore(plan: Plan, data: PreparedData, state: state_files.State, training_state: TrainingState) -> None:
    """Put the state back; where the run is to end elsewhere, or has other settings, the next step follows them."""
    begun = total_steps(state, steps_per_epoch=data.steps_per_epoch)
    essence = {**state.tree["essence"], "lora.resume_from": plan.lora.resume_from}
    changed = changes(essence, plan).settings
    training_state.restore(state.tree, renew=begun != data.total or bool(changed))
    log.info("Resumed at step %d of %d.", state.step, data.total)
    for text in changed:
        log.warning("From here on: %s.", text)
    if begun == data.total:
        return
    scheduler = plan.optim.scheduler
    text = f"The run was to end at step {begun} and now ends at step {data.total}: optimiser, averages and the order "
    text += "of the images go on as they are."
    if scheduler in STRETCHED_SCHEDULERS:
        text += f" The {scheduler} schedule is stretched to the new end, so the learning rate is now "
        text += f"{optimizers.step_size(training_state.optimizer):.3g}. Its warm-up stays."
    log.info("%s", text)


def _report_over(opened: OpenRun, data: PreparedData, status: Status) -> None:
    """Log that there is nothing to train, and where the LoRA is."""
    name = data.plan.output.name
    final = f"{name}.safetensors"
    trained = opened.trained(data.state.step if data.state else 0)
    if trained <= data.total:
        opened.record.update({"asked": asked_length(opened.plan)})
        log.info("This job is done: %s. %s", opened.out / final, HOW_TO_GO_ON)
    else:
        log.info("%s", already_trained(opened.out, name, trained=trained, wanted=data.total))
        save = f"{name}-step{data.total:08d}.safetensors"
        final = save if (opened.out / save).is_file() else final
    status.step = trained
    status.update({"output": final})


def _check_in(watchdog: Watchdog, stop: StopFlag) -> None:
    """Between two pieces of work: a sign of life, and the place for a stop."""
    watchdog.heartbeat()
    stop.check()


@contextlib.contextmanager
def _as_job_errors(out: Path) -> Iterator[None]:
    """Inside, OSError becomes StorageError, and torch's out-of-memory error the job's.

    A trainer uses files and memory and no network, so whatever the system refuses is one of these.
    """
    try:
        yield
    except OSError as problem:
        if problem.errno is None:
            raise
        left = f"; {atomic.free_space(out)}" if problem.errno in atomic.VOLUME_ERRORS else ""
        raise StorageError(f"{problem.filename or out}: {problem.strerror}{left}.") from problem
    except torch.OutOfMemoryError as problem:
        raise OutOfMemoryError(f"Out of memory: {str(problem).splitlines()[0]}") from problem


@contextlib.contextmanager
def _report_ending(status: Status) -> Iterator[Status]:
    """status.json and run.log get how the job ended, whatever ends it."""
    ending: KilnError | None = KilnError("An unexpected error: see run.log.")
    try:
        yield status
        ending = None
    except StopRequestedError as problem:
        log.info("%s", problem.last_line())
        problem.logged = True
        ending = problem
        raise
    except KilnError as problem:
        log.error("%s", problem)
        problem.logged = True
        ending = problem
        raise
    finally:
        with contextlib.suppress(OSError, StorageError):
            status.ended(ending)


class _QuietFileHandler(logging.FileHandler):
    """Drops lines that a full volume does not take: that is reported once, as the job's error."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _record_decisions(plan: Plan, log_file: logging.Handler) -> None:
    """Write what was decided, and the plan's warnings, to run.log alone: the entrypoint has printed them."""
    for level, sentences in ((logging.INFO, plan.reasons), (logging.WARNING, plan.warnings)):
        for sentence in sentences:
            log_file.handle(log.makeRecord(log.name, level, __file__, 0, sentence, (), None))


class _PrintedBefore(logging.Filter):
    """Drops each of some lines once: what is said again later is news."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__()
        self.left = set(lines)

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self.left
        self.left.discard(message)
        return is_new


@contextlib.contextmanager
def _printed_once(lines: Sequence[str], log_file: logging.Handler) -> Iterator[None]:
    """Inside, the lines that the entrypoint has printed go to run.log alone."""
    handlers = [handler for handler in logging.getLogger().handlers if handler is not log_file]
    filters = [_PrintedBefore(lines) for _ in handlers]
    for handler, printed in zip(handlers, filters, strict=True):
        handler.addFilter(printed)
    try:
        yield
    finally:
        for handler, printed in zip(handlers, filters, strict=True):
            handler.removeFilter(printed)


@contextlib.contextmanager
def _log_file(path: Path, prefix: str = "") -> Iterator[logging.Handler]:
    """Inside, the log goes to `path` as well. Yields the handler that writes there."""
    json_files.set_aside_unless(path, own_files.is_run_log)
    handler = _QuietFileHandler(path, encoding="utf-8")
    handler.setFormatter(LineFormatter(f"%(asctime)s %(levelname)s {prefix}%(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger().removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
