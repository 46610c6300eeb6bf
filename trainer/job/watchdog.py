"""A job that stands still is ended with exit code 75, and tells where each thread stood.

A thread of the trainer does it as long as Python runs. Where a call keeps the interpreter's lock, or the process is
stopped, the entrypoint does it: the trainer keeps its deadline in the file that KILN_ALIVE names.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.spec.errors import HangError

log = logging.getLogger(__name__)
TIMES, LEAST_S = 20, 300.0  # a step may take this many times the usual, and this long in any case
OTHER_S = 3600.0  # between two signs of life outside of the steps: loading, compiling, a sample
ALIVE = "KILN_ALIVE"


class Watchdog:
    """Told of each sign of life. `timeout_s`: for a step; None: by what is usual; 0: never."""

    def __init__(self, timeout_s: float | None, *, alive: Path | None = None) -> None:
        self.timeout_s = timeout_s
        self.usual: deque[float] = deque(maxlen=32)  # seconds a step
        self.limit = OTHER_S
        self._step: float | None = None  # when the last step ended, if nothing else came after it
        self._alive = os.open(alive, os.O_WRONLY | os.O_CREAT) if alive else None
        self.heartbeat()

    def heartbeat(self) -> None:
        """Something other than a step goes on."""
        self._step = None
        self._promise(OTHER_S)

    def step(self) -> None:
        """A step is done, and the next one follows."""
        now = time.monotonic()
        if self._step is not None:
            self.usual.append(now - self._step)
        self._step = now
        by_time = max(LEAST_S, TIMES * statistics.median(self.usual)) if self.usual else OTHER_S
        self._promise(self.timeout_s or by_time)

    def _promise(self, limit: float) -> None:
        self.limit, self.deadline = limit, time.monotonic() + limit
        if self._alive is not None and self.timeout_s != 0:
            # The clock is the machine's: another process compares it with its own. Some more, as this one comes first.
            os.pwrite(self._alive, f"{self.deadline + 2 + 0.05 * limit:020.3f}".encode(), 0)

    def message(self) -> str:
        usual = f", usually {statistics.median(self.usual):.1f} s" if self.usual else ""
        return f"Nothing has happened for {self.limit:.0f} s{usual}: the job hangs. Each thread's place is in hang.txt."

    @contextlib.contextmanager
    def watching(self, out: Path, on_hang: Callable[[HangError], None]) -> Iterator[None]:
        """Inside, a missed deadline ends the process; `on_hang` may tell of it before."""
        if self.timeout_s == 0:
            yield
            return
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(min(5.0, self.limit / 20)):
                if time.monotonic() > self.deadline:
                    self._end(out, on_hang)

        threading.Thread(target=watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _end(self, out: Path, on_hang: Callable[[HangError], None]) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
        problem = HangError(self.message())
        try:
            with (out / "hang.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file=file)
            on_hang(problem)
            log.error("%s [exit %d]", problem.advice, problem.exit_code)
        finally:
            os._exit(HangError.exit_code)  # nothing else ends a process whose main thread hangs
