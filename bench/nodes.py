"""How long several machines take to end when something goes wrong, and to go on; how much work is lost.

    python -m bench nodes [--nodes 2] [--only killed stopped off cut]

Each machine is a network namespace on this one (`bench.network`), with one process of the miniature on the CPU.
For each fault a job is started and disturbed at the same step, and started again. `to_end_s`: from the fault until all
have ended. `to_continue_s`: from the new start until its first new step, of which `meeting_s` until all machines have
met. `steps_again`: done before the fault, and after it once more. `codes`: how the machines ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.network import Network, why_not
from bench.report import Report
from trainer.storage.read import read_text

ROOT = Path(__file__).resolve().parents[1]
STEP = 25  # at which the fault comes
SAVE_EVERY = 10
CONCEPT = ROOT / "trainer" / "families" / "miniatures" / "concept"
COMMON = {
    "BASE_MODEL": "mini-flux",
    "DATASET_NAME": str(CONCEPT),
    "BACKEND": "cpu",
    "OUTPUT_NAME": "x",
    "PARAMS_MAX_STEPS": "3000",
    "PARAMS_SAVE_EVERY_N_STEPS": str(SAVE_EVERY),
    "PARAMS_SAMPLE_EVERY_N_STEPS": "0",
    "NODES": "auto",
    "OMP_NUM_THREADS": "1",
    "MONITOR_PORT": "0",
}


class Machines:
    """The machines of a network, on each of them one job of `folder`."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.folder = folder
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> float:
        """Start the job on all of them; returns when, by the monotonic clock."""
        self.running = []
        began = time.monotonic()
        for machine in range(self.network.count):
            place = {"NUM_NODES": str(self.network.count), "NODE_RANK": str(machine)}
            place |= {"MASTER_ADDR": self.network.address(0), **self.network.variables(machine)}
            paths = {name: str(self.folder / name) for name in ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME")}
            needed = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
            environment = {**needed, **COMMON, **place, **paths}
            with (self.folder / f"printed-{machine}.txt").open("wb") as printed:
                self.running.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "entrypoint"],
                        env=environment,
                        cwd=ROOT,
                        stdin=subprocess.DEVNULL,
                        stdout=printed,
                        stderr=printed,
                    )
                )
        return began

    def steps(self) -> list[int]:
        path = self.folder / "OUTPUT_PATH" / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line)["step"] for line in read_text(path).splitlines() if line.endswith("}")]

    def wait_for_step(self, step: int) -> None:
        while max(self.steps(), default=0) < step:
            time.sleep(0.02)
            assert self.running[0].poll() is None, read_text(self.folder / "printed-0.txt")

    def processes(self, machine: int) -> list[int]:
        """The entrypoint's guard, and all that it has started."""
        found = [self.running[machine].pid]
        for process in found:
            with contextlib.suppress(OSError):  # it has ended
                found += map(int, Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split())
        return found

    def trainer(self, machine: int) -> int:
        """The process number of the one on that machine."""
        return min(p for p in self.processes(machine) if b"KILN_RANK=" in Path(f"/proc/{p}/environ").read_bytes())

    def wait(self) -> list[int]:
        return [process.wait() for process in self.running]

    def end(self) -> None:
        """Whatever still runs."""
        for machine, process in enumerate(self.running):
            if process.poll() is None:
                switch_off(self, machine)

    def meeting_s(self) -> float:
        """How long the last start waited for all machines."""
        found = re.search(r"agree, after ([\d.]+) s", read_text(self.folder / "printed-0.txt"))
        return float(found[1]) if found else 0.0


def kill_trainer(machines: Machines) -> None:
    os.kill(machines.trainer(machines.network.count - 1), signal.SIGKILL)


def stop(machines: Machines) -> None:
    machines.running[-1].send_signal(signal.SIGTERM)


def switch_off(machines: Machines, machine: int) -> None:
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for process in machines.processes(machine):
            os.kill(process, number)


def cut_off(machines: Machines) -> None:
    machines.network.cut(machines.network.count - 1)


FAULTS: dict[str, tuple[str, Callable[[Machines], None]]] = {
    "killed": ("a trainer of the last machine is killed", kill_trainer),
    "stopped": ("SIGTERM to the last machine", stop),
    "off": ("the last machine is switched off", lambda machines: switch_off(machines, machines.network.count - 1)),
    "first-off": ("the first machine is switched off", lambda machines: switch_off(machines, 0)),
    "cut": ("the last machine is cut off from the network", cut_off),
}


def measure(name: str, count: int) -> dict[str, Any]:
    """One fault, and the start after it."""
    title, disturb = FAULTS[name]
    with tempfile.TemporaryDirectory() as folder, Network(count) as network, contextlib.ExitStack() as ending:
        machines = Machines(network, Path(folder))
        ending.callback(machines.end)
        machines.start()
        machines.wait_for_step(STEP)
        began = time.monotonic()
        disturb(machines)
        codes = machines.wait()
        ended = time.monotonic()
        reached = max(machines.steps())
        if name == "cut":
            network.mend(count - 1)
        again = machines.start()
        machines.wait_for_step(reached + 1)
        continued = time.monotonic()
        resumed = re.search(r"Resumed at step (\d+)", read_text(machines.folder / "printed-0.txt"))
        machines.running[0].send_signal(signal.SIGTERM)
        machines.wait()
        return {
            "fault": title,
            "codes": " ".join(map(str, codes)),
            "to_end_s": round(ended - began, 1),
            "to_continue_s": round(continued - again, 1),
            "meeting_s": machines.meeting_s(),
            "steps_again": reached - int(resumed[1]) if resumed else reached,
        }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    flags = parser.parse_args(arguments)
    if why_not():
        sys.exit(why_not())
    report = Report(f"{flags.nodes} machines: what goes wrong", flags.markdown)
    for name in flags.only:
        report.row(measure(name, flags.nodes))
