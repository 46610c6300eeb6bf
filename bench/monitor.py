"""How much the monitor page slows training: a miniature job whose steps are timed with and without viewers.

python -m bench monitor [--viewers 20] [--rounds 30] [--window 5]

One job trains all the time. In each round it has no viewer for `--window` seconds and then `--viewers` of them, which
follow every event and get a page of numbers each; or the other way round, in turns: what else the machine does meets
both halves alike. A row has, with and without viewers,

- `core`: what the trainer's process spends on a core for each step, in milliseconds, and how much more it is with them:
  the median of the rounds, and between which bounds that lies with 95 % confidence (by the binomial distribution of the
  ranks). Other programs take a core's caches, which lengthens it and never shortens it: so it is that of the window's
  best second. Each second has one look at the folder, and one event for each viewer;
- `step`: the same of the median step by the clock, which other programs lengthen as they like;
- what the server takes of one core.

The viewers are sockets that are read by this process: what they cost is counted, too. Steps of a miniature take
milliseconds, and it shares the cores with everything here: a worse case than any GPU.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import itertools
import json
import math
import os
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import Report

ROOT = Path(__file__).parents[1]
CONCEPT = ROOT / "trainer/families/miniatures/concept"
TOKEN = "the-token-of-a-bench"
SLICE_S = 1.0
SETTLE_S = 0.5  # of each window, not counted: viewers come and go
LIKELY = 1.96  # standard deviations, for 95 %
START_S = 300.0


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--viewers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--window", type=float, default=5.0, help="seconds")
    parser.add_argument("--markdown", type=Path)
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), viewers=flags.viewers, rounds=flags.rounds, window=flags.window)
    Report("The monitor page", flags.markdown).row(row)


def measure(folder: Path, *, viewers: int, rounds: int, window: float) -> dict[str, Any]:
    """The row of one job."""
    port = free_port()
    job = start(folder, port)
    out = folder / "output"
    try:
        wait_for(job, lambda: len(step_times(out)) > 20 and server_of(port) is not None)
        server, trainer = server_of(port), trainer_of(job.pid)
        if server is None or trainer is None:
            raise RuntimeError("the job has lost its page or its trainer")
        seen: dict[str, list[Window]] = {"without": [], "with": []}
        for number in range(rounds):
            order = ("without", "with") if number % 2 == 0 else ("with", "without")
            for kind in order:
                opened = watch(port, viewers if kind == "with" else 0, SETTLE_S)
                of_server, slices = core_seconds(server), [(time.time(), core_seconds(trainer))]
                for _ in range(max(1, round(window / SLICE_S))):
                    follow(opened, SLICE_S)
                    slices.append((time.time(), core_seconds(trainer)))
                seen[kind].append(Window(core_seconds(server) - of_server, tuple(slices)))
                close(opened)
        times = step_times(out)
    finally:
        job.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(60)
        job.kill()
        job.wait()
    row: dict[str, Any] = {"viewers": viewers, "rounds": rounds}
    row |= compared("step", seen, lambda window: median_step(times, window.began, window.ended))
    row |= compared("core", seen, lambda window: core_step(times, window))
    for kind, windows in seen.items():
        share = sum(window.server_s for window in windows) / sum(window.ended - window.began for window in windows)
        row[f"server_percent_{kind}"] = round(100 * share, 2)
    return row


@dataclass(frozen=True)
class Window:
    """A few seconds of the job, and what two processes spent on a core meanwhile."""

    server_s: float
    slices: tuple[tuple[float, float], ...]  # Unix seconds, and what the trainer had spent by then

    @property
    def began(self) -> float:
        return self.slices[0][0]

    @property
    def ended(self) -> float:
        return self.slices[-1][0]


def compared(what: str, seen: dict[str, list[Window]], measure: Callable[[Window], float]) -> dict[str, Any]:
    """Medians with and without viewers, in milliseconds, and how much slower it is with them, in percent.

    A round in which other programs have left no time for steps counts for neither half.
    """
    values: dict[str, list[float]] = {"without": [], "with": []}
    for without, watched in zip(seen["without"], seen["with"], strict=True):
        pair = measure(without), measure(watched)
        if all(map(math.isfinite, pair)):
            values["without"].append(pair[0])
            values["with"].append(pair[1])
    slower = sorted(100 * (b / a - 1) for a, b in zip(values["without"], values["with"], strict=True))
    found: dict[str, Any] = {}
    for kind, measured in values.items():
        found[f"{what}_ms_{kind}"] = round(1000 * statistics.median(measured), 2)
    low, high = likely_ranks(len(slower))
    found[f"{what}_slower_percent"] = round(statistics.median(slower), 2)
    found[f"{what}_between"] = [round(slower[low], 2), round(slower[high], 2)]
    return found


def likely_ranks(count: int) -> tuple[int, int]:
    """Places, from 0, between which the median of what `count` sorted values are drawn from lies with 95 %."""
    half = LIKELY * math.sqrt(count) / 2
    return max(0, math.floor(count / 2 - half)), min(count - 1, math.ceil(count / 2 + half))


def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A job of the miniature that does nothing but train."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    environment |= {
        "PYTHONPATH": str(ROOT), "BASE_MODEL": "mini-flux", "DATASET_NAME": str(CONCEPT), "PARAMS_MAX_STEPS": "1000000",
        "OUTPUT_PATH": str(folder / "output"), "CACHE_PATH": str(folder / "cache"), "HF_HOME": str(folder / "hf"),
        "PARAMS_SAMPLE_EVERY_N_STEPS": "0", "PARAMS_SAVE_EVERY_N_STEPS": "0", "MONITOR_PORT": str(port),
        "MONITOR_TOKEN": TOKEN, "OUTPUT_NAME": "bench",
    }  # fmt: skip
    command = [sys.executable, "-m", "entrypoint"]
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def wait_for(job: subprocess.Popen[bytes], condition: Any) -> None:
    """Raises RuntimeError where the job ends, or nothing comes of it."""
    deadline = time.monotonic() + START_S
    while not condition():
        if job.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the job does not train with its page (exit code {job.poll()})")
        time.sleep(0.2)


def step_times(out: Path) -> list[float]:
    """When each step ended, in Unix seconds."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line)["time"] for line in lines if line.endswith("}")]


