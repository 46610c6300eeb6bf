"""How much the monitor page slows training: a miniature job whose steps are timed with and without viewers.

python -m bench monitor [--viewers 20] [--rounds 12] [--window 8]

One job trains all the time. In each round it has no viewer for `--window` seconds and then `--viewers` of them, which
follow every event and get a page of numbers each; or the other way round, in turns. A row is the mean step of each half
over all rounds, how much slower the second is (the median of the rounds, with the quartiles), and what the server took
of one core. The viewers are sockets that are read by this process: what they cost is counted, too. Steps of a miniature
take milliseconds, and it shares the cores with everything here: a worse case than any GPU.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import os
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.report import Report

ROOT = Path(__file__).parents[1]
CONCEPT = ROOT / "trainer/families/miniatures/concept"
TOKEN = "the-token-of-a-bench"
SETTLE_S = 1.0  # of each window, not counted: viewers come and go
START_S = 300.0


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--viewers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--window", type=float, default=8.0, help="seconds")
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
        windows: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
        seconds_of_core = {"without": 0.0, "with": 0.0}
        for number in range(rounds):
            order = ("without", "with") if number % 2 == 0 else ("with", "without")
            for kind in order:
                began, before = time.time(), cpu_seconds(port)
                watch(port, viewers if kind == "with" else 0, window)
                windows[kind].append((began + SETTLE_S, time.time()))
                seconds_of_core[kind] += cpu_seconds(port) - before
        times = step_times(out)
    finally:
        job.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(60)
        job.kill()
        job.wait()
    means = {kind: [mean_step(times, *each) for each in pairs] for kind, pairs in windows.items()}
    slower = [100 * (b / a - 1) for a, b in zip(means["without"], means["with"], strict=True)]
    low, middle, high = statistics.quantiles(slower, n=4)
    return {
        "viewers": viewers,
        "rounds": rounds,
        "step_ms_without": round(1000 * statistics.mean(means["without"]), 2),
        "step_ms_with": round(1000 * statistics.mean(means["with"]), 2),
        "slower_percent": round(middle, 2),
        "quartiles": [round(low, 2), round(high, 2)],
        "core_percent_without": round(100 * seconds_of_core["without"] / (rounds * window), 2),
        "core_percent_with": round(100 * seconds_of_core["with"] / (rounds * window), 2),
    }


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


def mean_step(times: list[float], began: float, ended: float) -> float:
    """Seconds of a step between two moments."""
    first, last = bisect.bisect_left(times, began), bisect.bisect_right(times, ended) - 1
    return (times[last] - times[first]) / (last - first)


def watch(port: int, viewers: int, seconds: float) -> None:
    """For so many seconds, follow the events with so many connections."""
    end = time.monotonic() + seconds
    request = f"GET /events HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as opened:
        received: dict[int, int] = {}
        for _ in range(viewers):
            connection = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ)
            received[connection.fileno()] = 0
        while time.monotonic() < end:
            for key, _ in selector.select(0.2) if viewers else []:
                received[key.fd] += len(os.read(key.fd, 1 << 16))
            if not viewers:
                time.sleep(0.2)
    if any(count < 1000 for count in received.values()):
        raise RuntimeError(f"a viewer was not served: {sorted(received.values())}")


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


def cpu_seconds(port: int) -> float:
    """What the server has taken of the cores so far."""
    fields = Path(f"/proc/{server_of(port)}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
