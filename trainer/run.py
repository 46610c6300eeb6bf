"""One plan from start to end: wires the parts in order. The encoders are freed before the denoiser loads."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint, class_pictures, files, flash, formats, lora, optim, parallel, prepare, text_encoders
from trainer.assemble import assembled
from trainer.class_pictures import Wanted
from trainer.crashes import Crashes
from trainer.dataset import Scan
from trainer.engine import Engine, limit_memory, loaded, torch_dtype
from trainer.errors import HangError, KilnError, OutOfMemoryError, SettingsError, StorageError
from trainer.families import Facts, Family, base_models, family
from trainer.guard import LOSS_SCALE, Guard
from trainer.lock import locked
from trainer.loop import Ema
from trainer.metrics import Status
from trainer.objective import scheduler_changes
from trainer.parallel import Prepared, Team
from trainer.plan import EnginePlan, Plan, Prompt, goes_on
from trainer.session import Session
from trainer.stop import StopFlag
from trainer.text_encoders import TextEncoders
from trainer.trainee import Trainee
from trainer.watchdog import ALIVE, OTHER_S, Watchdog

log = logging.getLogger(__name__)


def run(plan: Plan, stop: StopFlag) -> None:
    """Do all that `plan` says and return when the final LoRA is in its place.

    Raises the errors of `trainer.errors`; StopRequestedError after a signal, with the state saved.
    """
    out, team = Path(plan.output.path), parallel.team(plan.engine.num_gpus, os.environ, stop)
    if plan.engine.attention == "flash_4":
        flash.prepare()
    if not team.first:
        _follow(plan, stop, out, team=team)
        return
    dog = Watchdog(plan.engine.step_timeout_s, alive=Path(os.environ[ALIVE]) if ALIVE in os.environ else None)
    with locked(out), _log_file(out / "run.log"), _told(Status(out)) as status:
        crashes = Crashes(out, plan, step=lambda: status.step)
        crashes.check()

        def hung(problem: HangError) -> None:
            status.ended(problem)
            crashes.record(str(problem))

        with dog.watching(out, hung), crashes.counted(), _named(out):
            files.sweep(out)
            _whole(plan, stop, out, status=status, dog=dog, team=team)


def _follow(plan: Plan, stop: StopFlag, out: Path, *, team: Team) -> None:
    """The job of another process than the first: to train on what that one has prepared.

    It keeps a status of its own, in the folder that goes with the job. Its watchdog is patient: the first process's
    ends the job when any of them stands still.
    """
    dog = Watchdog(0.0 if plan.engine.step_timeout_s == 0 else OTHER_S)
    given = team.prepared(dog.beat)
    with _log_file(out / "run.log", f"[process {team.rank}] "), _told(Status(team.own_folder)) as status:
        crashes = Crashes(out, plan, step=lambda: status.step)

        def hung(problem: HangError) -> None:
            status.ended(problem)

        with dog.watching(team.own_folder, hung), crashes.counted(), _named(out):
            plan, found = given.plan, Scan(given.pictures, (), ())
            limit_memory(plan.engine.device, plan.engine.memory_limit_gib)
            order, model = prepare.order_of(plan, found), Path(plan.model.path)
            cache = prepare.open_cache(Path(plan.output.cache), model, precision=plan.engine.dtype)
            state = checkpoint.read(given.state) if given.state else None
            ready = prepare.Ready(plan, found, order, cache, state)
            _train(ready, stop, team.own_folder, status=status, dog=dog, team=team)


def _whole(plan: Plan, stop: StopFlag, out: Path, *, status: Status, dog: Watchdog, team: Team) -> None:
    state = _resumable(plan, out)
    files.write_text(out / "plan.json", plan.to_json())
    limit_memory(plan.engine.device, plan.engine.memory_limit_gib)
    whole = str(assembled(plan.model, Path(plan.output.cache)))
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, path=whole))
    plan = _with_class_pictures(plan, status=status, tick=lambda: _tick(dog, stop))
    ready = prepare.ready(plan, out, status=status, state=state, tick=lambda: _tick(dog, stop))
    team.hand_over(Prepared(plan, state.folder if state else None, ready.found.pictures))
    _train(ready, stop, out, status=status, dog=dog, team=team)


def _tick(dog: Watchdog, stop: StopFlag) -> None:
    """Between two pieces of work: all is well, and a stop may be looked for."""
    dog.beat()
    stop.check()


def _with_class_pictures(plan: Plan, *, status: Status, tick: Callable[[], None]) -> Plan:
    """The plan with a folder for each source that the base model draws."""
    kind, model = family(plan.model.family), Path(plan.model.path)
    facts, base = kind.FACTS, base_models()[plan.model.base][1]
    common = {"steps": facts.prompt_steps, "guidance": facts.prompt_guidance, "cfg": facts.prompt_cfg, **base.defaults}
    precision, scheduler = plan.engine.precision, scheduler_changes(plan.train)
    drawn, datasets = [], []
    for dataset in plan.data.datasets:
        subsets = list(dataset.subsets)
        width, height = (max(facts.multiple, side // facts.multiple * facts.multiple) for side in dataset.resolution)
        for i, source in enumerate(s.source for s in dataset.subsets):
            if source.kind != "generated":
                continue
            prompt = Prompt(text=source.location, width=width, height=height, seed=plan.train.seed, **common)
            wanted = Wanted(prompt, source.count)
            folder = wanted.folder(Path(plan.output.cache), model, precision=precision, scheduler=scheduler)
            subsets[i] = dataclasses.replace(subsets[i], source=dataclasses.replace(source, path=str(folder)))
            drawn.append((wanted, folder))
        datasets.append(dataclasses.replace(dataset, subsets=tuple(subsets)))
    if drawn:
        status.phase("drawing class pictures")
        class_pictures.fill(drawn, family=kind, model=model, engine=plan.engine, scheduler=scheduler, tick=tick)
    return dataclasses.replace(plan, data=dataclasses.replace(plan.data, datasets=tuple(datasets)))


@contextlib.contextmanager
def _named(out: Path) -> Iterator[None]:
    """What the system refuses, as errors of the job: a trainer uses files and memory, and no network."""
    try:
        yield
    except OSError as problem:
        if problem.errno is None:
            raise
        left = f"; {files.free(out)} are free" if problem.errno in files.FULL else ""
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
        problem.told = True
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


def _train(ready: prepare.Ready, stop: StopFlag, out: Path, *, status: Status, dog: Watchdog, team: Team) -> None:
    plan, kind, total = ready.plan, family(ready.plan.model.family), ready.total
    status.phase("loading the model")
    started = time.monotonic()
    team.join(plan.engine.device)
    trainee = _trainee(plan, kind, model=Path(plan.model.path), total=total)
    log.info("Loaded the model and put %s on it in %.1f s.", _size(trainee), time.monotonic() - started)
    _tick(dog, stop)
    session = session_of(ready, trainee, out, stop, dog=dog, team=team)
    session.rehearse()
    if ready.state is not None:
        trainee.restore(ready.state.tree)
        log.info("Resumed at step %d of %d.", ready.state.step, total)
    team.check_same(trainee.params)
    session.train(status, first=ready.state.step if ready.state else 0)
    status.update({"output": f"{plan.output.name}.safetensors"})


def session_of(
    ready: prepare.Ready, trainee: Trainee, out: Path, stop: StopFlag, *, dog: Watchdog, team: Team
) -> Session:
    """The session that trains what `ready` and `trainee` hold, into `out`."""
    plan, kind = ready.plan, family(ready.plan.model.family)
    return Session(
        plan,
        kind,
        out,
        stop,
        engine=Engine(trainee.denoiser, kind.regions(trainee.denoiser), plan.engine, trainee.stream),
        goal=ready.goal,
        trainee=trainee,
        order=ready.order,
        cache=ready.cache,
        found=ready.found,
        total=ready.total,
        steps_per_epoch=ready.steps_per_epoch,
        dog=dog,
        team=team,
    )


def _size(trainee: Trainee) -> str:
    states = [lora.state(model) for model in (trainee.denoiser, *trainee.texts.models.values())]
    count = sum(name.endswith(".lora_A.weight") for state in states for name in state)
    return f"{count} adapters ({sum(p.numel() for p in trainee.params) / 1e6:.2f} M parameters)"


def _resumable(plan: Plan, out: Path) -> checkpoint.State | None:
    """The state to go on from: this output's own, or the folder PARAMS_RESUME_FROM. Refuses another plan's."""
    state = checkpoint.latest(out / "state")
    asked, own = Path(plan.lora.resume_from) if plan.lora.resume_from else None, state is not None
    if state is None and asked is not None and asked.is_dir():
        try:
            state = checkpoint.read(asked)
        except ValueError as problem:
            raise SettingsError(f"PARAMS_RESUME_FROM {asked} is not a whole state: {problem}.") from problem
    if state is None or goes_on(plan, state.tree["essence"], step=state.step, own=own):
        _say_what_made(state, plan.engine)
        return state
    aside = out / f"state.before-{int(time.time())}"
    (out / "state").rename(aside)
    log.warning("The plan changed and PARAMS_RESUME_FROM is set: weights only; the old states are in %s.", aside)
    return None


def _say_what_made(state: checkpoint.State | None, engine: EnginePlan) -> None:
    """Other software or another device may go on, but the log shall tell why the bytes are not the same."""
    if state is None:
        return
    now = {**checkpoint.made_by(engine.attention), "NUM_GPUS": engine.num_gpus}
    for key, then in {**state.tree["made_by"], "NUM_GPUS": state.tree["essence"].get("engine.num_gpus", 1)}.items():
        if then != now[key]:
            log.warning("The state was made with %s %s, and this is %s: bit-identity ends here.", key, then, now[key])


def _trainee(plan: Plan, kind: Family, *, model: Path, total: int) -> Trainee:
    """The denoiser with adapters, and their optimiser, as new; or with the weights of PARAMS_RESUME_FROM."""
    engine, facts = plan.engine, kind.FACTS
    start = None
    if plan.lora.resume_from and Path(plan.lora.resume_from).is_file():
        start = _lora_file(Path(plan.lora.resume_from), facts.name)
    fused = {} if plan.lora.split_qkv else facts.fused_targets
    settings = plan.lora
    rank = 0 if settings.kind == "dora" else settings.rank  # whose adapters are no part of a product
    denoiser, stream = loaded(kind, model, engine, fused=fused, targets=settings.targets, rank=rank)
    put = partial(lora.add_adapters, rank=settings.rank, alpha=settings.alpha, seed=plan.train.seed, kind=settings.kind)
    targets, blocks = plan.lora.targets, kind.blocks(denoiser)
    trained: list[tuple[list[torch.nn.Parameter], dict[str, float]]]
    trained = [(put(denoiser, blocks, targets=targets, fused=fused), {})]
    texts = text_encoders.load(
        model, plan.optim.text_encoders, family=kind, device=engine.device, dtype=torch_dtype(engine)
    )
    for component, encoder in texts.models.items():
        blocks, targets = text_encoders.blocks(encoder), text_encoders.TARGETS
        own = put(encoder, blocks, targets=targets, fused={})
        trained.append((own, {"lr": plan.optim.text_encoders[component]}))
    parts = [p for own, _ in trained for p in own]
    groups: list[dict[str, Any]]
    groups = [{"params": optim.joined(plan.optim.name, own), **rate} for own, rate in trained]
    if start is not None:
        _start_from(denoiser, texts, start, plan=plan, facts=facts)
    new_optimizer = partial(
        optim.make_optimizer,
        plan.optim.name,
        groups,
        learning_rate=plan.optim.learning_rate,
        weight_decay=plan.optim.weight_decay,
        args=plan.optim.args,
        warmup_steps=plan.optim.warmup_steps,
    )
    params, optimizer = [p for group in groups for p in group["params"]], new_optimizer()
    schedule = optim.make_schedule(
        "constant" if optim.OPTIMIZERS[plan.optim.name].own_warmup else plan.optim.scheduler,
        optimizer,
        warmup_steps=plan.optim.warmup_steps,
        total_steps=total,
        num_cycles=plan.optim.num_cycles,
    )
    ema = Ema(params, plan.train.ema_decay) if plan.train.ema_decay else None
    scale = LOSS_SCALE.get(plan.engine.dtype, 1.0)
    guard = Guard(plan.train.max_skipped_steps, plan.train.max_loss_spike, scale)
    return Trainee(denoiser, texts, parts, params, optimizer, new_optimizer, schedule, ema, guard, stream)


def _lora_file(path: Path, family_name: str) -> formats.Modules:
    try:
        return formats.load(path, family_name)
    except ValueError as problem:
        raise SettingsError(f"PARAMS_RESUME_FROM {path} cannot be gone on from: {problem}.") from problem


def _start_from(denoiser: Any, texts: TextEncoders, modules: formats.Modules, *, plan: Plan, facts: Facts) -> None:
    """Begin with the weights of a LoRA file. Raises SettingsError where they are not of this plan's shape."""
    path, scale, state = plan.lora.resume_from, plan.lora.scale, lora.state(denoiser)
    own = {name: adapter for name, adapter in modules.items() if name.partition(".")[0] not in texts.models}
    try:
        lora.load(
            denoiser, formats.to_state(own, state, prefix=facts.lora_prefix, fused=facts.fused_targets, scale=scale)
        )
        for component, model in texts.models.items():
            text_encoders.start(model, component, modules, family_name=facts.name, scale=scale)
    except ValueError as problem:
        raise SettingsError(
            f"PARAMS_RESUME_FROM {path} does not fit this plan (PARAMS_NETWORK_DIM={plan.lora.rank}, "
            f"PARAMS_SPLIT_QKV={str(plan.lora.split_qkv).lower()}, PARAMS_TARGET_MODULES="
            f"{','.join(plan.lora.targets)}): {problem}."
        ) from problem
    log.info("Began with the weights of %s: %d modules.", path, len(modules))
