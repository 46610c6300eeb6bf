"""A parent process that ends its program when that is asked for, whatever the program is doing.

A handler of signals in Python runs when the main thread next runs Python. That may take half a minute while libraries
load, and for ever in a call that does not return: a read from a pipe that nobody fills, a dead network volume, a
library that keeps Python's lock. So every command begins with `begin()`, which splits it in two, before anything else
is imported. The child does the work. The parent imports nothing, waits, and ends with the child's exit code.

What the parent does when it gets SIGTERM, SIGINT or SIGHUP depends on what the child would lose (`vitals`):
- nothing (grace 0, from the start on): it kills the child with all its descendants at once. All that the child writes
  is made to survive a kill: downloads resume, files appear under their names when they are complete.
- otherwise it passes the signal on, and kills only after the grace. A trainer that answers gets the time to save.
It says how the program ended where the child did not, and exits with 143, or 130 for Ctrl-C.

The parent blocks these signals and takes them from the kernel's queue (sigtimedwait): there is no handler, so nothing
can interrupt anything half-way, and as the first process of a container it loses none.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, NoReturn

from trainer.process import memory_kills
from trainer.process.vitals import GRACE, LAST, LIMIT, STOP, VARIABLE, Vitals

STOPS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
TICK_S = 1.0  # between two looks at the limit of time, without a signal
STOPPING_TICK_S = 0.05  # between two looks at the grace, which the trainer may prolong
END_S = 1.0  # a killed process may be in a call of the kernel that does not end: it is left behind then
FAREWELL_S = 0.8  # for the last line and status.json: the terminal or the volume may not answer
UNSHARED_GRACE_S = 10.0  # where the child cannot reach `vitals`
KILLED_EXIT_CODE = 75  # killed for memory, or by someone else: worth another try
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
STOP_ASKED = "The monitor page asks this job to stop. It saves its state and ends."
LIMIT_REACHED = "MAX_RUNTIME or MAX_COST is reached. The job saves its state and ends."


class Ending(NamedTuple):
    """How a guarded program ended.

    `stop`: the signal that asked for it (SIGTERM for SIGHUP, which means the same). `killed`: by us, since it did not
    answer in time. `cause`: what is known of a kill that was not ours, in one sentence. `on_page`: the monitor page
    asked for it.
    """

    exit_code: int
    started: float  # Unix seconds
    stop: int | None = None
    limit_reached: bool = False
    killed: bool = False
    cause: str = ""
    on_page: bool = False

    @property
    def stopped_how(self) -> str:
        """For a sentence: "Stopped by SIGTERM"."""
        return stopped_how(self.stop or 0, on_page=self.on_page)

    def line(self) -> str:
        """What to print where the program could not; "" where it has said itself how it ended."""
        if self.cause:
            return f"{self.cause} [exit {self.exit_code}]"
        if not self.killed or self.stop is None:
            return ""
        return f"{self.stopped_how}. [exit {self.exit_code}]"


def signal_name(number: int) -> str:
    """ "Ctrl-C" for SIGINT: that is what people press."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def stopped_how(number: int, *, on_page: bool) -> str:
    """For a sentence. `number`: of the signal by which the program learns it."""
    return "Stopped on the monitor page" if on_page else f"Stopped by {signal_name(number)}"


def say(ending: Ending) -> None:
    """Print the last line of a command on stderr, unless the command has."""
    if ending.line():
        print_text(ending.line())


def begin(farewell: str = __name__) -> None:
    """Split this process in two. The child returns; the parent never does: it ends with the child's exit code.

    Called by the first lines of a command. `farewell`: the module whose `say` is called where the program was asked to
    stop or was killed, in a process of its own and with a limit of time. The parent imports it while the child works.
    Does nothing where there is no Linux, and in a program that replaces one that did it.
    """
    if sys.platform != "linux" or os.environ.get(VARIABLE):
        return
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: else the next file that is opened would get what is printed
            os.open(os.devnull, os.O_RDWR)
    ending = _split(None, farewell)
    if ending is not None:
        os._exit(ending.exit_code)


