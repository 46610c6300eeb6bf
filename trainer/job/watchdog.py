"""Ends a job that hangs with exit code 75, and leaves the stacks of all threads in hang.txt.

A thread of the trainer checks the deadline as long as Python runs. Where a call keeps the interpreter's lock, or the
process is stopped, that thread cannot run: so the trainer also keeps its deadline in the file that KILN_ALIVE names
(trainer/process/vitals.py), and the entrypoint (entrypoint/processes/launch.py) ends it.

In the same file stands how long a stop may take until the trainer notices it: a moment while there is nothing to lose,
and as long as its steps need once there is.
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

from trainer.process import vitals
from trainer.process.vitals import Vitals
from trainer.spec.errors import HangError

log = logging.getLogger(__name__)

# A step may take 20 times the usual, so that a machine that others slow down tenfold raises no false alarm
# (tests/faults/test_hang.py), and 300 s in any case.
TIMEOUT_IN_MEDIAN_STEPS = 20
MIN_STEP_TIMEOUT_S = 300.0
# Between two signs of life outside of the steps: loading, compiling, a sample.
OUTSIDE_STEPS_TIMEOUT_S = 3600.0
MEDIAN_WINDOW_STEPS = 32
MAX_CHECK_INTERVAL_S = 5.0
# How long a stop may take until it is noticed: before training; during it at least, and while a sample is drawn.
NOTHING_LOST_GRACE_S = 2.0
MIN_STEP_GRACE_S = 3.0
SAMPLE_GRACE_S = 60.0
GRACE_WINDOW = 8  # pieces of work of which the longest is the measure


class Watchdog:
    """Keeps the deadline for the next sign of life, and ends the process when it is missed.

    `timeout_s`: for a step; None: by the median of the last steps; 0: never. `shared`: the file that gets the deadline.
    """

    def __init__(self, timeout_s: float | None, *, shared: Vitals | None = None) -> None:
        self.timeout_s = timeout_s
        self.step_seconds: deque[float] = deque(maxlen=MEDIAN_WINDOW_STEPS)
        self.limit = OUTSIDE_STEPS_TIMEOUT_S
        self._last_step: float | None = None  # when the last step ended, if nothing else came after it
        self._last_sign = time.monotonic()
        self._recent: deque[float] = deque(maxlen=GRACE_WINDOW)  # seconds between signs of life during training
        self._shared = shared
        self.heartbeat()

    def heartbeat(self) -> None:
        """A sign of life outside of the steps."""
        self._last_step = None
        self._last_sign = time.monotonic()
        self._allow(SAMPLE_GRACE_S if self._recent else NOTHING_LOST_GRACE_S)
        self._set_deadline(OUTSIDE_STEPS_TIMEOUT_S)

    def others_take(self, seconds: float) -> None:
        """This process has done its share in so many seconds, and waits for the others, which began with it."""
        self._last_step = None
        self._last_sign = time.monotonic()
        limit = max(self.timeout_s or MIN_STEP_TIMEOUT_S, TIMEOUT_IN_MEDIAN_STEPS * seconds)
        self._set_deadline(min(limit, OUTSIDE_STEPS_TIMEOUT_S))

    def step(self) -> None:
        """A step is done, and the next one follows."""
        now = time.monotonic()
        if self._last_step is not None:
            self.step_seconds.append(now - self._last_step)
        self._last_step = now
        self._recent.append(now - self._last_sign)
        self._last_sign = now
        self._allow(max(MIN_STEP_GRACE_S, 1 + 2 * max(self._recent)))
        limit = OUTSIDE_STEPS_TIMEOUT_S
        if self.step_seconds:
            limit = max(MIN_STEP_TIMEOUT_S, TIMEOUT_IN_MEDIAN_STEPS * statistics.median(self.step_seconds))
        self._set_deadline(self.timeout_s or limit)

    def _allow(self, seconds: float) -> None:
        if self._shared is not None:
            self._shared.allow(seconds)

    def _set_deadline(self, limit: float) -> None:
        self.limit = limit
        self.deadline = time.monotonic() + limit
        if self._shared is not None and self.timeout_s != 0:
            # The monotonic clock is the machine's, so the entrypoint can compare the deadline with its own. It gets
            # 2 s + 5 % more, for this process's own thread, which can say more, is to act first.
            self._shared.write(vitals.DEADLINE, self.deadline + 2 + 0.05 * limit)

    def message(self) -> str:
        usual = f", usually {statistics.median(self.step_seconds):.1f} s" if self.step_seconds else ""
        return f"No step for {self.limit:.0f} s{usual}: the job hangs. hang.txt has the stacks of all threads."

    @contextlib.contextmanager
    def watching(self, out: Path, on_hang: Callable[[HangError], None]) -> Iterator[None]:
        """Inside, a missed deadline ends the process; `on_hang` is called with the reason before that."""
        if self.timeout_s == 0:
            yield
            return
        done = threading.Event()

        def watch() -> None:
            while not done.wait(min(MAX_CHECK_INTERVAL_S, self.limit / 20)):
                if time.monotonic() > self.deadline:
                    self._end_process(out, on_hang)

        threading.Thread(target=watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _end_process(self, out: Path, on_hang: Callable[[HangError], None]) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
        problem = HangError(self.message())
        try:
            with (out / "hang.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file=file)
            on_hang(problem)
            log.error("%s [exit %d]", problem.advice, problem.exit_code)
        finally:
            os._exit(HangError.exit_code)  # nothing else ends a process whose main thread hangs
