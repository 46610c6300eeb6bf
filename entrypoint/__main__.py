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
import functools
import json
import logging
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from entrypoint import bake
from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.fetch import flash_attention, http
from entrypoint.fetch.doors import variables as doors
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.everything import Access, fetch_all
from entrypoint.monitor import beside as monitor
from entrypoint.notify import beside as notify
from entrypoint.planning import starting_point
from entrypoint.planning.check_report import CheckReport
from entrypoint.planning.plan import make_plan
from entrypoint.processes import farewell, supervise, upload
from entrypoint.processes.launch import Trainers
from entrypoint.processes.pod import how_to_fetch
from entrypoint.queue import run as queue
from entrypoint.queue.jobs import QUEUED, expand, tell_queue
from entrypoint.report import start as job_report
from entrypoint.report.receipt import receipt
from entrypoint.settings import Settings, given, help_env, json_schema, read_settings
from entrypoint.system import cards, environment, hardware, prices, public_addresses, secrets
from entrypoint.system.raw_value import raw_value
from entrypoint.trackers import beside as trackers
from trainer import __version__
from trainer.network import addresses
from trainer.process import scratch, streams, vitals
from trainer.spec.commands.parser import Parser
from trainer.spec.errors import KilnError, NoAcceleratorError, SettingsError, StopRequestedError
from trainer.spec.family import base_models
from trainer.spec.log_lines import log_to
from trainer.spec.messages.secrets import Known
from trainer.spec.plan import Plan
from trainer.spec.rules import outlook
from trainer.spec.values import as_integer, inside, show, some, span
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
    if arguments[:1] == ["job"]:
        from entrypoint.engines import command  # imports the Hub's client, which is slow: only now

        return command.main(arguments[1:], environ, known)
    try:
        options = _parser().parse_args(arguments)
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
    prefetch = options.command == "prefetch" and not options.check
    check = options.check or options.command == "check" or (options.gpu is not None and not prefetch)
    report = CheckReport(known)
    if options.json:
        if not check:
            print("--json belongs to --check or --help-env", file=sys.stderr)  # noqa: T201
            return 64
        logging.getLogger().addHandler(report)

    def run() -> int:
        return _ended(lambda: jobs(environ, check=check, prefetch=prefetch, card=options.gpu, report=report), environ)

    def page_afterwards(seconds: float) -> contextlib.AbstractContextManager[None]:
        return monitor.showing_after(environ, seconds)

    if prefetch:
        code = supervise.without_attempts(run, environ)
    elif check or environ.get(QUEUED):  # ON_FINISH is of a job, or of the whole queue
        code = run()
    else:
        code = supervise.supervised(run, environ, serving=page_afterwards)
    if options.json:
        logging.getLogger().removeHandler(report)
        with contextlib.suppress(BrokenPipeError):
            print(report.to_json(code), flush=True)  # noqa: T201
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="python -m entrypoint",
        description="Train a LoRA as the environment says: BASE_MODEL, DATASET_NAME, OUTPUT_PATH and more.",
    )
    commands = "train; check: validate, plan and preflight alone; prefetch: bring all that is to be downloaded, "
    commands += "without a GPU; quote: time and money on GPUs to rent; "
    commands += "sample, export: as python -m trainer.sample and trainer.export; monitor: the monitor page of a job's "
    commands += "folder; shell: bash; job: print or start the job for an engine (docs/engines.md); each with the "
    commands += "arguments that follow"
    choices = ("train", "check", "prefetch", "quote", "job", *PROGRAMS)
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
    return parser


def _ended(run: Callable[[], int], environ: Mapping[str, str] | None = None) -> int:
    """Do `run`; log its errors and turn them into exit codes. `environ`: of a job, which may be one of a queue."""
    try:
        return run()
    except StopRequestedError as problem:
        log.info("%s", problem.last_line())
        return problem.exit_code
    except KilnError as problem:
        log.error("%s", problem)
        log.error("%s [exit %d]", problem.advice, problem.exit_code)
        if environ is not None:
            tell_queue(environ, str(problem))
        return problem.exit_code
    except Exception:
        log.exception("Unexpected error.")
        log.error("%s [exit %d]", KilnError.advice, KilnError.exit_code)
        return KilnError.exit_code


