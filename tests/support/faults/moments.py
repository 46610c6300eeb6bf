"""Signals and kills at random moments of whole jobs: from the start of the first process to the end of the last.

    Campaign(...).run() starts one job again and again, disturbs each start once, and checks what is left. `Figures`
adds up several of them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.programs import Interpreter, Program, Programs

TRAINER = "trainer"  # SIGKILL to the trainer alone: what the kernel does when memory runs out
ALL = "all"  # SIGKILL to all processes: what becomes of a container that is killed
STOPS = {"SIGTERM": 143, "SIGHUP": 143, "SIGINT": 130}
KINDS = (*STOPS, TRAINER, ALL)
IMPORTS_TAKE = 4  # times as long as the job itself
LONGEST_S = 4.0  # from a stop to the end


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Inside, as many processes want a core at all times."""
    burning = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


@dataclass
class Figures:
    """What the disturbed starts came to."""

    seconds: dict[str, list[float]] = field(default_factory=dict)  # from a signal to the end of the job
    codes: Counter[int] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    saved: int = 0  # stops during training, after which the last step is in the newest state
    finished: int = 0  # starts that were done before, all with the same bytes

    def add(self, other: Figures) -> None:
        for kind, seconds in other.seconds.items():
            self.seconds.setdefault(kind, []).extend(seconds)
        self.codes += other.codes
        self.phases += other.phases
        self.saved += other.saved
        self.finished += other.finished

    def line(self) -> str:
        stops = sorted(second for kind in STOPS for second in self.seconds.get(kind, []))
        sent = ", ".join(f"{len(seconds)} {kind}" for kind, seconds in sorted(self.seconds.items()))
        codes = ", ".join(f"{code}: {count}" for code, count in sorted(self.codes.items()))
        phases = ", ".join(f"{count} {phase}" for phase, count in self.phases.most_common())
        times = ""
        if stops:
            marks = [stops[min(len(stops) - 1, int(share * len(stops)))] for share in (0.5, 0.9, 0.99, 1)]
            times = "; a stop took {:.2f} s (median), {:.2f} (90 %), {:.2f} (99 %), {:.2f} at most".format(*marks)
        busy = f"load average {os.getloadavg()[0]:.0f}"
        times += f"; {self.saved} of them saved a step of training"
        ends = f"exit codes {codes}; in the phases {phases}; {self.finished} runs ended, all the same"
        return f"{sent}{times}; {busy}; {ends}"


