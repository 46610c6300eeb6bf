"""A signal only sets a flag; the job looks at it where it can stop cleanly."""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
from types import FrameType

from trainer.spec.errors import StopRequestedError

log = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopFlag:
    """Whether SIGTERM, SIGINT or SIGHUP was received; SIGHUP counts as SIGTERM."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def listen(self) -> None:
        """Handle SIGTERM, SIGINT and SIGHUP from now on; on Linux the death of the parent process sends SIGTERM."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._received)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def ignore(self) -> None:
        """Ignore signals: the first process handles them, those from a terminal or to the process group included."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def _received(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def check(self, where: str = "") -> None:
        """Raise StopRequestedError (exit code 143 or 130) if a stop was requested. `where`: for its message."""
        if self.signal is not None:
            raise StopRequestedError(f"Stopped by {signal_name(self.signal)}{where}.", exit_code=128 + self.signal)


def signal_name(number: int) -> str:
    """ "Ctrl-C" for SIGINT: that is what people press."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