def quote(environ: Mapping[str, str], *, prices_file: Path | None, as_json: bool) -> int:
    """Print what the job takes on each GPU that can be rented. Raises SettingsError where none can do it."""
    from entrypoint.planning import offers  # imports the Hub's client, which is slow: only now

    public_addresses.guard(environ)
    offered, unknown = prices.read_offers(prices_file) if prices_file else (prices.OFFERS, [])

    def table_of(own: Mapping[str, str]) -> offers.Table:
        settings, _ = doors.arrive(read_settings(own), own, retries=_checking())
        manifest = read_manifest(settings.data.dataset_config, settings.output.sample_prompts)
        # A limit is no reason to leave a GPU out: the table marks those that go beyond it.
        unlimited = dataclasses.replace(settings.finish, max_runtime=None, max_cost=None)
        asked = dataclasses.replace(settings, finish=unlimited)
        return offers.make_table(
            offered,
            lambda found: make_plan(asked, manifest, found, now=_now(own)),
            finish=settings.finish,
            token=settings.model.hf_token.reveal() if settings.model.hf_token else None,
            hub_cache=settings.model.hf_home / "hub",
        )

    each = [queued.environ for queued in expand(environ)] or [environ]
    table = offers.together([table_of(own) for own in each])
    with contextlib.suppress(BrokenPipeError):  # the reader (head, less) has closed the pipe
        print(offers.as_json(table, unknown) if as_json else offers.as_text(table, unknown), flush=True)  # noqa: T201
    return streams.output_code()


def jobs(
    environ: Mapping[str, str],
    *,
    check: bool,
    prefetch: bool = False,
    card: str | None = None,
    report: CheckReport | None = None,
) -> int:
    """One job, or all jobs of JOBS, SWEEP and a BASE_MODEL with several names; see `job`."""
    public_addresses.guard(environ)
    queued = expand(environ)
    one_job = functools.partial(job, check=check, prefetch=prefetch, card=card, report=report)
    if not queued:
        return one_job(environ)
    if not check and not prefetch:
        return queue.run_all(queued, environ)
    codes = []
    for one in queued:
        log.info("---- %s (%s)", one.name, one.place)
        codes.append(_ended(functools.partial(one_job, one.environ)))
        if report is not None:
            report.queue.append({"name": one.name, "exit_code": codes[-1], "job": report.figures})
    wrong = [one.name for one, code in zip(queued, codes, strict=True) if code]
    if wrong:
        log.error("%d of %d jobs cannot run: %s.", len(wrong), len(queued), some(wrong))
    return next((code for code in codes if code), 0)


