"""A folder of odd files, and a watch on what happens while a program reads it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import os
import signal
import socket
import stat
import struct
import threading
import time
import unicodedata
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image

from trainer.spec.log_lines import LineFormatter

LONGEST_LINE = 2_000  # characters
MOST_LINES = 120  # of one message
HANGS_S = 30.0  # of the clock: only something that waits takes so long
MOVED = "to-be-removed-"  # the name of a folder that is moved up
Content = str | dict[str, Any]


class TooSlowError(BaseException):
    """Not an Exception: no handler of the program's errors may take it."""


# ---- files


def make(root: Path, files: Mapping[str, Content]) -> None:
    """Make the files. What the file system refuses (a name too long, a file for a folder) is left out."""
    for name, content in files.items():
        place = root / name.replace("\0", "").lstrip("/")
        if ".." in place.parts:
            continue
        with contextlib.suppress(OSError, ValueError):
            place.parent.mkdir(parents=True, exist_ok=True)
            _make(root, place, content)


def _make(root: Path, place: Path, content: Content) -> None:
    kind = "text" if isinstance(content, str) else str(content.get("kind"))
    if isinstance(content, str) or kind in ("text", "large", "image", "damaged", "safetensors", "zip", "nested"):
        place.write_bytes(data_of(content))
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(place))
    elif kind == "link":
        place.symlink_to(str(content["to"]).replace("{S}", str(root)))
    elif kind == "sparse":
        with place.open("wb") as file:
            file.truncate(int(content["size"]))
    elif kind == "deep":
        place.mkdir()
        _make_deep(place, int(content["depth"]) - 1)
    elif kind == "folder":
        place.mkdir()


def _make_deep(place: Path, depth: int) -> None:
    """Folders in folders. Each is made from the one above, since a path of all names takes longer with each."""
    folder = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)


def data_of(content: Content) -> bytes:
    """Text is latin-1, so that it may be any bytes."""
    if isinstance(content, str):
        return content.encode("latin-1", "replace")
    kind = content.get("kind")
    if kind == "large":
        return data_of(content["begin"]) + data_of(content["piece"]) * int(content["times"]) + data_of(content["end"])
    if kind == "nested":
        return b"".join(data_of(content[key]) * int(content["times"]) for key in ("open", "close"))
    if kind == "image":
        return drawn(int(content["width"]), int(content["height"]), str(content["format"]), int(content["colour"]))
    if kind == "damaged":
        data = bytearray(data_of(content["of"]))
        for at, byte in content["bytes"]:
            data[at % len(data)] = byte
        return bytes(data[: max(1, len(data) * int(content["percent"]) // 100)])
    if kind == "safetensors":
        return weights(content["tensors"], content.get("metadata"))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, inner in content["files"].items():
            archive.writestr(name, data_of(inner))
    return buffer.getvalue()


@functools.lru_cache(maxsize=4096)
def drawn(width: int, height: int, kind: str, colour: int) -> bytes:
    buffer = io.BytesIO()
    image = Image.new(
        "RGBA" if kind == "PNG" and colour % 5 == 0 else "RGB", (width, height), (colour, 90, 200 - colour)
    )
    image.save(buffer, kind)
    return buffer.getvalue()


def weights(tensors: Mapping[str, Any], metadata: Any) -> bytes:
    """A safetensors file: name → [type, shape, the byte that fills it]. Nothing is checked."""
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "BOOL": 1}
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    pieces: list[bytes] = []
    end = 0
    for name, (dtype, shape, fill) in tensors.items():
        count = sizes.get(dtype, 4)
        for side in shape:
            count *= max(0, side)
        count = min(count, 2**16)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + count]}
        pieces.append(bytes([fill]) * count)
        end += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *pieces])


