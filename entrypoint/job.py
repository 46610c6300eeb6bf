"""One job, from its settings to its LoRA: plan, check, fetch, train, upload, report."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from entrypoint import bake
from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.fetch import flash_attention, http, streams
from entrypoint.fetch.doors import variables as doors
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.everything import Access, fetch_all
from entrypoint.monitor import beside as monitor
from entrypoint.nodes import cluster
from entrypoint.nodes.group import Nodes
from entrypoint.nodes.terms import terms_of
from entrypoint.notify import beside as notify
from entrypoint.planning import starting_point
from entrypoint.planning.check_report import CheckReport
from entrypoint.planning.plan import make_plan
from entrypoint.processes import farewell, supervise, upload
from entrypoint.processes.launch import Trainers
from entrypoint.processes.pod import how_to_fetch
from entrypoint.report import start as job_report
from entrypoint.report.receipt import receipt
from entrypoint.settings import Settings, given, read_settings
from entrypoint.system import cards, hardware, public_addresses
from entrypoint.system.answers import Answers
from entrypoint.system.machine import Machine
from entrypoint.system.raw_value import raw_value
from entrypoint.trackers import beside as trackers
from trainer.network import addresses
from trainer.process import scratch, vitals
from trainer.spec.errors import NoAcceleratorError, SettingsError, StorageError
from trainer.spec.family import base_models
from trainer.spec.plan import Plan
from trainer.spec.rules import outlook
from trainer.spec.values import as_integer, inside, show, span
from trainer.storage import choose_run

log = logging.getLogger("entrypoint")
LATEST_SECOND = 253_402_300_799  # of the year 9999
CHECK_RETRIES_S = 15.0  # how long a check waits for a silent network: the user waits as well


def job(
    environ: Mapping[str, str],
    *,
    check: bool,
    prefetch: bool = False,
    card: str | None = None,
    report: CheckReport | None = None,
    answers: Answers | None = None,
) -> int:
    """The whole job; returns the trainer's exit code, or 0. Raises the errors of `trainer.spec.errors`.

    `prefetch`: all that the job downloads is brought, and nothing is trained. `card`: the name of one to check for, in
    place of what this machine has. `report`: is told the plan and its figures. `answers`: of other jobs.
    """
    answers = answers or Answers(Machine())
    public_addresses.guard(environ)
    # In a pod the job is a process of its own: what it tells its parent is not what the supervisor tells its own.
    if vitals.VARIABLE in os.environ:
        environ = {**environ, vitals.VARIABLE: os.environ[vitals.VARIABLE]}
    began = time.time()
    vitals.write_began(environ, began)
    try:
        settings = read_settings(environ)
    except SettingsError:
        with notify.telling(None if check or prefetch else _whom_to_tell_all_the_same(environ), environ):
            raise
    supervise.set_limit(settings.finish, environ, began=began)
    monitor.check_token(settings.finish.monitor_token)
    place = _place(settings, environ, alone=check or prefetch)
    settings = dataclasses.replace(settings, engine=dataclasses.replace(settings.engine, nodes=place.count))
    alone = check or prefetch
    told = _whom_to_tell(settings) if place.is_first and not alone else None
    with (
        _temporary(settings.data.cache_path) as temporary,
        notify.telling(told, environ) as ending,
        Nodes(
            cluster.Place() if alone else place, timeout_s=settings.engine.nodes_timeout, environment=environ
        ) as nodes,
    ):
        own = {**environ, "TMPDIR": str(temporary)}
        code = _job(settings, own, nodes, check=check, prefetch=prefetch, card=card, report=report, answers=answers)
        code = nodes.end(code, "")
        ending.exit_code, ending.message = code, ""  # the trainer's own is in status.json
        if not alone and code == 0 and nodes.is_first:  # the last line of any other end has its exit code
            said = receipt(settings.output.output_path, started=began, price=settings.finish.price_per_hour)
            if said:
                log.info("%s", said)
            _say_how_to_fetch(settings, environ)
        return code


@contextlib.contextmanager
def _temporary(cache: Path) -> Iterator[Path]:
    """A folder for temporary files. Raises StorageError where none can be written."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(scratch.folder(os.environ, cache))
        except OSError as problem:
            raise StorageError(
                f"Temporary files can be written nowhere: {problem.strerror or problem} in {cache} too (CACHE_PATH). "
                "Fix: set TMPDIR to a folder with room that this user can write to, and look at the limits (ulimit -f)."
            ) from problem
        yield made