def job(
    environ: Mapping[str, str],
    *,
    check: bool,
    prefetch: bool = False,
    card: str | None = None,
    report: CheckReport | None = None,
) -> int:
    """The whole job; returns the trainer's exit code, or 0. Raises the errors of `trainer.spec.errors`.

    `prefetch`: all that the job downloads is brought, and nothing is trained. `card`: the name of one to check for, in
    place of what this machine has. `report`: is told the plan and its figures.
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
        with notify.telling(None if check or prefetch else _whom_to_tell_all_the_same(environ), environ):
            raise
    supervise.set_limit(settings.finish, environ, began=began)
    monitor.check_token(settings.finish.monitor_token)
    told = None if check or prefetch else _whom_to_tell(settings)
    with scratch.folder(os.environ, settings.data.cache_path) as temporary, notify.telling(told, environ) as ending:
        own = {**environ, "TMPDIR": str(temporary)}
        code = _job(settings, own, check=check, prefetch=prefetch, card=card, report=report)
        ending.exit_code, ending.message = code, ""  # the trainer's own is in status.json
        if not check and not prefetch and code == 0:  # the last line of any other end has its exit code
            said = receipt(settings.output.output_path, started=began, price=settings.finish.price_per_hour)
            if said:
                log.info("%s", said)
            _say_how_to_fetch(settings, environ)
        return code


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
    *,
    check: bool,
    prefetch: bool,
    card: str | None,
    report: CheckReport | None,
) -> int:
    """`job`, with a place for temporary files."""
    retries = _checking() if check else http.USUAL
    keys = Keys.of(settings, environ)
    settings, arrivals = doors.arrive(settings, environ, retries=retries)
    manifest = read_manifest(settings.data.dataset_config, settings.output.sample_prompts)
    detected = _card_to_check_for(card) if card is not None else hardware.detect()
    kernels = hardware.TorchKernels() if card is None and detected.vendor != "cpu" else None
    plan = make_plan(settings, manifest, detected, now=_now(environ))
    if kernels is not None and plan.engine.device != "cpu":
        hardware.check_torch(detected, hardware.torch_version())
    plan = dataclasses.replace(plan, model=bake.with_baked(plan.model))
    missing = _missing_accelerator(plan, backend=settings.engine.backend)
    if missing and not check and not prefetch:
        raise missing
    plan, done = _chosen(plan, given.describe(settings))
    if report is not None:
        report.plan = plan
    _say(plan)
    token = settings.model.hf_token.reveal() if settings.model.hf_token else None
    targets = _targets(plan, settings, environ, token=token, creates=not check)
    if done:
        log.info("This job is done: %s. %s", done, choose_run.HOW_TO_GO_ON)
        left = [job for job in targets if not upload.is_done(job, done)]
        if check or prefetch or not left:
            return 0
        with upload.all_beside(left, environ) as uploaded:
            return uploaded()

    from entrypoint.planning.preflight import preflight  # imports the Hub's client, which is slow: only now
    from entrypoint.planning.summary import log_summary

    starting_point.check_state(plan)
    hub_cache = settings.model.hf_home / "hub"
    if check:  # first, since it needs no network
        summary = log_summary(plan, token=token, hub_cache=hub_cache, estimate_captions=True)
        if report is not None:
            report.figures = summary.figures
    fetches = preflight(plan, token=token, hub_cache=hub_cache, arrivals=arrivals, keys=keys, retries=retries)
    if fetches and not check:  # otherwise the trainer reads the images at once, and says the same
        plan = dataclasses.replace(plan, printed=log_summary(plan, token=token, hub_cache=hub_cache).lines)
    access = Access(token, keys, arrivals)
    if prefetch:
        fetch_all(plan, settings, access)
        log.info("Fetched: all that this job downloads is here, and is checked. Nothing was trained.")
        return 0
    if kernels is not None and plan.engine.device != "cpu":
        hardware.check_kernels(detected, kernels.names())
    if missing:
        raise missing
    with upload.all_beside(targets, environ) as uploaded:
        if check:
            log.info("Checked: this job can run. Nothing was downloaded or trained.")
            return 0
        return _trained(plan, settings, environ, access) or uploaded()


def _say(plan: Plan) -> None:
    for reason in plan.reasons:
        log.info("%s", reason)
    for detail in plan.details:
        log.debug("%s", detail)
    for warning in plan.warnings:
        log.warning("%s", warning)


def _targets(
    plan: Plan, settings: Settings, environ: Mapping[str, str], *, token: str | None, creates: bool
) -> list[upload.Job]:
    """Where the results go: a repository of the Hub, a bucket, both or neither."""
    write_token = settings.finish.hf_write_token.reveal() if settings.finish.hf_write_token else token
    push = upload.job(settings.finish.push_to_hub, write_token, plan, creates=creates)
    store = upload.store_job(settings.finish.upload_to, environ, plan, creates=creates)
    return [target for target in (push, store) if target is not None]


def _checking() -> http.RetryPolicy:
    return dataclasses.replace(http.USUAL, budget=CHECK_RETRIES_S)


def _trained(plan: Plan, settings: Settings, environ: Mapping[str, str], access: Access) -> int:
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
        with Trainers(plan, environment=environ) as trainers:
            code = tracked.exit_code = trainers.run(fetch_all(plan, settings, access))
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


if __name__ == "__main__":
    streams.protect()
    sys.exit(main(sys.argv[1:], environment.take(os.environ)))
