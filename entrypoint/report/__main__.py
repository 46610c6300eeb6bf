"""`python -m entrypoint.report OUTPUT_PATH`: write report.html and README.md of the run that was trained there last."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.process import guard

if __name__ == "__main__":
    guard.begin()

import logging

from entrypoint.report import card, page
from entrypoint.report.gather import Gathered, gather
from trainer.process import streams
from trainer.spec.commands.ending import exit_code_of
from trainer.spec.commands.parser import Parser
from trainer.spec.errors import SettingsError
from trainer.spec.log_lines import log_to
from trainer.storage import atomic, json_files, own_files

log = logging.getLogger("entrypoint.report")
REPORT = "report.html"


def main(arguments: list[str]) -> int:
    """Exit codes as in `trainer.spec.errors`; 64 for a wrong command line."""
    parser = Parser(prog="python -m entrypoint.report", description="Write report.html and README.md of a job.")
    parser.add_argument("folder", help="OUTPUT_PATH of the job, here or downloaded")
    parser.add_argument("--price-per-hour", type=float, help="of the machine, for the cost")
    options = parser.parse_args(arguments)
    log_to(logging.StreamHandler(), "%(levelname)s %(message)s")
    out = Path(options.folder).expanduser().absolute()
    run = gather(out)
    if not run.status and run.plan is None:
        raise SettingsError(f"{options.folder} is not the output of a job: it has neither status.json nor plan.json.")
    write(run, price=options.price_per_hour)
    log.info("Wrote %s and %s.", run.home / REPORT, run.home / card.NAME)
    return 0


def write(run: Gathered, *, price: float | None) -> None:
    """Write both files. Raises StorageError."""
    json_files.set_aside_unless(run.home / REPORT, own_files.is_html_report)
    atomic.write_text(run.home / REPORT, page.page(run, price=price))
    has_sheet = (run.home / "sample" / own_files.SHEET_NAME).is_file()
    json_files.set_aside_unless(run.home / card.NAME, card.is_own)
    atomic.write_text(run.home / card.NAME, card.card(run, samples="sample" if has_sheet else None))


if __name__ == "__main__":
    streams.protect()
    sys.exit(exit_code_of(lambda: main(sys.argv[1:]), log))
