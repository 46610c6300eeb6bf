"""`python -m entrypoint.trackers`: the process that tracks a job. Its first line is a `beside.Job` as JSON.

What else it reads from its standard input, and when it ends: `entrypoint.processes.side_process`.

First it brings the library into the cache, and starts itself again with it. Nothing that the library does may reach the
job: its words go into a file that is read only where it fails, and whatever it raises ends this process alone.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from entrypoint.processes.side_process import HAS_FAILED, Instructions, leave_stops_to_the_job
from entrypoint.system import public_addresses, secrets
from entrypoint.trackers import install
from entrypoint.trackers.beside import FOUND, TRACKER, Job
from entrypoint.trackers.feed import Feed
from trainer.spec.errors import KilnError
from trainer.spec.log_lines import log_to
from trainer.spec.messages.secrets import without_secrets

log = logging.getLogger("entrypoint.trackers")
POLL_S = 2.0
LAST_WORDS = 300  # characters of what a library has said, where it fails


def main() -> int:
    """Track until the job has ended; returns 0, or HAS_FAILED where the library has failed."""
    leave_stops_to_the_job()
    tracker = os.environ[TRACKER]
    with secrets.hidden(dict(os.environ)) as known:
        # Our own lines keep the terminal; what the library prints to either stream does not get there.
        own = os.fdopen(os.dup(2), "w", encoding="utf-8", buffering=1)
        log_to(logging.StreamHandler(own), "%(asctime)s %(levelname)s %(message)s", known=known)
        logging.getLogger().handlers[0].addFilter(logging.Filter("entrypoint"))
        try:
            if FOUND not in os.environ:
                _start_with(install.installed(tracker, Path(os.environ["CACHE_PATH"])))
        except KilnError as problem:
            log.warning("%s Training goes on without it; TensorBoard's files are written as always.", problem)
            return HAS_FAILED
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as words:
            os.dup2(words.fileno(), 1)
            os.dup2(words.fileno(), 2)
            try:
                return _track(tracker)
            except Exception as problem:  # noqa: BLE001 (whatever a library raises)
                words.seek(0)
                said = (str(problem).strip() or words.read().strip())[-LAST_WORDS:]
                shown = without_secrets(known.hide(" ".join(said.split())))
                text = "LOG_WITH=%s: the library has failed (%s: %s). The job goes on; TensorBoard has everything."
                log.warning(text, tracker, type(problem).__name__, shown)
                return HAS_FAILED


def _start_with(folders: list[str]) -> NoReturn:
    """This program again, with the library; its standard input has not been read yet."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    own["PYTHONPATH"] = os.pathsep.join([*folders, own.get("PYTHONPATH", "")])
    own[FOUND] = "1"
    os.execve(sys.executable, [sys.executable, "-m", "entrypoint.trackers"], own)  # noqa: S606 (our own program)


def _track(name: str) -> int:
    public_addresses.guard(os.environ)
    instructions = Instructions()
    job = Job(**instructions.first)
    feed = Feed(Path(job.out), tracker=name, started=job.started)
    tracker: Any = None
    while True:
        is_last = instructions.ended.wait(POLL_S)
        if tracker is None and (about := feed.begun()) is not None:
            tracker = importlib.import_module(f"entrypoint.trackers.{name}_run").Run(about)
            log.info("LOG_WITH=%s: this run is in %s.", name, tracker.where)
        if tracker is not None:
            feed.send(tracker)
        if is_last:
            break
    if tracker is not None:
        tracker.finish(exit_code=instructions.exit_code)
    return 0


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code)  # threads of the library, and the one that reads
