"""`python -m entrypoint`: read settings and dataset.json, detect the hardware, plan, fetch, launch the trainer.

Turns exceptions into exit codes.
"""

from __future__ import annotations

import os
import sys

from trainer.process import guard

# Before everything else is imported, which takes seconds. From here on a stop is a stop; a shell has its own handlers.
if __name__ == "__main__" and sys.argv[1:2] != ["shell"]:
    guard.begin("entrypoint.processes.farewell")

import contextlib
import dataclasses
import datetime
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from entrypoint import bake
from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.fetch import flash_attention, http, public_addresses
from entrypoint.fetch.fetch import fetch_model, fetch_source
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
from entrypoint.settings import Settings, given, help_env, json_schema, read_settings
from entrypoint.system import cards, environment, hardware, prices, secrets
from entrypoint.system.raw_value import raw_value
from entrypoint.trackers import beside as trackers
from trainer import __version__
from trainer.base_model import model_folder
from trainer.process import scratch, streams, vitals
from trainer.spec.commands.parser import Parser
from trainer.spec.errors import KilnError, NoAcceleratorError, SettingsError, StopRequestedError
from trainer.spec.family import base_models, get_family
from trainer.spec.log_lines import log_to
from trainer.spec.messages.secrets import Known
from trainer.spec.plan import Dataset, Plan, Source
from trainer.spec.rules import outlook
from trainer.spec.values import as_integer, inside, show, span
from trainer.storage import choose_run

log = logging.getLogger("entrypoint")
LATEST_SECOND = 253_402_300_799  # of the year 9999
CHECK_RETRIES_S = 15.0  # how long a check waits for a silent network: the user waits as well
PROGRAMS = {  # first arguments that run another program instead
    "sample": (sys.executable, "-m", "trainer.sample"),
    "export": (sys.executable, "-m", "trainer.export"),
    "monitor": (sys.executable, "-m", "entrypoint.monitor"),
    "shell": ("bash",),
}


def main(arguments: list[str], environ: Mapping[str, str] | None = None) -> int:
    """Exit codes as in `trainer.spec.errors`; 64 for a wrong command line."""
    environ = os.environ if environ is None else environ
    with secrets.hidden(environ) as known:
        return _run(arguments, environ, known)


def _run(arguments: list[str], environ: Mapping[str, str], known: Known) -> int:
    if arguments and arguments[0] in PROGRAMS:
        program = PROGRAMS[arguments[0]]
        own = dict(environ)  # the shell is its owner's
        if arguments[0] != "shell":
            own = environment.tool_environment(arguments[0], environ)
        try:
            os.execvpe(program[0], [*program, *arguments[1:]], own)  # noqa: S606 (what the user asks for)
        except OSError as problem:
            print(f"{program[0]} cannot be started: {problem.strerror}.", file=sys.stderr)  # noqa: T201
            return 78
    parser = Parser(
        prog="python -m entrypoint",
        description="Train a LoRA as the environment says: BASE_MODEL, DATASET_NAME, OUTPUT_PATH and more.",
    )
    commands = "train; check: validate, plan and preflight alone; quote: time and money on GPUs to rent; "
    commands += "sample, export: as python -m trainer.sample and trainer.export; monitor: the monitor page of a job's "
    commands += "folder; shell: bash; each with the arguments that follow"
    choices = ("train", "check", "quote", *PROGRAMS)
    parser.add_argument("command", nargs="?", choices=choices, default="train", help=commands)
    parser.add_argument("--check", action="store_true", help="the same as the command check")
    parser.add_argument("-v", "--verbose", action="store_true", help="say also which memory modes were not taken")
    plans_for = "check for a card that is not here: a name like 'RTX 4090', '2 x RTX 3090', or a size like '12 GB'"
    parser.add_argument("--gpu", metavar="CARD", help=plans_for)
    prices_file = "for quote: a JSON object of GPUs and their prices an hour, in place of approximate ones"
    parser.add_argument("--prices", metavar="FILE", type=Path, help=prices_file)
    parser.add_argument("--help-env", action="store_true", help="print every variable with default, range and meaning")
    as_json = "print JSON: of a check or a quote what it found, of --help-env a JSON schema (docs/agents.md)"
    parser.add_argument("--json", action="store_true", help=as_json)
    parser.add_argument("--version", action="version", version=f"kiln {__version__}")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return 64 if stop.code else streams.output_code()
    if options.help_env:
        with contextlib.suppress(BrokenPipeError):  # the reader (head, less) has closed the pipe
            print(json.dumps(json_schema(), indent=2) if options.json else help_env(), flush=True)  # noqa: T201
        return streams.output_code()
    level = logging.WARNING if options.command == "quote" else logging.INFO
    logging.getLogger("entrypoint").setLevel(logging.DEBUG if options.verbose else logging.NOTSET)
    log_to(logging.StreamHandler(), "%(asctime)s %(levelname)s %(message)s", level=level, known=known)
    if options.command == "quote":
        return _ended(lambda: quote(environ, prices_file=options.prices, as_json=options.json))
    check = options.check or options.command == "check" or options.gpu is not None
    report = CheckReport(known)
    if options.json:
        if not check:
            print("--json belongs to --check or --help-env", file=sys.stderr)  # noqa: T201
            return 64
        logging.getLogger().addHandler(report)

    def run() -> int:
        return _ended(lambda: job(environ, check=check, card=options.gpu, report=report))

    code = run() if check else supervise.supervised(run, environ)  # ON_FINISH is of a job
    if options.json:
        logging.getLogger().removeHandler(report)
        with contextlib.suppress(BrokenPipeError):
            print(report.to_json(code), flush=True)  # noqa: T201
    return code


