"""One job at a time in an output folder: by the kernel's lock where there is one, and by a lease where there is none.

The kernel frees its lock when the owner dies, however it dies. But some network volumes have no locks, and some keep
them on each machine alone. So the owner also renews a lease: a file with the owner's name and a number that grows. A
process that finds a lease of another machine watches it for a while before it takes over.
"""

from __future__ import annotations

import contextlib
import errno
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
from trainer.spec.values import printable
from trainer.storage import atomic, json_files
from trainer.storage.read import read_text, special_kind

RENEW_INTERVAL_S = 3.0
WATCH_DURATION_S = 12.0  # four renewals: a slow volume may delay some of them
OWNER_WAIT_S = 2.0  # the lease of an owner is written a moment after its lock is taken
NO_FILE = (errno.ELOOP, errno.EISDIR, errno.ENXIO)  # why opening a link, a folder or a socket fails
SETTLE_S = 0.5  # without locks: after writing a lease, how long another process may still write its own


@contextlib.contextmanager
def locked(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold `folder` for this process.

    Raises SettingsError if another process holds it; StorageError if the folder cannot be written. With `on_wait`,
    that is called once and the kernel's lock is waited for instead; then there is no lease.
    """
    with contextlib.ExitStack() as stack:
        try:
            has_kernel_lock = stack.enter_context(file_lock(folder / ".lock", on_wait))
        except BlockingIOError as problem:
            raise _in_use(folder, _owner(folder / ".lease")) from problem
        except OSError as problem:
            raise StorageError(f"{folder} cannot be written: {problem.strerror}.") from problem
        if on_wait is None:
            stack.enter_context(_lease(folder, has_kernel_lock=has_kernel_lock))
        yield


@contextlib.contextmanager
def file_lock(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the kernel's lock on the file `path`, which is made if needed; freed when the process dies.

    Yields False where the volume has no locks: then nothing is held, and other processes may be at work too. Raises
    BlockingIOError if another process holds the lock; with `on_wait`, that is called once and the lock is waited for.
    Raises OSError if the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _open_lock(path)
    try:
        yield _flock(descriptor, on_wait)
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """A descriptor of the file `path`, which is made if needed. What else has its name is set aside. Raises OSError."""
    # O_NOFOLLOW: of a link that leads nowhere, the file would be made where it leads.
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
        if special_kind(os.fstat(descriptor).st_mode) is None:
            return descriptor
        os.close(descriptor)
    except OSError as problem:
        if problem.errno not in NO_FILE:
            raise
    json_files.set_aside(path, "is not a file that Kiln wrote")
    return os.open(path, flags, 0o666)


def _flock(handle: int, on_wait: Callable[[], None] | None) -> bool:
    """Whether the lock is held now; False where the volume has none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if on_wait is None:
            raise
        on_wait()
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _owner(lease: Path) -> str | None:
    """The process that holds the folder, for the message; None if it wrote no lease in time."""
    end = time.monotonic() + OWNER_WAIT_S
    while True:
        content = json_files.read_object(lease)
        if content is not None:
            return _owner_of(content)
        if time.monotonic() >= end:
            return None
        time.sleep(0.05)


def _owner_of(lease: dict[str, Any]) -> str | None:
    owner = lease.get("owner")
    return printable(owner) if isinstance(owner, str) else None


def _is_lease(path: Path) -> bool:
    content = json_files.read_object(path) or {}
    return all(isinstance(content.get(key), str) for key in ("machine", "owner", "nonce"))


def _in_use(folder: Path, owner: str | None) -> SettingsError:
    who = owner or "another process"
    return SettingsError(f"OUTPUT_PATH {folder} is in use by {who}. Wait for that job, or choose another OUTPUT_PATH.")


@contextlib.contextmanager
def _lease(folder: Path, *, has_kernel_lock: bool) -> Iterator[None]:
    """Write a lease and renew it. Raises SettingsError if another process renews, or wins, the lease.

    `has_kernel_lock`: no other process of this machine holds the folder, so a lease of this machine is a dead one's.
    """
    path = folder / ".lease"
    machine = _machine()
    json_files.set_aside_unless(path, _is_lease)
    before = json_files.read_object(path)
    if before is not None and not (has_kernel_lock and before.get("machine") == machine):
        _watch(path, before, folder)
    lease = {
        "machine": machine,
        "owner": f"process {os.getpid()} on {socket.gethostname()}",
        "nonce": os.urandom(8).hex(),
    }
    ended = threading.Event()

    def renew() -> None:
        number = 0
        while not ended.wait(RENEW_INTERVAL_S):
            number += 1
            # A volume that fails is the training's to report, when it writes.
            with contextlib.suppress(OSError, StorageError):
                write(number)

    def write(number: int) -> None:
        # Another machine may write its own at the same moment: its temporary file must not be ours.
        atomic.write_text(path, json.dumps({**lease, "number": number}) + "\n", shared=True)

    write(0)
    if not has_kernel_lock:  # two may have come at the same moment: the last to write stays
        time.sleep(SETTLE_S)
        now = json_files.read_object(path) or {}
        if now.get("nonce") != lease["nonce"]:
            raise _in_use(folder, _owner_of(now))
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
    """Return when the lease is gone, or was not renewed for WATCH_DURATION_S. Raises SettingsError if it is renewed."""
    end = time.monotonic() + WATCH_DURATION_S
    while time.monotonic() < end:
        time.sleep(RENEW_INTERVAL_S / 10)
        now = json_files.read_object(path)
        if now is None:
            return
        if now != before:
            raise _in_use(folder, _owner_of(now))


def _machine() -> str:
    """The same for all processes that share a kernel, and with it the locks; containers have hostnames of their own."""
    try:
        return read_text(Path("/proc/sys/kernel/random/boot_id")).strip()
    except OSError:
        return socket.gethostname()