def _place(settings: Settings, environ: Mapping[str, str], *, alone: bool) -> cluster.Place:
    """This node's place; `alone`: also on a machine of no cluster. Raises SettingsError, and tells whom to tell."""
    asked = settings.engine.nodes
    if alone and not cluster.is_in_one(environ):
        return cluster.Place(count=asked or 1)
    told = None if alone or cluster.is_another(str(asked), environ) else _whom_to_tell(settings)
    try:
        return cluster.find_place(asked, environ)
    except SettingsError:
        with notify.telling(told, environ):
            raise


def _say_how_to_fetch(settings: Settings, environ: Mapping[str, str]) -> None:
    """A warning where the results are lost with the pod."""
    action, uploaded_to = supervise.asked_action(environ), settings.finish.push_to_hub
    if uploaded_to is None and settings.finish.upload_to is not None:
        uploaded_to = addresses.shown(settings.finish.upload_to)
    text = how_to_fetch(settings.output.output_path, environ, action=action, uploaded_to=uploaded_to)
    is_lost = action == "terminate" and uploaded_to is None
    if text:
        log.log(logging.WARNING if is_lost else logging.INFO, "%s", text)


def _whom_to_tell_all_the_same(environ: Mapping[str, str]) -> notify.Job | None:
    """The same where other settings cannot be used."""
    own = {name: raw_value(environ, name) for name in ("WEBHOOK_URL", "WEBHOOK_SECRET")}
    own |= {"BASE_MODEL": next(iter(base_models())), "OUTPUT_PATH": str(farewell.output_path(environ))}
    try:
        return _whom_to_tell(read_settings(own))
    except SettingsError:  # the error of the job names this one too
        return None


def _whom_to_tell(settings: Settings) -> notify.Job | None:
    finish, base = settings.finish, settings.model.base_model or ""
    out = settings.output.output_path
    return notify.job_of(finish.webhook_url, finish.webhook_secret, out=out, base=base, price=finish.price_per_hour)


def _job(
    settings: Settings,
    environ: Mapping[str, str],
    nodes: Nodes,
    *,
    check: bool,
    prefetch: bool,
    card: str | None,
    report: CheckReport | None,
    answers: Answers,
) -> int:
    """`job`, with a place for temporary files."""
    retries = checking() if check else http.USUAL
    keys = Keys.of(settings, environ)
    settings, arrivals = doors.arrive(settings, environ, retries=retries)
    plan, detected, uses_gpu = _planned(settings, environ, card, answers.machine)
    missing = _missing_accelerator(plan, backend=settings.engine.backend)
    if missing and not check and not prefetch:
        raise missing
    done = None
    if nodes.is_first:  # which alone looks into OUTPUT_PATH
        plan, done = _chosen(plan, given.describe(settings))
    if report is not None:
        report.plan = plan
    _say(plan, environ)
    if nodes.several and not _agreed(plan, done, nodes, arrived=[arrival.path for arrival in arrivals]):
        return 0
    token = settings.model.hf_token.reveal() if settings.model.hf_token else None
    targets = _targets(plan, settings, environ, token=token, creates=not check) if nodes.is_first else []
    if done:
        return _finished(done, [] if check or prefetch else targets, environ)

    from entrypoint.planning.preflight import preflight  # imports the Hub's client, which is slow: only now
    from entrypoint.planning.summary import log_summary

    starting_point.check_state(plan)
    hub_cache = settings.model.hf_home / "hub"
    if check:  # first, since it needs no network
        summary = log_summary(plan, token=token, hub_cache=hub_cache, estimate_captions=True, answers=answers)
        if report is not None:
            report.figures = summary.figures
    fetches = preflight(
        plan, token=token, hub_cache=hub_cache, arrivals=arrivals, keys=keys, retries=retries, answers=answers
    )
    if fetches and not check:  # otherwise the trainer reads the images at once, and says the same
        plan = dataclasses.replace(plan, printed=log_summary(plan, token=token, hub_cache=hub_cache).lines)
    access = Access(token, keys, arrivals)
    if prefetch:
        fetch_all(plan, settings, access)
        log.info("Fetched: all that this job downloads is here, and is checked. Nothing was trained.")
        return 0
    if uses_gpu:
        hardware.check_kernels(detected, answers.machine.kernels)
    if missing:
        raise missing
    with upload.all_beside(targets, environ) as uploaded:
        if check:
            log.info("Checked: this job can run. Nothing was downloaded or trained.")
            return 0
        if not nodes.is_first:
            return _trained_for_first(plan, settings, environ, nodes, access)
        return _trained(plan, settings, environ, nodes, access) or uploaded()