def _ended(run: Callable[[], int]) -> int:
    """Do `run`; log its errors and turn them into exit codes."""
    try:
        return run()
    except StopRequestedError as problem:
        log.info("%s", problem.last_line())
        return problem.exit_code
    except KilnError as problem:
        log.error("%s", problem)
        log.error("%s [exit %d]", problem.advice, problem.exit_code)
        return problem.exit_code
    except Exception:
        log.exception("Unexpected error.")
        log.error("%s [exit %d]", KilnError.advice, KilnError.exit_code)
        return KilnError.exit_code


def quote(environ: Mapping[str, str], *, prices_file: Path | None, as_json: bool) -> int:
    """Print what the job takes on each GPU that can be rented. Raises SettingsError where none can do it."""
    from entrypoint.planning import offers  # imports the Hub's client, which is slow: only now

    public_addresses.guard(environ)
    settings = read_settings(environ)
    manifest = read_manifest(settings.data.dataset_config, settings.output.sample_prompts)
    offered, unknown = prices.read_offers(prices_file) if prices_file else (prices.OFFERS, [])
    # A limit is no reason to leave a GPU out: the table marks those that go beyond it.
    unlimited = dataclasses.replace(settings.finish, max_runtime=None, max_cost=None)
    asked = dataclasses.replace(settings, finish=unlimited)
    table = offers.make_table(
        offered,
        lambda found: make_plan(asked, manifest, found, now=_now(environ)),
        finish=settings.finish,
        token=settings.model.hf_token.reveal() if settings.model.hf_token else None,
        hub_cache=settings.model.hf_home / "hub",
    )
    with contextlib.suppress(BrokenPipeError):  # the reader (head, less) has closed the pipe
        print(offers.as_json(table, unknown) if as_json else offers.as_text(table, unknown), flush=True)  # noqa: T201
    return streams.output_code()


def job(environ: Mapping[str, str], *, check: bool, card: str | None = None, report: CheckReport | None = None) -> int:
    """The whole job; returns the trainer's exit code, or 0. Raises the errors of `trainer.spec.errors`.

    `card`: the name of one to check for, in place of what this machine has. `report`: is told the plan and its figures.
    """
    public_addresses.guard(environ)
    # In a pod the job is a process of its own: what it tells its parent is not what the supervisor tells its own.
    if vitals.VARIABLE in os.environ:
        environ = {**environ, vitals.VARIABLE: os.environ[vitals.VARIABLE]}
    began = time.time()
    vitals.write_began(environ, began)
    try:
        settings = read_settings(environ)
    except SettingsError:
        with notify.telling(None if check else _whom_to_tell_all_the_same(environ), environ):
            raise
    supervise.set_limit(settings.finish, environ, began=began)
    monitor.check_token(settings.finish.monitor_token)
    place = cluster.find_place(settings.engine.nodes, environ)
    settings = dataclasses.replace(settings, engine=dataclasses.replace(settings.engine, nodes=place.count))
    told = _whom_to_tell(settings) if place.is_first and not check else None
    with (
        scratch.folder(os.environ, settings.data.cache_path) as temporary,
        notify.telling(told, environ) as ending,
        Nodes(
            cluster.Place() if check else place, timeout_s=settings.engine.nodes_timeout, environment=environ
        ) as nodes,
    ):
        own = {**environ, "TMPDIR": str(temporary)}
        code = _job(settings, own, nodes, check=check, card=card, report=report)
        code = nodes.end(code, "")
        ending.exit_code, ending.message = code, ""  # the trainer's own is in status.json
        if not check and code == 0 and nodes.is_first:  # the last line of any other end has its exit code
            said = receipt(settings.output.output_path, started=began, price=settings.finish.price_per_hour)
            if said:
                log.info("%s", said)
            _say_how_to_fetch(settings, environ)
        return code


