"""Standard output and errors that may fail without ending the job.

A reader goes away (`| head`), a terminal closes (EIO), a log file's volume is full, a pipe is not emptied. Python makes
errors of that in any line that prints, in libraries too, and exit code 120 when it ends. Training for hours is worth
more than a line of a log, which stands in run.log as well: `protect` replaces both streams by some that drop what
cannot be written and say so once, where anyone still listens.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
from contextlib import suppress
from typing import TextIO

log = logging.getLogger(__name__)
PATIENCE_MS = 10_000  # how long a full pipe is waited for; after that it is tried without waiting
STORAGE_EXIT_CODE = 74
NAMES = {1: "Standard output", 2: "Standard error"}


class _Tolerant(io.RawIOBase):
    """The file of a descriptor; what it does not take is dropped. `problem`: the first error."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._patience_ms = PATIENCE_MS
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self.problem: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        try:
            if not self._poll.poll(self._patience_ms):
                self._patience_ms = 0
                raise BlockingIOError(errno.EAGAIN, "nobody reads it")
            # A pipe that is ready takes this much at once.
            written = os.write(self._descriptor, data[: select.PIPE_BUF])
            self._patience_ms = PATIENCE_MS
            return written
        except OSError as problem:
            is_first = self.problem is None
            self.problem = self.problem or problem
            if is_first:
                self._report()
            return len(data)

    def _report(self) -> None:
        """Say it once: in the logs that are open, and on the other stream if these do not end there."""
        is_output = self._descriptor == 1
        if is_output and self.problem is not None and self.problem.errno == errno.EPIPE:
            return  # `| head`: who reads has what he wanted
        text = describe(self._descriptor, self.problem)
        own, other = (sys.stdout, sys.stderr) if is_output else (sys.stderr, sys.stdout)
        # Not by the handler that is writing at this moment: a stream must not be entered twice.
        handlers = [h for h in logging.getLogger().handlers if getattr(h, "stream", None) is not own]
        record = log.makeRecord(log.name, logging.WARNING, __file__, 0, text, (), None)
        for handler in handlers:
            handler.handle(record)
        if is_output and handlers:
            return
        if other is not None and problem_of(other) is None:
            with suppress(OSError, ValueError):
                print(f"WARNING {text}", file=other, flush=True)


def describe(descriptor: int, problem: OSError | None) -> str:
    """The warning about a stream that fails."""
    why = problem.strerror if problem else ""
    return f"{NAMES[descriptor]} cannot be written ({why}): lines are lost there. A job's log is in run.log as well."


def protect() -> None:
    """Replace standard output and errors, where they are those that the interpreter began with."""
    if sys.stdout is sys.__stdout__:
        sys.stdout = _protected(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _protected(sys.stderr, 2)


def _protected(stream: TextIO | None, descriptor: int) -> TextIO:
    encoding, is_immediate = "utf-8", True
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.flush()
        encoding = stream.encoding or encoding
        is_immediate = descriptor == 2 or bool(getattr(stream, "write_through", False))
    errors = "backslashreplace"  # of letters that the encoding lacks
    # Libraries that draw progress bars flush them; lines appear as soon as they are whole.
    raw = io.BufferedWriter(_Tolerant(descriptor))  # type: ignore[type-var]
    return io.TextIOWrapper(raw, encoding, errors, line_buffering=True, write_through=is_immediate)


def problem_of(stream: TextIO | None) -> OSError | None:
    """The first error of a protected stream; None where there was none."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.problem if isinstance(raw, _Tolerant) else None


def problems() -> list[str]:
    """The warning, if standard error has failed so far, for a log that is opened only now."""
    problem = problem_of(sys.stderr)
    return [] if problem is None else [describe(2, problem)]


def output_code() -> int:
    """The exit code of a command whose output is its result: 0, or 74 where the output was lost.

    A reader that has closed its pipe (`| head`) has seen what it wanted.
    """
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    problem = problem_of(sys.stdout)
    return STORAGE_EXIT_CODE if problem is not None and problem.errno != errno.EPIPE else 0
