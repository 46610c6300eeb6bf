"""The numbers of a run: metrics.jsonl, TensorBoard, status.json, and log lines or a progress bar for people."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trainer.data.decode import read_sample
from trainer.job.reporting.status import Status, clock
from trainer.spec.log_lines import escaped
from trainer.spec.plan import Plan
from trainer.storage import atomic, json_files
from trainer.storage.read import read_regular
from trainer.training.loop import Step

log = logging.getLogger(__name__)
ROW_KEYS = frozenset(
    (
        *("step", "epoch", "lr", "loss", "grad_norm", "skipped", "compiled", "validation_loss", "time"),
        *("prodigy_d", "images_per_second", "memory_gib"),
    )
)
LARGEST_METRICS = 1 << 30  # bytes: some ten million steps
REPORT_INTERVAL_S = 5.0  # between two log lines, and two writes of status.json


class Metrics:
    """Writes one JSON line for each step, and the rest every few seconds.

    A resumed run drops the lines after its state (`first_step`) and writes them again.
    """

    def __init__(self, folder: Path, status: Status, *, total_steps: int, first_step: int) -> None:
        self.total = total_steps
        self.first = self.done = status.step = first_step
        self.skipped = 0
        self._status = status
        self._lines = _truncated(folder / "metrics.jsonl", first_step).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "logs"), purge_step=first_step + 1)
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not _columns())
        self._log_redirect = contextlib.ExitStack()  # log lines go above the bar, not into it
        if not self._bar.disable:
            self._log_redirect.enter_context(logging_redirect_tqdm())
        self._reported = -REPORT_INTERVAL_S
        self._began = time.monotonic()
        self._spent = 0.0  # seconds of training before `_began`, without validation and samples
        self._images = 0

    def describe(self, text: str) -> None:
        """Show what the run was told to do, in Markdown, on TensorBoard's page of texts."""
        self._board.add_text("plan", escaped(text), self.first)

    def samples(self, step: int, files: Sequence[Path]) -> None:
        """Show the samples of `step` on TensorBoard, which compares them over the steps."""
        for number, path in enumerate(files):
            image = read_sample(path)
            if image is None:
                continue
            pixels = np.asarray(image.convert("RGB"))
            self._board.add_image(f"sample/{number:02d}", pixels, step, dataformats="HWC")
        self._board.flush()

    def step(
        self, step: Step, *, learning_rate: float, estimate: float | None = None, compiled: int | None = None
    ) -> None:
        """Record an optimiser step.

        `estimate`: Prodigy's d, of which `learning_rate` is a multiple; None with other optimisers. `compiled`: number
        of compiled graphs so far; None if nothing is compiled.
        """
        self.done = self._status.step = step.number
        self._images += step.images
        self.skipped += step.skipped
        row: dict[str, Any] = {"step": step.number, "epoch": step.epoch, "lr": learning_rate}
        if step.skipped:  # JSON has neither NaN nor Inf
            row["skipped"] = self.skipped
        else:
            row |= {"loss": step.loss, "grad_norm": step.grad_norm}
        recorded = dict(row)
        if compiled is not None:
            recorded["compiled"] = compiled
        if estimate is not None:
            recorded["prodigy_d"] = estimate
        now = time.monotonic()
        is_reported = now - self._reported >= REPORT_INTERVAL_S or step.number == self.total
        speed = self.images_per_second()
        if is_reported:
            recorded |= {"images_per_second": round(speed, 3), "memory_gib": round(peak_memory_gib(), 3)}
        self.record(recorded)
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {step.loss:.4f}")
        if not is_reported:
            return
        self._reported = now
        left = self.eta_s()
        self._status.update({**row, "images_per_second": round(speed, 3), "eta_s": round(left)})
        if self._bar.disable:
            log.info(
                "step %d/%d  epoch %d  loss %.4f  %.2f images/s  %s left",
                step.number, self.total, step.epoch, step.loss, speed, clock(left),
            )  # fmt: skip

    def record(self, row: dict[str, Any]) -> None:
        """Append a row of numbers, one of them the `step`, to metrics.jsonl and TensorBoard."""
        self._lines.write(json.dumps({**row, "time": round(time.time(), 3)}) + "\n")
        self._lines.flush()
        for key, value in row.items():
            if key not in ("step", "epoch"):
                self._board.add_scalar(key, value, row["step"])

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, time does not count as training."""
        self._spent += time.monotonic() - self._began
        yield
        self._began = time.monotonic()

    def images_per_second(self) -> float:
        """The mean over the training time of this process."""
        return self._images / max(self._seconds(), 1e-9)

    def eta_s(self) -> float:
        """Seconds that the remaining steps take at the mean speed so far; 0 before the first step."""
        done = self.done - self.first
        if not done:
            return 0.0
        return self._seconds() / done * (self.total - self.done)

    def _seconds(self) -> float:
        return self._spent + time.monotonic() - self._began

    def close(self) -> None:
        self._bar.close()
        self._log_redirect.close()
        self._lines.close()
        self._board.close()


def plan_as_markdown(plan: Plan) -> str:
    """What was decided, with the reasons, and the whole plan."""
    lines = [f"- {text}" for text in (*plan.reasons, *plan.warnings)]
    return "\n".join(["# What was decided", *lines, "", "# plan.json", "```json", plan.to_json(), "```"])


def peak_memory_gib() -> float:
    """The most memory that was reserved on the device so far; without a device, the most that this process had."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB on Linux


def _columns() -> int:
    """The width of the terminal; 0 without one, or where it does not know its width: then there is no bar."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 0


def _truncated(path: Path, step: int) -> Path:
    """Drop lines after `step`, which the resumed run writes again, and a half-written last one.

    A file that holds anything else is set aside first.
    """
    lines: list[bytes] = []
    if os.path.lexists(path):
        try:
            lines = read_regular(path, limit=LARGEST_METRICS).splitlines()
        except OSError as problem:
            json_files.set_aside(path, f"cannot be read ({problem.strerror})")
    kept = []
    foreign = 0
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            foreign += number < len(lines)
        elif row["step"] <= step:
            kept.append(line.decode("utf-8") + "\n")
    if foreign:
        json_files.set_aside(path, f"has {foreign} lines that Kiln did not write, or that are damaged")
    atomic.write_text(path, "".join(kept))
    return path


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that Kiln did not write."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not {"step", "time"} <= row.keys() <= ROW_KEYS:
        return None
    is_number = all(isinstance(value, int | float) for value in row.values())
    return row if is_number and isinstance(row["step"], int) else None
