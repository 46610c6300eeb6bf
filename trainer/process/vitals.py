"""A small file in memory through which a program and its processes tell the parent what a stop would cost.

The parent (`guard`) makes it and gives its path to all children in KILN_ALIVE. It has places of fixed width, so that a
reader never waits for a writer, and needs no room on any disk:

| place | who writes | what |
| --- | --- | --- |
| deadline | the trainer's watchdog | the moment (monotonic clock) at which the trainer counts as hung |
| grace | whoever has something to lose | how many seconds it may take to stop; 0: end it at once |
| limit | the entrypoint | the moment at which MAX_RUNTIME or MAX_COST is reached |
| save, sample | the monitor page | the moment at which somebody asked for it; the trainer looks between two steps |
| stop | the monitor page | the moment at which somebody asked the job to save and end |
| last | the entrypoint | that no other start is to follow: a limit, or somebody, has ended the job on another machine |
| began | the entrypoint | when this start of the job began (Unix seconds): from then on it costs time and money |
| scratch | the entrypoint | the folder of temporary files, to be removed after the program |
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

VARIABLE = "KILN_ALIVE"
DEADLINE = 0  # offsets in bytes
GRACE = 64
LIMIT = 128
SAVE = 192
SAMPLE = 256
STOP = 320
BEGAN = 384
LAST = 448
SCRATCH = 4096
LONGEST_PATH = 4096
BETWEEN_SAVES_S = 30.0  # of those that the monitor page asks for
ANSWERED_GRACE_S = 300.0  # a trainer that has noticed the stop finishes its step and saves: a slow volume takes minutes


class Vitals:
    """The shared file, as one of the processes sees it. `descriptor` stays open as long as the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._has_answered = False

    @staticmethod
    def make() -> tuple[Vitals, str]:
        """A new one, and the path by which children of this process find it."""
        try:
            descriptor = os.memfd_create("kiln-alive")
        except OSError:  # some sandboxes: a file without a name, in whatever place works
            import tempfile

            descriptor = os.dup(tempfile.TemporaryFile(buffering=0).fileno())  # noqa: SIM115
        return Vitals(descriptor), f"/proc/{os.getpid()}/fd/{descriptor}"

    @staticmethod
    def of(environment: Mapping[str, str]) -> Vitals | None:
        """The one of this process's parent; None without a parent that guards it."""
        path = environment.get(VARIABLE)
        if not path:
            return None
        try:
            return Vitals(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError:  # the parent is gone, or /proc is hidden: nobody listens
            return None

    def close(self) -> None:
        os.close(self._descriptor)

    def write(self, place: int, value: float) -> None:
        os.pwrite(self._descriptor, f"{value:020.3f}".encode(), place)

    def read(self, place: int) -> float | None:
        """The number in `place`; None where nothing was written yet."""
        try:
            return float(os.pread(self._descriptor, 20, place).strip(b"\0"))
        except ValueError:
            return None

    def allow(self, seconds: float) -> None:
        """From now on a stop may take `seconds`; after `answer`, that stays."""
        if not self._has_answered:
            self.write(GRACE, seconds)

    def answer(self) -> None:
        """The stop was noticed, and work is being saved."""
        self.allow(ANSWERED_GRACE_S)
        self._has_answered = True

    def write_scratch(self, folder: str) -> None:
        """In place of what was there. A path that no system takes is none: cut off, it would be that of another one."""
        name = os.fsencode(folder)
        os.pwrite(self._descriptor, (name if len(name) < LONGEST_PATH else b"").ljust(LONGEST_PATH, b"\0"), SCRATCH)

    def read_scratch(self) -> str:
        return os.fsdecode(os.pread(self._descriptor, LONGEST_PATH, SCRATCH).strip(b"\0"))


def allow(environment: Mapping[str, str], seconds: float) -> None:
    """Tell the parent, if there is one, that from now on a stop may take `seconds`."""
    vitals = Vitals.of(environment)
    if vitals is not None:
        vitals.allow(seconds)
        vitals.close()


def prolong(environment: Mapping[str, str], seconds: float) -> None:
    """Ask the parent, if there is one, for so many seconds more, after a stop that was noticed."""
    vitals = Vitals.of(environment)
    if vitals is not None:
        vitals.allow((vitals.read(GRACE) or 0.0) + seconds)
        vitals.close()


def began(environment: Mapping[str, str]) -> float | None:
    """When the entrypoint began this start of the job, in Unix seconds; None where none has said so."""
    vitals = Vitals.of(environment)
    if vitals is None:
        return None
    try:
        return vitals.read(BEGAN)
    finally:
        vitals.close()


def write_began(environment: Mapping[str, str], moment: float) -> None:
    """Tell all processes of the job when it began."""
    vitals = Vitals.of(environment)
    if vitals is not None:
        vitals.write(BEGAN, moment)
        vitals.close()


def write_last(environment: Mapping[str, str]) -> None:
    """Tell the parent, if there is one, that no other start of the job is to follow this one."""
    vitals = Vitals.of(environment)
    if vitals is not None:
        vitals.write(LAST, 1)
        vitals.close()


def is_last(environment: Mapping[str, str]) -> bool:
    """Whether the job ends for good: by MAX_RUNTIME or MAX_COST, or since somebody asked for that."""
    vitals = Vitals.of(environment)
    if vitals is None:
        return False
    try:
        limit = vitals.read(LIMIT)
        is_over = limit is not None and time.monotonic() > limit
        return is_over or vitals.read(STOP) is not None or vitals.read(LAST) is not None
    finally:
        vitals.close()