def median_step(times: list[float], began: float, ended: float) -> float:
    """Seconds of the median step that ends between two moments; NaN of fewer than two."""
    inside = times[bisect.bisect_left(times, began) : bisect.bisect_right(times, ended)]
    if len(inside) < 2:
        return math.nan
    return statistics.median(after - before for before, after in itertools.pairwise(inside))


def core_step(times: list[float], window: Window) -> float:
    """Seconds on a core for each step, in the slice of a window in which they are least; NaN where there was none."""
    found = []
    for (began, spent), (ended, spent_then) in itertools.pairwise(window.slices):
        count = steps_by(times, ended) - steps_by(times, began)
        if count > 0:
            found.append((spent_then - spent) / count)
    return min(found, default=math.nan)


def steps_by(times: list[float], moment: float) -> float:
    """Steps done by then, with the share of the one that is under way."""
    done = bisect.bisect_right(times, moment)
    if not 0 < done < len(times):
        return float(done)
    return done + (moment - times[done - 1]) / (times[done] - times[done - 1])


def watch(port: int, viewers: int, seconds: float) -> dict[socket.socket, int]:
    """So many connections that follow the events, after so many seconds; and the bytes that each has received."""
    request = f"GET /events HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    opened = {}
    for _ in range(viewers):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(request)
        opened[connection] = 0
    follow(opened, seconds)
    return opened


def follow(opened: dict[socket.socket, int], seconds: float) -> None:
    """Read what comes for so many seconds."""
    end = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for connection in opened:
            selector.register(connection, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            if not opened:
                time.sleep(left)
            for key, _ in selector.select(left):
                assert isinstance(key.fileobj, socket.socket)
                opened[key.fileobj] += len(key.fileobj.recv(1 << 16))


def close(opened: dict[socket.socket, int]) -> None:
    """Raises RuntimeError where one was not served."""
    for connection in opened:
        connection.close()
    if not all(opened.values()):
        raise RuntimeError(f"a viewer was not served: {sorted(opened.values())}")


def server_of(port: int) -> int | None:
    """The process that listens on `port`."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
            inodes.add(f"socket:[{fields[9]}]")
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(str(entry.readlink()) in inodes for entry in folder.iterdir()):
                return int(folder.parent.name)
        except OSError:  # it has ended, or is somebody else's
            continue
    return None


def trainer_of(job: int) -> int | None:
    """The process that trains, among those that the process `job` and its children have started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    for process in parents:
        above = process
        while above in parents and above != job:
            above = parents[above]
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            if above == job and b"trainer" in words:
                return process
    return None


def core_seconds(process: int) -> float:
    """What all threads of a process have spent on cores so far."""
    total = 0
    for path in Path(f"/proc/{process}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has ended
            total += int(path.read_text().split()[0])
    return total / 1e9
