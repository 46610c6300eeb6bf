"""`python -m entrypoint.monitor OUTPUT_PATH`: the monitor page of a job that has ended, or of a downloaded folder.

With `--beside`, the process that the entrypoint starts beside a job: its standard input has a `beside.Job` as JSON on
its first line, and ends with the job.
"""

from __future__ import annotations

import os
import sys

from trainer.process import guard

if __name__ == "__main__":
    if sys.argv[1:] == ["--beside"]:
        os.nice(10)  # training comes first, also while this process loads its libraries
    else:
        guard.begin()

import argparse
import json
import logging
import secrets
import threading
from pathlib import Path

from entrypoint.monitor.actions import Actions
from entrypoint.monitor.beside import LISTENS, PORT, SHORTEST_TOKEN, page_address
from entrypoint.monitor.documents import Served
from entrypoint.monitor.live import Live
from entrypoint.monitor.server import give_way, listen, serve
from entrypoint.processes.side_process import leave_stops_to_the_job
from trainer.process import streams
from trainer.spec.commands.ending import exit_code_of
from trainer.spec.commands.parser import Parser
from trainer.spec.errors import SettingsError
from trainer.spec.log_lines import log_to
from trainer.spec.values import as_integer
from trainer.storage import json_files, run_records

log = logging.getLogger("entrypoint.monitor")
TOKEN_VARIABLE = "MONITOR_TOKEN"  # noqa: S105 (the name of a variable)
BESIDE = "--beside"
OWN_COMPUTER = "127.0.0.1"


def main(arguments: list[str]) -> int:
    """Serve until the process is stopped. Exit codes as in `trainer.spec.errors`; 64 for a wrong command line."""
    parser = Parser(prog="python -m entrypoint monitor", description="Show the monitor page of a job in a browser.")
    parser.add_argument("folder", help="OUTPUT_PATH of the job, here or downloaded")
    parser.add_argument("--port", type=_port, default=PORT, help=f"where the page is served ({PORT}); 0: a free one")
    others = "address to listen on: 0.0.0.0 lets other computers ask (they still need the token)"
    parser.add_argument("--host", default=OWN_COMPUTER, help=others)
    parser.add_argument("--price-per-hour", type=float, help="of the machine, for the cost")
    options = parser.parse_args(arguments)
    log_to(logging.StreamHandler(), "%(levelname)s %(message)s")
    out = Path(options.folder).expanduser().absolute()
    if json_files.read_object(out / "status.json") is None and run_records.read_plan(out / "plan.json") is None:
        raise SettingsError(f"{options.folder} is not the output of a job: it has neither status.json nor plan.json.")
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token and len(token) < SHORTEST_TOKEN:
        raise SettingsError(f"{TOKEN_VARIABLE} is too short. Allowed: {SHORTEST_TOKEN} characters or more.")
    shown = "" if token else secrets.token_urlsafe(SHORTEST_TOKEN)
    listening = listen(options.host, options.port)
    log.info("The monitor page: %s", page_address(os.environ, port=listening.getsockname()[1], token=shown))
    serve(listening, Live(Served(out, price=options.price_per_hour)), token or shown)
    return 0


def _port(text: str) -> int:
    number = as_integer(text.strip())
    if number is None or not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return number


def beside() -> int:
    """Serve beside a job, until standard input ends; returns the exit code where it cannot."""
    leave_stops_to_the_job()
    job = json.loads(sys.stdin.readline())
    log_to(logging.StreamHandler(), "%(asctime)s %(levelname)s %(message)s")

    def leave() -> None:
        sys.stdin.readline()
        os._exit(0)

    give_way()
    threading.Thread(target=leave, daemon=True).start()
    actions = Actions(os.environ) if job["started"] else None  # nobody hears what is asked for after the end
    names = actions.names if actions else ()
    about = {"started": job["started"], "price": job["price"], "is_queued": job["is_queued"]}
    served = Served(Path(job["out"]), actions=names, is_own_plan=True, **about)
    listening = listen("0.0.0.0", job["port"])  # noqa: S104 # nosec B104 (of a container)
    sys.stdout.write(f"{LISTENS}\n")
    sys.stdout.flush()
    serve(listening, Live(served), job["token"], actions)
    return 0


if __name__ == "__main__":
    streams.protect()
    is_beside = sys.argv[1:] == [BESIDE]
    sys.exit(exit_code_of(beside if is_beside else lambda: main(sys.argv[1:]), log))