@dataclass
class Campaign:
    """One output folder, and the job that fills it.

    `kinds`: what disturbs it. `span`: seconds that it takes undisturbed.
    """

    programs: Programs
    folder: Path
    environment: dict[str, str]
    reference: str
    span: float
    kinds: Sequence[str] = KINDS
    seed: int = 1
    own_interpreters: float = 0.25  # of the starts; the others are forked, and skip the imports

    def __post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.figures = Figures()
        self.out = self.folder / "output"
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self.count = 0

    def run(self, count: int) -> Figures:
        for _ in range(count):
            self.disturb()
        assert self.end() == 0, self.log.read_text()[-3000:]
        return self.figures

    def start(self, *, own_interpreter: bool) -> Program | Interpreter:
        self.count += 1
        self.log = self.folder / f"{self.count}.txt"
        environment = {**self.environment, "OUTPUT_PATH": str(self.out), "TMPDIR": str(self.temporary)}
        return self.programs.start(
            "-m", "entrypoint", environment=environment, output=self.log, own_interpreter=own_interpreter
        )

    def disturb(self) -> None:
        kind = self.dice.choice(self.kinds)
        before = self.last_step()
        own_interpreter = self.dice.random() < self.own_interpreters
        program = self.start(own_interpreter=own_interpreter)
        moment = self.dice.uniform(0, self.span * (IMPORTS_TAKE if own_interpreter else 1))
        with suppress(subprocess.TimeoutExpired):
            program.wait(timeout=moment)
        if program.poll() is not None:
            self.finish(program.returncode)
            return
        sent = time.monotonic()
        if kind == TRAINER:
            self.kill_trainer(program)
        elif kind == ALL:
            os.killpg(program.pid, signal.SIGKILL)
        else:
            program.send_signal(signal.Signals[kind])
        code = program.wait(timeout=60)
        took = time.monotonic() - sent
        what = f"{kind} after {moment:.2f} s: {code} in {took:.2f} s\n{self.log.read_text()[-3000:]}"
        self.check(kind, code, took, moment, what)
        if kind in STOPS and code and self.last_step() != before:  # it has trained
            newest = max(int(path.name.partition("-")[2]) for path in (self.out / "state").glob("step-*"))
            assert newest == self.last_step(), f"steps are lost: {what}"
            self.figures.saved += 1
        self.figures.seconds.setdefault(kind, []).append(took)
        self.figures.codes[code] += 1
        self.figures.phases[self.status().get("phase", "none") if code else "done"] += 1
        if code == 0:
            self.finish(code)

    def check(self, kind: str, code: int, took: float, moment: float, what: str) -> None:
        """That the job ended as it has to."""
        printed = self.log.read_text()
        if kind == ALL:
            assert code == -signal.SIGKILL, what
            self.wait_for_lock()
            shutil.rmtree(self.temporary)  # nobody was left to do it
            self.temporary.mkdir()
            return
        assert not list(self.temporary.iterdir()), f"{list(self.temporary.iterdir())} left behind: {what}"
        assert trainers_in(self.out) == [], what
        if kind == TRAINER:
            assert code in (0, 75), what
            assert code == 0 or "was killed" in printed, what
            return
        if code == -signal.Signals[kind] and not printed.strip().startswith("0"):
            return  # Python itself had not begun
        assert "Traceback" not in printed, what
        assert code in (STOPS[kind], 0), what
        assert took < LONGEST_S, what
        if code:
            assert printed.splitlines()[-1].endswith(f"[exit {code}]"), what
            assert self.status()["phase"] == "stopped" and self.status()["exit_code"] == code, what

    def kill_trainer(self, program: Program | Interpreter) -> None:
        """As soon as there is one."""
        while program.poll() is None:
            for number in descendants(program.pid):
                if b"trainer" in arguments_of(number)[2:3]:
                    os.kill(number, signal.SIGKILL)
                    return
            time.sleep(0.005)

    def wait_for_lock(self) -> None:
        """Until the last process is gone that held the folder."""
        if not (self.out / ".lock").exists():
            return
        with (self.out / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)

    def last_step(self) -> int:
        """The last line of metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def status(self) -> dict:
        path = self.out / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def finish(self, code: int) -> None:
        """A run has ended: it is as if nobody had disturbed it. The next start begins anew."""
        assert code == 0, self.log.read_text()[-3000:]
        assert hashlib.sha256((self.out / "x.safetensors").read_bytes()).hexdigest() == self.reference
        assert not list(self.out.rglob("*.damaged"))
        self.figures.finished += 1
        shutil.rmtree(self.out)

    def end(self) -> int:
        """Start it once more, undisturbed."""
        code = self.start(own_interpreter=False).wait(timeout=600)
        self.finish(code)
        return code


def descendants(number: int) -> list[int]:
    """All processes that a process has started, and those that these have started."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, new = [], [number]
    while new:
        new = [child for parent in new for child in parents.get(parent, [])]
        found += new
    return found


def arguments_of(number: int) -> list[bytes]:
    try:
        return Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def trainers_in(out: Path) -> list[int]:
    """The processes that have a file open in that folder: run.log, the lock."""
    found = []
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(path).startswith(f"{out}/"):
                found.append(int(path.parts[2]))
        except OSError:
            continue
    return sorted(set(found) - {os.getpid()})