def guarded(work: Callable[[], int], farewell: str = __name__) -> Ending:
    """Do `work` in a child, as `begin` does; returns how it ended. For a program that has things to do afterwards."""
    if sys.platform != "linux":
        return Ending(work(), time.time())
    ending = _split(work, farewell)
    assert ending is not None
    return ending


def _split(work: Callable[[], int] | None, farewell: str) -> Ending | None:
    """Fork; in the parent, return how the child ended. The child does `work` and ends; without `work`, returns None."""
    heard = set(STOPS)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: stays ignored, in all processes of the job
        heard.discard(signal.SIGHUP)
    # A launcher may have left it ignored; then nobody would learn how a child has ended.
    before_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heard | {signal.SIGCHLD})
    strangers = set(_children())
    vitals, path = Vitals.make()
    vitals.write(GRACE, 0)
    watch = _Watch(vitals, heard)
    parent = os.getpid()
    watch.child = os.fork()
    if watch.child == 0:
        _begin_child(parent, vitals, path)
        signal.pthread_sigmask(signal.SIG_SETMASK, before - STOPS - {signal.SIGCHLD})
        if work is None:
            return None
        _work(work)
    try:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what the child leaves behind becomes ours, so that we can end it
        farewell_say = _loaded(farewell)
        ending = watch.run()
        _end_children(strangers)
        _say(farewell_say, ending, vitals.read_scratch())
    finally:
        vitals.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGCHLD, before_child or signal.SIG_DFL)
    return ending


def _loaded(farewell: str) -> Callable[[Ending], None]:
    """The function `say` of that module."""
    try:
        return importlib.import_module(farewell).say
    except ImportError:  # an incomplete installation: the child says so
        return say