def _say_how_to_fetch(settings: Settings, environ: Mapping[str, str]) -> None:
    """A warning where the results are lost with the pod."""
    action, uploaded_to = supervise.asked_action(environ), settings.finish.push_to_hub
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
    card: str | None,
    report: CheckReport | None,
) -> int:
    """`job`, with a place for temporary files."""
    manifest = read_manifest(settings.data.dataset_config, settings.output.sample_prompts)
    detected = _card_to_check_for(card) if card is not None else hardware.detect()
    kernels = hardware.TorchKernels() if card is None and detected.vendor != "cpu" else None
    plan = make_plan(settings, manifest, detected, now=_now(environ))
    if kernels is not None and plan.engine.device != "cpu":
        hardware.check_torch(detected, hardware.torch_version())
    plan = dataclasses.replace(plan, model=bake.with_baked(plan.model))
    missing = _missing_accelerator(plan, backend=settings.engine.backend)
    if missing and not check:
        raise missing
    done = None
    if nodes.is_first:  # which alone looks into OUTPUT_PATH
        plan, done = _chosen(plan, given.describe(settings))
    if report is not None:
        report.plan = plan
    _log_plan(plan, environ)
    if nodes.several and not _agreed(plan, done, nodes):
        return 0
    token = settings.model.hf_token.reveal() if settings.model.hf_token else None
    push = _push(settings, plan, token, creates=not check) if nodes.is_first else None
    if done:
        log.info("This job is done: %s. %s", done, choose_run.HOW_TO_GO_ON)
        if check or push is None or upload.is_done(push, done):
            return 0
        with upload.beside(push, environ) as uploaded:
            return uploaded()

    from entrypoint.planning.preflight import preflight  # imports the Hub's client, which is slow: only now
    from entrypoint.planning.summary import log_summary

    starting_point.check_state(plan)
    hub_cache = settings.model.hf_home / "hub"
    if check:  # first, since it needs no network
        summary = log_summary(plan, token=token, hub_cache=hub_cache, estimate_captions=True)
        if report is not None:
            report.figures = summary.figures
    retries = dataclasses.replace(http.USUAL, budget=CHECK_RETRIES_S) if check else http.USUAL
    fetches = preflight(plan, token=token, hub_cache=hub_cache, retries=retries)
    if fetches and not check:  # otherwise the trainer reads the images at once, and says the same
        plan = dataclasses.replace(plan, printed=log_summary(plan, token=token, hub_cache=hub_cache).lines)
    if kernels is not None and plan.engine.device != "cpu":
        hardware.check_kernels(detected, kernels.names())
    if missing:
        raise missing
    with upload.beside(push, environ) as uploaded:
        if check:
            log.info("Checked: this job can run. Nothing was downloaded or trained.")
            return 0
        if not nodes.is_first:
            return _trained_for_first(plan, settings, environ, nodes, token=token)
        return _trained(plan, settings, environ, nodes, token=token) or uploaded()


def _push(settings: Settings, plan: Plan, token: str | None, *, creates: bool) -> upload.Job | None:
    write_token = settings.finish.hf_write_token.reveal() if settings.finish.hf_write_token else token
    return upload.job(settings.finish.push_to_hub, write_token, plan, creates=creates)


def _agreed(plan: Plan, done: Path | None, nodes: Nodes) -> bool:
    """Whether there is something to do here: all nodes have met, or this first one goes on to upload what is done."""
    if done:
        nodes.dismiss(f"This job is done: {done}.")
        return True
    return nodes.agree(terms_of(plan))


def _log_plan(plan: Plan, environ: Mapping[str, str]) -> None:
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


def _trained_for_first(
    plan: Plan, settings: Settings, environ: Mapping[str, str], nodes: Nodes, *, token: str | None
) -> int:
    """`_trained` on another node than the first, which alone writes into OUTPUT_PATH and shows the page."""
    if plan.engine.attention == "flash_4":
        flash_attention.install(Path(plan.output.cache))
    with Trainers(plan, environment=environ, nodes=nodes) as trainers:
        return trainers.run(_fetched(plan, settings, token=token))


def _trained(plan: Plan, settings: Settings, environ: Mapping[str, str], nodes: Nodes, *, token: str | None) -> int:
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
            code = tracked.exit_code = trainers.run(_fetched(plan, settings, token=token))
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


def _now(environ: Mapping[str, str]) -> datetime.datetime:
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


def _fetched(plan: Plan, settings: Settings, *, token: str | None) -> Plan:
    """The plan with local paths for the model and all sources, which are fetched at the same time."""
    hub_cache = settings.model.hf_home / "hub"
    cache = Path(plan.output.cache)
    patterns = model_folder.file_patterns(get_family(plan.model.family).FACTS, plan.model.parts)
    sources: dict[Source, None] = {}  # each once, in order
    for dataset in plan.data.datasets:
        sources |= dict.fromkeys(subset.source for subset in dataset.subsets)
    cancelled = threading.Event()
    retries = dataclasses.replace(http.USUAL, cancelled=cancelled)
    access: dict[str, Any] = {"token": token, "hub_cache": hub_cache, "retries": retries}
    model, fetched = http.both(
        lambda: fetch_model(plan.model, patterns=patterns, **access),
        lambda: {source: fetch_source(source, cache=cache, **access) for source in sources},
        cancelled=cancelled,
    )

    def local(source: Source, _dataset: Dataset) -> Source:
        # Without the key that an address may hold: nobody needs it from here on.
        return dataclasses.replace(fetched[source], location=source.public)

    return dataclasses.replace(plan.map_sources(local), model=model)


if __name__ == "__main__":
    streams.protect()
    sys.exit(main(sys.argv[1:], environment.take(os.environ)))
