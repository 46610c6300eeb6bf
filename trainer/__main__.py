"""`python -m trainer plan.json`: run one plan; map failures to exit codes.

With `--wait` the libraries are loaded first, and the plan is read when the standard input ends: whoever started us
fetches meanwhile. Without a plan by then it has thought better of it.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TextIO

from trainer.process import streams
from trainer.process.vitals import Vitals
from trainer.spec import library_noise
from trainer.spec.errors import KilnError, SettingsError, StopRequestedError
from trainer.spec.log_lines import log_to
from trainer.spec.plan import RANK_VARIABLE, TEAM_VARIABLE, Plan
from trainer.training.stop_flag import StopFlag

log = logging.getLogger("trainer")
USAGE_ERROR = 64  # BSD sysexits


def main(arguments: list[str]) -> int:
    """Exit codes as in `trainer.spec.errors`; 64 for a wrong command line."""
    waits = arguments[:1] == ["--wait"]
    if len(arguments) != 1 + waits:
        print("usage: python -m trainer [--wait] plan.json", file=sys.stderr)  # noqa: T201
        return USAGE_ERROR
    path = Path(arguments[-1])
    process_rank = int(os.environ.get(RANK_VARIABLE, "0"))
    stop = StopFlag(Vitals.of(os.environ) if process_rank == 0 else None)
    if process_rank == 0:
        stop.ends_at_once = True
        stop.listen()
    else:
        stop.ignore()
    # The entrypoint sends SIGUSR1 to a process that hangs, to log its stacks.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=_stacks_file(process_rank))
    _configure_logging(process_rank)
    try:
        if not waits:
            plan = _read_plan(path)
        started = time.monotonic()
        log.info("Loading torch and diffusers, which takes 5 to 30 s.")
        from trainer.job.run import run  # late: torch is slow to import, and signals are handled by now

        log.info("Loaded them in %.1f s.", time.monotonic() - started)
        if waits:
            with open(0, "rb", closefd=False) as told:
                told.read()
            if not path.exists():
                return 0
            plan = _read_plan(path)
        stop.ends_at_once = False
        run(plan, stop)
    except StopRequestedError as problem:
        if not problem.logged:
            log.info("%s", problem.last_line())
        return problem.exit_code
    except KilnError as problem:
        if not problem.logged:  # there was no run.log yet
            log.error("%s", problem)
        log.error("%s [exit %d]", problem.advice, problem.exit_code)
        return problem.exit_code
    except Exception:
        log.exception("Unexpected error.")
        log.error("%s [exit %d]", KilnError.advice, KilnError.exit_code)
        return KilnError.exit_code
    return 0


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise SettingsError(f"{path}: {problem}") from problem


def _configure_logging(process_rank: int) -> None:
    """Of several processes the first logs everything; the others log warnings, with their number."""
    prefix = ""
    level = logging.INFO
    if process_rank:
        prefix = f"[process {process_rank}] "
        level = logging.WARNING
    log_to(logging.StreamHandler(), f"%(asctime)s %(levelname)s {prefix}%(message)s", level=level)
    library_noise.silence()


def _stacks_file(process_rank: int) -> TextIO:
    """Where stacks are written on SIGUSR1: stderr; for each of several processes a file in their folder."""
    team_folder = os.environ.get(TEAM_VARIABLE)
    if team_folder:
        return (Path(team_folder) / f"stacks-{process_rank}.txt").open("w", encoding="utf-8")
    return sys.__stderr__ or sys.stderr


if __name__ == "__main__":
    streams.protect()
    code = main(sys.argv[1:])
    if code == USAGE_ERROR:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. The libraries' own ends take seconds on a busy machine, and a signal would find no handler there.
    os._exit(code)