def _begin_child(parent: int, vitals: Vitals, path: str) -> None:
    """The child dies when it is told to, and when its parent dies; what a terminal sends to all is the parent's."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGTERM)
    os.environ[VARIABLE] = path
    shared = Vitals.of(os.environ)
    if shared is None:  # some sandboxes: we cannot learn what would be lost, and always pass the signal on
        del os.environ[VARIABLE]
        vitals.write(GRACE, UNSHARED_GRACE_S)
    else:
        shared.close()


def _work(work: Callable[[], int]) -> NoReturn:
    """In the child: `work`, and the end."""
    code = 70
    try:
        code = work()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        if sys.exc_info()[0] is not None:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


class _Watch:
    """The parent's wait for its child."""

    def __init__(self, vitals: Vitals, heard: set[signal.Signals]) -> None:
        self.child = 0
        self.vitals = vitals
        self.heard = heard
        self.started = time.time()
        self.kills_before = memory_kills.count()
        self.ignores_terminal = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        self.stop: int | None = None
        self.stopped_at = 0.0
        self.limit_reached = False
        self.on_page = False
        self.killed_at: float | None = None

    def run(self) -> Ending:
        while True:
            tick = TICK_S if self.stop is None else STOPPING_TICK_S
            found = signal.sigtimedwait(self.heard | {signal.SIGCHLD}, tick)
            status = self._reaped()
            if status is not None:
                return self._ending(os.waitstatus_to_exitcode(status))
            if found is not None and found.si_signo in self.heard and not self._is_for_others(found):
                self._ask(found.si_signo)
            self._look_at_clock()
            if self.killed_at is not None and time.monotonic() > self.killed_at + END_S:
                return self._ending(-signal.SIGKILL)

    def _is_for_others(self, found: signal.struct_siginfo) -> bool:
        """Whether a terminal sent it (Ctrl-C) while we run in the background of a script, which ignores that.

        The kernel's own signals have a positive code, those of `kill` none: someone who sends SIGINT means it.
        """
        return found.si_signo == signal.SIGINT and self.ignores_terminal and found.si_code > 0

    def _reaped(self) -> int | None:
        """The child's status, if it has ended. Orphans that have become ours are reaped as well."""
        while True:
            try:
                number, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return None
            if number == 0:
                return None
            if number == self.child:
                return status

    def _ask(self, number: int) -> None:
        """Pass the first request on; those that follow ask for the same."""
        if self.stop is not None:
            return
        self.stop = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        self.stopped_at = time.monotonic()
        if self._grace() > 0:
            os.kill(self.child, self.stop)

    def _look_at_clock(self) -> None:
        limit = self.vitals.read(LIMIT)
        if self.stop is None and limit is not None and time.monotonic() > limit:
            self.limit_reached = True
            print_text(LIMIT_REACHED)
            self._ask(signal.SIGTERM)
        if self.stop is None and self.vitals.read(STOP) is not None:
            self.limit_reached = True  # a pod is not to start the job again
            self.on_page = True
            print_text(STOP_ASKED)
            self._ask(signal.SIGTERM)
        if self.stop is None or self.killed_at is not None:
            return
        if time.monotonic() >= self.stopped_at + self._grace():
            self.killed_at = time.monotonic()
            os.kill(self.child, signal.SIGKILL)

    def _grace(self) -> float:
        return self.vitals.read(GRACE) or 0.0

    def _ending(self, code: int) -> Ending:
        """How the child ended, by its exit code; minus a signal's number if that ended it."""
        stop = self.stop
        if code == -signal.SIGTERM:
            stop = stop or signal.SIGTERM  # sent to the child alone
        cause = ""
        is_killed = stop is not None and code < 0
        if is_killed:
            assert stop is not None
            code = 128 + stop
        elif code == -signal.SIGKILL:
            code = KILLED_EXIT_CODE
            cause = f"The program {memory_kills.explain(self.kills_before)}"
        elif code < 0:
            cause = f"The program was ended by {signal.Signals(-code).name}."
            code = 128 - code
        return Ending(
            code,
            self.started,
            stop,
            limit_reached=self.limit_reached or self.vitals.read(LAST) is not None,
            killed=is_killed,
            cause=cause,
            on_page=self.on_page,
        )


def _end_children(strangers: set[int]) -> None:
    """Kill and reap all children but `strangers`, and what becomes ours when they end."""
    end = time.monotonic() + END_S
    while time.monotonic() < end:
        left = [number for number in _children() if number not in strangers]
        if not left:
            return
        for number in left:
            os.kill(number, signal.SIGKILL)
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                return
        time.sleep(0.005)


def _children() -> list[int]:
    """The processes whose parent this one is, zombies included."""
    own = str(os.getpid())
    try:
        with open(f"/proc/self/task/{own}/children", encoding="ascii") as file:  # noqa: PTH123
            return [int(number) for number in file.read().split()]
    except OSError:  # a kernel without this file
        pass
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 (pathlib is slow to import)
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
                fields = file.read().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[1] == own:
            found.append(int(name))
    return found


def _say(say: Callable[[Ending], None], ending: Ending, scratch: str) -> None:
    """Say how the program ended, where it was stopped or killed, and remove its temporary files.

    In a process of its own: the terminal, or the volume of status.json, may not answer.
    """
    is_told = ending.stop is None and not ending.cause
    if is_told and not (scratch and os.path.isdir(scratch)):  # noqa: PTH112
        return
    number = os.fork()
    if number == 0:
        try:
            if not is_told:
                say(ending)
            if scratch:
                import shutil

                shutil.rmtree(scratch, ignore_errors=True)
        finally:
            os._exit(0)
    end = time.monotonic() + FAREWELL_S
    while os.waitpid(number, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(number, signal.SIGKILL)
            return
        time.sleep(0.005)


def print_text(text: str) -> None:
    """Print a line on stderr, if that takes it at once."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if poll.poll(100):
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())


def _prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, value)
