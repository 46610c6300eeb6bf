"""A fork of this process becomes what a new interpreter with other arguments and another environment would be.

What a fork keeps and a new interpreter would not have is put away: handlers of signals and of logs, variables, open
files, what is to be done at exit. Imported modules stay, which is the point. Two things stay that a new interpreter
would not share: the seed of hashes, so that one test compares with a real interpreter, and the number of OpenMP's
threads, which is 1 (libgomp reads it once).
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.machinery
import importlib.util
import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import resource_tracker
from typing import Any, NoReturn

# Constants of the Hub's client come from the environment when it is imported: the entrypoint imports it anew.
READS_ENVIRONMENT = ("huggingface_hub",)
FORKED = (["-m", "trainer"],)  # what a forked program does not start as a new interpreter, but as a fork of itself


def run(arguments: Sequence[str], environment: Mapping[str, str], *, cwd: str | None = None) -> NoReturn:
    """In a fork: be `python ARGUMENTS`, to its end."""
    code = 1
    try:
        _forget()
        _set_up(arguments, environment, cwd)
        # Until here Ctrl-C ends the process, as it does an interpreter that has not begun.
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = _ended(arguments)
        threading._shutdown()  # waits for threads, as the interpreter does
        atexit._run_exitfuncs()
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 120  # as the interpreter does
        os._exit(code)


def _forget() -> None:
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP) and callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    # The tracker of a parent that has read images in worker processes: its pipe is among the files that were closed.
    resource_tracker._resource_tracker._fd = None
    resource_tracker._resource_tracker._pid = None
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.WARNING)
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False


def _set_up(arguments: Sequence[str], environment: Mapping[str, str], cwd: str | None) -> None:
    assert environment.get("OMP_NUM_THREADS", "1") == "1", "the threads of a fork cannot be chosen"
    os.environ.clear()
    _show(b"\0".join(map(os.fsencode, (sys.executable, *arguments))), "arg")
    _show(b"\0".join(os.fsencode(f"{name}={value}") for name, value in environment.items()), "env")
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    if environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    sys.orig_argv = [sys.executable, *arguments]
    given = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:1] = [os.getcwd(), *given]
    site = importlib.machinery.PathFinder.find_spec("sitecustomize", given)
    if site and site.loader:
        site.loader.exec_module(importlib.util.module_from_spec(site))


def _show(text: bytes, which: str) -> None:
    """Put `text` where /proc/self/cmdline ("arg") or environ ("env") is read: the kernel knows the place, not more.

    What is too long is cut, with a zero at the end: without it, the kernel shows the first argument alone.
    """
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    first = {"arg": 45, "env": 47}[which]
    begin, end = int(fields[first]), int(fields[first + 1])
    if begin:
        ctypes.memmove(begin, text[: end - begin - 1].ljust(end - begin, b"\0"), end - begin)


def _ended(arguments: Sequence[str]) -> int:
    """The program's exit code."""
    for name in [m for m in sys.modules if m.split(".")[0] in READS_ENVIRONMENT]:
        del sys.modules[name]
    subprocess.Popen = Popen
    try:
        kind, *rest = arguments
        if kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [kind, *rest]
            sys.path[0] = os.path.dirname(os.path.abspath(kind))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        return 1
    return 0


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """A trainer that a forked entrypoint starts is a fork as well, and its child as ever; all else is a new program."""

    def __new__(cls, args: Any, **options: Any) -> Any:
        if isinstance(args, list) and args[0] == sys.executable and args[1:3] in FORKED:
            asked = {"stdin": subprocess.DEVNULL, **options}
            assert asked.keys() == {"env", "stdin"}, "a fork cannot do what else is asked"
            return Child(args, asked["env"], asked["stdin"])
        return super().__new__(cls)


class Child:
    """A fork, with what the entrypoint uses of `subprocess.Popen`."""

    def __init__(self, args: list[str], environment: Mapping[str, str], stdin: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.args, self.returncode = args, None
        read, write = os.pipe() if stdin == subprocess.PIPE else (os.open(os.devnull, os.O_RDONLY), None)
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(read, 0)
            run(args[1:], environment)
        os.close(read)
        self.stdin = None if write is None else open(write, "wb")  # noqa: SIM115

    def poll(self) -> int | None:
        if self.returncode is None:
            number, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if number else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() >= end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)
