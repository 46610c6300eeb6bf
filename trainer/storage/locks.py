"""One job at a time in an output folder: by the kernel's lock where there is one, and by a lease where there is none.

The kernel lets go of its lock when the owner dies, however it dies; but some network volumes know no locks, and some
keep them on each machine alone. So the owner also renews a lease: a file with its name and a number that grows. One
that finds a lease of another machine watches it for a while before it takes over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.spec.errors import SettingsError, StorageError
from trainer.storage import atomic

RENEW_INTERVAL_S, WATCH_DURATION_S = 3.0, 12.0


@contextlib.contextmanager
def locked(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold `folder` for this process.

    Raises SettingsError if another process holds it; StorageError if the folder cannot be written. With `on_wait` it
    is called once and the kernel's lock is waited for instead; then there is no lease.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as problem:
        raise StorageError(f"{folder} cannot be written: {problem.strerror}.") from problem
    with handle:
        sure = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            if on_wait is None:
                raise _in_use(folder, _owner(folder / ".lease")) from problem
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a volume without locks
            sure = False
        with _lease(folder, sure=sure) if on_wait is None else contextlib.nullcontext():
            yield


def _owner(lease: Path) -> str | None:
    """Who holds the folder. Its lease is written a moment after the lock is taken."""
    for _ in range(40):
        if (found := _read(lease)) is not None:
            return found.get("owner")
        time.sleep(0.05)
    return None


def _in_use(folder: Path, owner: str | None) -> SettingsError:
    who = owner or "another process"
    return SettingsError(f"OUTPUT_PATH {folder} is in use by {who}. Wait for that job, or choose another OUTPUT_PATH.")


@contextlib.contextmanager
def _lease(folder: Path, *, sure: bool) -> Iterator[None]:
    """`sure`: no other process of this machine holds the folder."""
    path, mine = folder / ".lease", _machine()
    before = _read(path)
    if before is not None and not (sure and before.get("machine") == mine):
        _watch(path, before, folder)
    me = {"machine": mine, "owner": f"process {os.getpid()} on {socket.gethostname()}", "nonce": os.urandom(8).hex()}
    ended = threading.Event()

    def renew() -> None:
        number = 0
        while not ended.wait(RENEW_INTERVAL_S):
            number += 1
            with contextlib.suppress(OSError, StorageError):  # the training itself meets a volume that fails
                atomic.write_json(path, {**me, "number": number})

    atomic.write_json(path, {**me, "number": 0})
    if not sure:  # two may have come at the same moment: the last to write stays
        time.sleep(0.5)
        if (now := _read(path)) is None or now.get("nonce") != me["nonce"]:
            raise _in_use(folder, (now or {}).get("owner"))
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _watch(path: Path, before: dict[str, Any], folder: Path) -> None:
    """Raises SettingsError if somebody renews the lease."""
    end = time.monotonic() + WATCH_DURATION_S
    while time.monotonic() < end:
        time.sleep(RENEW_INTERVAL_S / 10)
        now = _read(path)
        if now is None:
            return
        if now != before:
            raise _in_use(folder, now.get("owner"))


def _machine() -> str:
    """The same for all processes that share a kernel, and with it the locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
