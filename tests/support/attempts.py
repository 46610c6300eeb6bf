"""Random plans (random_plans.py) under caps of the device's memory, run as a job runs them: rehearsed, then trained.

    python -m tests.support.attempts --plans 100 --seed 0

Prints a JSON line for each plan, and at last how many were refused, ran as planned, or fell back how many times. The
plan of a seed is always the same: `--plans 1 --seed 17` runs one again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in a job (entrypoint/processes/launch.py)

import torch

from entrypoint.system.hardware import detect
from tests.support.random_plans import Drawn, Ground, drawn
from trainer.checkpoints.open_run import OpenRun
from trainer.data.batches import micro_batch
from trainer.engine.cuda_graphs import EagerStep
from trainer.engine.device import limit_memory, release
from trainer.job import build
from trainer.job.prepare import PreparedData
from trainer.job.reporting.status import Status
from trainer.job.session import Session
from trainer.job.sizes import largest_batches
from trainer.job.watchdog import Watchdog
from trainer.spec.errors import KilnError, OutOfMemoryError, SettingsError
from trainer.spec.family import get_family
from trainer.storage.run_records import RunRecord
from trainer.training.distributed import Workers
from trainer.training.stop_flag import StopFlag

GIB = 2**30


@dataclass
class Outcome:
    """What became of a plan."""

    kind: str = "refused"  # refused, ran or failed
    fallbacks: int = 0  # that it went down
    recorded: bool = False  # whether its steps were, from beginning to end
    notes: dict[str, int] = field(default_factory=dict)  # memory that ran out later and was made do without
    why: str = ""
    gib: tuple[float, float, float] = (0.0, 0.0, 0.0)  # before the first step, in it, and the cap
    way: str = ""
    seconds: float = 0.0
    left: float = 0.0  # GiB that it did not give back

    def __str__(self) -> str:
        if self.kind != "ran":
            return self.kind
        return f"fell back {self.fallbacks} times" if self.fallbacks else "ran as planned"


HALVED, UNDRAWN = "images at once; from now on", "Not enough memory to draw"
GIVEN_UP, UNRECORDED = "CUDA graphs are disabled", "no memory to capture"


class Told(logging.Handler):
    """What the trainer warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def count(self, words: str, since: int = 0) -> int:
        return sum(words in line for line in self.lines[since:])


@contextlib.contextmanager
def told() -> Iterator[Told]:
    handler = Told()
    logging.getLogger("trainer").addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger("trainer").removeHandler(handler)


def session(ready: PreparedData, out: Path) -> Session:
    """As `trainer.job.run` makes it."""
    plan = ready.plan
    training_state = build.build_training_state(
        plan, get_family(plan.model.family), model=Path(plan.model.path), total=ready.total
    )
    opened = OpenRun(plan, out, out, RunRecord(out), was_done=False)
    return build.make_session(opened, ready, training_state, StopFlag(), watchdog=Watchdog(0.0), workers=Workers())


def capped(made: Session, room: float) -> tuple[float, float, float]:
    """Leave the session so much of what its first step took: GiB before that step, in it, and the cap.

    No cap where the host has no memory for that step.
    """
    low, its = torch.cuda.memory_allocated(), made.runner
    made.runner = EagerStep(its.params, its.optimizer_params, its.pass_context)
    torch.cuda.reset_peak_memory_stats()
    largest = largest_batches(made.sampler.epoch(0))
    fits = made.rehearsal().fits([micro_batch(made.cache, batch) for batch in largest])
    assert fits or made.plan.engine.host_gib == 0
    high = torch.cuda.max_memory_allocated()
    made.runner = its
    its.clear()
    emptied()
    if not fits:
        return round(low / GIB, 3), 0.0, 0.0
    cap = low + room * (high - low)
    limit_memory("cuda", cap / GIB)
    torch.cuda.reset_peak_memory_stats()
    return round(low / GIB, 3), round(high / GIB, 3), round(cap / GIB, 3)


