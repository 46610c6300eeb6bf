"""`python -m trainer plan.json`: run one plan; map failures to exit codes."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TextIO

from trainer.spec.errors import KilnError, SettingsError
from trainer.spec.plan import RANK_VARIABLE, TEAM_VARIABLE, Plan
from trainer.training.stop_flag import StopFlag

log = logging.getLogger("trainer")
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def main(arguments: list[str]) -> int:
    """Exit codes as in `trainer.spec.errors`; 64 for a wrong command line."""
    if len(arguments) != 1:
        print("usage: python -m trainer plan.json", file=sys.stderr)  # noqa: T201
        return 64
    stop, number = StopFlag(), int(os.environ.get(RANK_VARIABLE, "0"))
    (stop.ignore if number else stop.listen)()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=_stacks(number))  # the entrypoint asks where a job that hangs stands
    of, level = (f"[process {number}] ", logging.WARNING) if number else ("", logging.INFO)
    logging.basicConfig(format=f"%(asctime)s %(levelname)s {of}%(message)s", datefmt="%H:%M:%S", level=level)
    os.environ.update(QUIET)
    for chatty in ("torchao", "torch.utils._pytree", "bitsandbytes", "PIL"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        try:
            plan = Plan.from_json(Path(arguments[0]).read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise SettingsError(f"{arguments[0]}: {problem}") from problem
        from trainer.job.run import run  # torch is imported only now, when signals are handled

        run(plan, stop)
    except KilnError as problem:
        if not problem.logged:  # before there was a run.log to tell it in
            log.error("%s", problem)
        log.error("%s [exit %d]", problem.advice, problem.exit_code)
        return problem.exit_code
    except Exception:
        log.exception("Unexpected error.")
        log.error("%s [exit %d]", KilnError.advice, KilnError.exit_code)
        return KilnError.exit_code
    return 0


def _stacks(number: int) -> TextIO:
    """Where it is told what each thread does; of several processes each has a file of its own, to be read apart."""
    team = os.environ.get(TEAM_VARIABLE)
    return (Path(team) / f"stacks-{number}.txt").open("w", encoding="utf-8") if team else sys.__stderr__ or sys.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