def _planned(
    settings: Settings, environ: Mapping[str, str], card: str | None, machine: Machine
) -> tuple[Plan, hardware.Hardware, bool]:
    """The plan, the hardware it is for, and whether a GPU of this machine trains."""
    manifest = read_manifest(settings.data.dataset_config, settings.output.sample_prompts)
    detected = _card_to_check_for(card) if card is not None else machine.hardware
    if card is None and detected.vendor != "cpu":
        _ = machine.asked_torch  # which answers while the plan is made
    plan = make_plan(settings, manifest, detected, now=now(environ))
    uses_gpu = card is None and plan.engine.device != "cpu"
    if uses_gpu:
        hardware.check_torch(detected, hardware.torch_version())
    return dataclasses.replace(plan, model=bake.with_baked(plan.model)), detected, uses_gpu


def _finished(done: Path, targets: list[upload.Job], environ: Mapping[str, str]) -> int:
    """The run is complete: upload what is not there yet."""
    log.info("This job is done: %s. %s", done, choose_run.HOW_TO_GO_ON)
    left = [job for job in targets if not upload.is_done(job, done)]
    if not left:
        return 0
    with upload.all_beside(left, environ) as uploaded:
        return uploaded()


def _agreed(plan: Plan, done: Path | None, nodes: Nodes, *, arrived: Collection[Path]) -> bool:
    """Whether there is something to do here: all nodes have met, or this first one goes on to upload what is done.

    `arrived`: the files that come from addresses.
    """
    if done:
        nodes.dismiss(f"This job is done: {done}.")
        return True
    return nodes.agree(terms_of(plan, arrived=arrived))


def _say(plan: Plan, environ: Mapping[str, str]) -> None:
    for reason in plan.reasons:
        log.info("%s", reason)
    for detail in plan.details:
        log.debug("%s", detail)
    for warning in plan.warnings:
        log.warning("%s", warning)
    engine = plan.engine
    if engine.nodes > 1:
        text = "NODES: %d machines with NUM_GPUS=%d each train together: %d micro-batches a step."
        log.info(text, engine.nodes, engine.num_gpus, engine.processes * plan.train.gradient_accumulation)
    elif hint := cluster.hint(environ):
        log.info("%s", hint)


def _targets(
    plan: Plan, settings: Settings, environ: Mapping[str, str], *, token: str | None, creates: bool
) -> list[upload.Job]:
    """Where the results go: a repository of the Hub, a bucket, both or neither."""
    write_token = settings.finish.hf_write_token.reveal() if settings.finish.hf_write_token else token
    push = upload.job(settings.finish.push_to_hub, write_token, plan, creates=creates)
    store = upload.store_job(settings.finish.upload_to, environ, plan, creates=creates)
    return [target for target in (push, store) if target is not None]


def checking() -> http.RetryPolicy:
    return dataclasses.replace(http.USUAL, budget=CHECK_RETRIES_S)