def emptied() -> None:
    """Only what is in use takes the device's memory, as when a process begins."""
    release()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def attempt(of: Drawn, ground: Ground) -> Outcome:
    """Rehearse and train; whatever happens, the next plan finds the device as this one did."""
    out, started, found = ground.folder / "out", time.monotonic(), Outcome()
    out.mkdir()
    before = torch.cuda.memory_allocated()
    try:
        with told() as said:
            _attempt(ground.ready(ground.plan(of)), out, of.room, found=found, said=said)
    except (KilnError, RuntimeError, ValueError, OSError, AssertionError):
        found.kind, found.why = "failed", traceback.format_exc()
    finally:
        shutil.rmtree(out)
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)
        if of.settings["PARAMS_COMPILE"] == "true":
            torch.compiler.reset()
        emptied()
    found.left = round((torch.cuda.memory_allocated() - before) / GIB, 3)
    found.seconds = round(time.monotonic() - started, 2)
    return found


def _attempt(ready: PreparedData, out: Path, room: float, *, found: Outcome, said: Told) -> None:
    made = session(ready, out)
    if ready.plan.engine.device == "cuda":
        found.gib = capped(made, room)
    mode_count = len(made.engine.fallbacks)
    try:
        made.rehearse()
    except SettingsError as problem:
        assert "Fix: lower PARAMS_BATCH_SIZE" in str(problem)
        found.why = str(problem)
        return
    found.kind, found.fallbacks, rehearsed = "ran", mode_count - len(made.engine.fallbacks), len(said.lines)
    found.way = " ".join(map(str, made.engine.fallbacks[0]))
    assert said.count("Instead of") == found.fallbacks  # each is told
    recorded = made.runner.capturing and not made.runner.short_of_memory
    try:
        made.train(Status(out), first=0)
    except (torch.OutOfMemoryError, OutOfMemoryError):
        found.kind, found.why = "failed", f"Memory ran out after the rehearsal.\n{traceback.format_exc()}"
    short = [line for line in said.lines[rehearsed:] if HALVED in line or UNDRAWN in line]
    if short and not found.why:
        found.kind, found.why = "failed", short[0]
    notes = {what: said.count(what, rehearsed) for what in (GIVEN_UP, UNRECORDED)}
    found.notes = {what: count for what, count in notes.items() if count}
    found.recorded = recorded and made.runner.capturing and not found.notes
    assert found.why or (out / "x.safetensors").is_file()


def row(of: Drawn, outcome: Outcome) -> dict[str, Any]:
    """All that is known of a plan and what became of it."""
    plan = {k.removeprefix("PARAMS_").lower(): v for k, v in of.settings.items()}
    sizes = [f"{d['resolution']}:{d['batch_size']}" for d in of.datasets]
    drawn_as = {"family": of.family, "room": of.room, "sizes": sizes, **plan, **of.engine}
    return {"what": str(outcome), **dataclasses.asdict(outcome), **drawn_as, "seed": of.seed}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    rows, started = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder), detect())
        assert ground.models and ground.found.images
        print(f"Made ready in {time.monotonic() - started:.1f} s.", file=sys.stderr)
        for seed in range(asked.seed, asked.seed + asked.plans):
            of = drawn(seed, ground.hardware)
            rows.append(row(of, attempt(of, ground)))
            print(json.dumps(rows[-1]), flush=True)
            if len(rows) == 1:
                gc.freeze()  # what is there now stays, and need not be looked through after each plan
    print(json.dumps({"plans": len(rows), "s": round(time.monotonic() - started, 1), **summary(rows)}))
    return int(any(r["what"] == "failed" for r in rows))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    notes: Counter[str] = sum((Counter(r["notes"].keys()) for r in rows), Counter())
    outcomes = dict(sorted(Counter(r["what"] for r in rows).items()))
    return {"outcomes": outcomes, "recorded": sum(r["recorded"] for r in rows), "notes": dict(notes)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
