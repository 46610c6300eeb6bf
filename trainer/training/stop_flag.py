"""A signal only sets a flag; the job looks at it where it can stop cleanly."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

from trainer.process.guard import PR_SET_PDEATHSIG, print_text, stopped_how
from trainer.process.vitals import STOP, Vitals
from trainer.spec.errors import StopRequestedError


class StopFlag:
    """Whether SIGTERM, SIGINT or SIGHUP was received; SIGHUP counts as SIGTERM.

    `vitals`: through which the parent learns that the stop was noticed, so that it waits for the save.
    """

    def __init__(self, vitals: Vitals | None = None) -> None:
        self.signal: int | None = None
        self.vitals = vitals
        self.ends_at_once = False  # while there is nothing to lose and nobody who looks at the flag: imports

    def listen(self) -> None:
        """Handle SIGTERM, SIGINT and SIGHUP from now on; on Linux the death of the parent process sends SIGTERM.

        A SIGHUP that is ignored stays so: nohup did that, or the parent, which then handles it.
        """
        numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.discard(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self._received)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # whoever started us may have blocked them
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def ignore(self) -> None:
        """Ignore signals: the first process handles them, those from a terminal or to the process group included."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def _received(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if self.ends_at_once:
            problem = self._problem(" before training began")
            if self.vitals is None:  # else our parent says it, as it does for a trainer that had no handler yet
                print_text(f"{time.strftime('%H:%M:%S')} INFO {problem.last_line()}")
            os._exit(problem.exit_code)

    @property
    def requested(self) -> bool:
        """Whether to stop. If the main thread asks, the parent learns that work is being saved."""
        if self.signal is None:
            return False
        if self.vitals is not None and threading.current_thread() is threading.main_thread():
            self.vitals.answer()
        return True

    def check(self, where: str = "") -> None:
        """Raise StopRequestedError (exit code 143 or 130) if a stop was requested. `where`: for its message."""
        if self.signal is not None:
            raise self._problem(where)

    def _problem(self, where: str) -> StopRequestedError:
        number = self.signal or signal.SIGTERM
        on_page = self.vitals is not None and self.vitals.read(STOP) is not None
        return StopRequestedError(f"{stopped_how(number, on_page=on_page)}{where}.", exit_code=128 + number)