def state_of(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder below `root` with its type, size and time."""
    found: dict[str, tuple[int, int, int]] = {}
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    left = [(top, f"{root}/", _listed(top, f"{root}/", found))]
    # Folders are 1,200 deep here: os.walk would recurse, and paths from the root would be long. So each folder is
    # opened from the one above, which is closed once its last is open.
    while left:
        parent, path, folders = left[-1]
        if not folders:
            os.close(parent)
            left.pop()
            continue
        name = folders.pop()
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        if not folders:
            os.close(parent)
            left.pop()
        below = f"{path}{name}/"
        left.append((inner, below, _listed(inner, below, found)))
    return found


def _listed(folder: int, path: str, found: dict[str, tuple[int, int, int]]) -> list[str]:
    """Adds to `found` what is in an open folder, whose path ends in a slash; the names of its folders."""
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                folders.append(entry.name)
                found[path + entry.name] = (status.st_mode, 0, 0)
            else:
                found[path + entry.name] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return folders


def emptied(root: Path) -> None:
    """Remove all that is in `root`. Folders in folders are moved up first, so that no path is long."""
    moved = 0
    left = [os.fspath(root)]
    while left:
        folder = left.pop()
        with os.scandir(folder) as entries:
            inside = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for path, is_folder in inside:
            if not is_folder:
                os.unlink(path)
            elif folder == os.fspath(root):
                left.append(path)
            else:
                moved += 1
                place = f"{root}/{MOVED}{moved}"
                os.rename(path, place)
                left.append(place)
        if folder != os.fspath(root):
            os.rmdir(folder)


# ---- what a program says and takes


@dataclass
class Heard:
    """All that the program said."""

    messages: list[str] = field(default_factory=list)
    printed: io.StringIO = field(default_factory=io.StringIO)

    def faults(self) -> list[str]:
        """What is wrong with it."""
        found = []
        for message in [*self.messages, self.printed.getvalue()]:
            lines = message.split("\n")
            longest = max(lines, key=len)
            if "Traceback (most recent call last)" in message:
                found.append(f"a traceback: {message[-1500:]}")
            if len(longest) > LONGEST_LINE:
                found.append(f"a line of {len(longest)} characters: {longest[:200]!r} … {longest[-100:]!r}")
            if len(lines) > MOST_LINES:
                found.append(f"a message of {len(lines)} lines: {message[:200]!r}")
            raw = [letter for letter in sorted(set(message)) if _is_raw(letter)]
            if raw:
                at = message.index(raw[0])
                found.append(f"the raw character {raw[0]!r} in {message[max(0, at - 120) : at + 60]!r}")
        return found


def _is_raw(letter: str) -> bool:
    """Whether a letter would act on a terminal instead of being shown."""
    return letter not in "\n\t" and unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")


class _Listener(logging.Handler):
    def __init__(self, heard: Heard) -> None:
        super().__init__()
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.messages.append(LineFormatter().format(record))


@contextlib.contextmanager
def listening() -> Iterator[Heard]:
    """Collects what is logged and printed; nothing of it is shown."""
    heard = Heard()
    root = logging.getLogger()
    before, level, disabled = root.handlers[:], root.level, root.manager.disable
    root.handlers[:] = [_Listener(heard)]
    root.setLevel(logging.INFO)
    logging.disable(logging.NOTSET)
    try:
        with contextlib.redirect_stdout(heard.printed), contextlib.redirect_stderr(heard.printed):
            yield heard
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        logging.disable(disabled)


class _Watchdog(threading.Thread):
    """Sends SIGUSR2 to this process at `ends`. One thread watches all runs: the start of a thread waits for a core."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ends = math.inf  # seconds, as time.monotonic has them

    def run(self) -> None:
        while True:
            time.sleep(1.0)
            if time.monotonic() > self.ends:
                os.kill(os.getpid(), signal.SIGUSR2)
                self.ends = math.inf


@functools.cache
def _watchdog(_process: int) -> _Watchdog:
    """That of a process. A fork takes no threads along, so it has its own."""
    made = _Watchdog()
    made.start()
    return made


@contextlib.contextmanager
def bounded(cpu_s: float) -> Iterator[None]:
    """Raises TooSlowError in what takes longer: of CPU time, or of the clock where it only waits."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise TooSlowError(
            "it waits for something" if number == signal.SIGUSR2 else f"more than {cpu_s:.0f} s of CPU time"
        )

    before = {number: signal.signal(number, end) for number in (signal.SIGPROF, signal.SIGUSR2)}
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    watchdog = _watchdog(os.getpid())
    watchdog.ends = time.monotonic() + HANGS_S
    try:
        yield
    finally:
        watchdog.ends = math.inf
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)  # of MAX_RUNTIME
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Every connection fails at once."""

    def refuse(*_arguments: object) -> None:
        raise OSError(101, "Network is unreachable")

    kept = socket.socket.connect, socket.getaddrinfo
    socket.socket.connect, socket.getaddrinfo = refuse, refuse  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        socket.socket.connect, socket.getaddrinfo = kept  # type: ignore[method-assign]


@contextlib.contextmanager
def environment(values: Mapping[str, str], folder: Path) -> Iterator[None]:
    """The process has exactly these variables, and `folder` as its working directory."""
    before, where = dict(os.environ), os.getcwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    os.environ.clear()
    os.environ.update(values)
    os.chdir(folder)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        os.chdir(where)
        for number, handler in handlers.items():
            signal.signal(number, handler)