def _trained_for_first(plan: Plan, settings: Settings, environ: Mapping[str, str], nodes: Nodes, access: Access) -> int:
    """`_trained` on another node than the first, which alone writes into OUTPUT_PATH and shows the page."""
    supervise.has_met(environ)
    if plan.engine.attention == "flash_4":
        flash_attention.install(Path(plan.output.cache))
    with Trainers(plan, environment=environ, nodes=nodes) as trainers:
        return trainers.run(fetch_all(plan, settings, access))


def _trained(plan: Plan, settings: Settings, environ: Mapping[str, str], nodes: Nodes, access: Access) -> int:
    """Fetch what is missing, train beside the page and the tracker, and write the report; the trainer's exit code."""
    began, out = time.time(), Path(plan.output.path)
    tracker, own = settings.finish.log_with, {}
    if tracker is not None:
        hub_token = settings.finish.hf_write_token or settings.model.hf_token
        own = trackers.environment_of(tracker, environ, cache=settings.data.cache_path, hub_token=hub_token)
    if plan.engine.attention == "flash_4":  # before a trainer looks for it
        flash_attention.install(Path(plan.output.cache))
    price = settings.finish.price_per_hour
    page = monitor.showing(settings.finish.monitor_port, settings.finish.monitor_token, environ, out=out, price=price)
    with page, trackers.tracking(tracker, out, own) as tracked:
        with Trainers(plan, environment=environ, nodes=nodes) as trainers:
            ready = fetch_all(plan, settings, access)
            with streams.serving(ready, dataclasses.replace(access.keys, hub=access.token)):
                code = tracked.exit_code = trainers.run(ready)
        # Then somebody waits for the end of this process, also if the LoRA was complete by then.
        is_stopped = trainers.stopped or code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        if not is_stopped:
            job_report.write(out, environ, started=began, price=price)
    return code


def _card_to_check_for(name: str) -> hardware.Hardware:
    """The hardware that --gpu names. Raises SettingsError if it is unknown, or torch in the image cannot use it."""
    found = cards.hardware_of(name)
    log.info("Checking for %s: %s, and %.0f GiB of host memory.", name, found, found.host_memory_gib)
    hardware.check_kernels(found, hardware.IMAGE_KERNELS)
    return found


def now(environ: Mapping[str, str]) -> datetime.datetime:
    """The time; or SOURCE_DATE_EPOCH (reproducible-builds.org), which makes equal runs give equal files.

    Raises SettingsError where that is no second of a year with four digits, which is what a date in a header holds.
    """
    text = environ.get("SOURCE_DATE_EPOCH", "").strip()
    if not text:
        return datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
    epoch = as_integer(text)
    if epoch is None or not inside(epoch, 0, LATEST_SECOND):
        limits = span(0, LATEST_SECOND)
        raise SettingsError(
            f"SOURCE_DATE_EPOCH={show(text)} is not a time. Allowed: a whole number of seconds since 1970, {limits}."
        )
    return datetime.datetime.fromtimestamp(epoch, datetime.UTC)


def _missing_accelerator(plan: Plan, *, backend: str) -> NoAcceleratorError | None:
    """The error for a full-size model without a GPU: a rented machine may come back without its GPUs."""
    if plan.engine.device != "cpu" or backend != "auto" or base_models()[plan.model.base][1].is_miniature:
        return None
    return NoAcceleratorError(
        f"No GPU answers here, and {plan.model.base} is not trained on a CPU. Give the container its GPUs (docker "
        "run --gpus all; --device /dev/kfd --device /dev/dri), or set BACKEND=cpu to train on the CPU all the same."
    )


def _chosen(plan: Plan, asked: str) -> tuple[Plan, Path | None]:
    """The plan with the name, folder and start time of its run; and the final LoRA, if that run is done already.

    The first reasons say what makes the run a new one, if it is one, what will be trained, and what was `asked`.
    """
    choice = choose_run.choose(plan)
    reasons = [outlook.headline(choice.plan), asked, *plan.reasons]
    text = choice.describe()
    if text:
        reasons.insert(0, text)
    return dataclasses.replace(choice.plan, reasons=tuple(reasons)), None if text else choice.done
