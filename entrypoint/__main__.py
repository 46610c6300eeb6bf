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
import functools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.fetch.doors import variables as doors
from entrypoint.job import checking, job, now
from entrypoint.monitor import beside as monitor
from entrypoint.planning.check_report import CheckReport
from entrypoint.planning.plan import make_plan
from entrypoint.processes import supervise
from entrypoint.queue import run as queue
from entrypoint.queue.jobs import expand, tell_queue
from entrypoint.settings import help_env, json_schema, read_settings
from entrypoint.system import environment, prices, public_addresses, secrets
from entrypoint.system.answers import Answers
from entrypoint.system.environment import QUEUED
from entrypoint.system.machine import Machine
from trainer import __version__
from trainer.process import streams
from trainer.spec.commands.parser import Parser
from trainer.spec.errors import KilnError, StopRequestedError
from trainer.spec.log_lines import log_to
from trainer.spec.messages.secrets import Known
from trainer.spec.values import some

log = logging.getLogger("entrypoint")
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
        return code or streams.output_code()
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
        settings, _ = doors.arrive(read_settings(own), own, retries=checking())
        manifest = read_manifest(settings.data.dataset_config, settings.output.sample_prompts)
        # A limit is no reason to leave a GPU out: the table marks those that go beyond it.
        unlimited = dataclasses.replace(settings.finish, max_runtime=None, max_cost=None)
        asked = dataclasses.replace(settings, finish=unlimited)
        return offers.make_table(
            offered,
            lambda found: make_plan(asked, manifest, found, now=now(own)),
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
    machine = Machine()
    one_job = functools.partial(job, check=check, prefetch=prefetch, card=card, report=report)
    if not queued:
        return one_job(environ, answers=Answers(machine))
    if not check and not prefetch:
        return queue.run_all(queued, environ)
    codes = []
    answers = Answers(machine, several=True)
    for one in queued:
        if prefetch:  # which changes what is here
            answers = Answers(machine)
        log.info("---- %s (%s)", one.name, one.place)
        if report is not None:  # one that is refused has neither
            report.plan, report.figures = None, None
        codes.append(_ended(functools.partial(one_job, one.environ, answers=answers)))
        if report is not None:
            report.queue.append({"name": one.name, "exit_code": codes[-1], "job": report.figures})
    wrong = [one.name for one, code in zip(queued, codes, strict=True) if code]
    if wrong:
        log.error("%d of %d jobs cannot run: %s.", len(wrong), len(queued), some(wrong))
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    streams.protect()
    sys.exit(main(sys.argv[1:], environment.take(os.environ)))
