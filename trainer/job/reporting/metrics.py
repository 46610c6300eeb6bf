"""The numbers of a run: metrics.jsonl, TensorBoard, status.json, and log lines or a progress bar for people."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter, SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from trainer.data.decode import LARGEST_SAMPLE, read_sample
from trainer.job.reporting.status import Status, clock
from trainer.spec.log_lines import escaped
from trainer.spec.messages import noise_bands, trend
from trainer.spec.plan import Plan
from trainer.storage import atomic, json_files, own_files
from trainer.storage.read import read_regular
from trainer.training.loop import Step

log = logging.getLogger(__name__)
ROW_KEYS = frozenset(
    (
        *("step", "epoch", "lr", "loss", "grad_norm", "skipped", "compiled", "validation_loss", "time"),
        *("prodigy_d", "images_per_second", "memory_gib", *noise_bands.KEYS),
    )
)
LARGEST_METRICS = 1 << 30  # bytes: some ten million steps
RGB = 3  # TensorBoard's number for an image's colours
REPORT_INTERVAL_S = 5.0  # between two writes of status.json
LINE_INTERVALS_S = ((600.0, 60.0), (60.0, 30.0), (0.0, 5.0))  # seconds of training so far, and between two log lines


class Metrics:
    """Writes one JSON line for each step, and the rest every few seconds.

    A resumed run drops the lines after its state (`first_step`) and writes them again.
    """

    def __init__(
        self,
        folder: Path,
        status: Status,
        *,
        total_steps: int,
        first_step: int,
        rounds_left: Callable[[int], float] = lambda _: 0,
        next_round: Callable[[int], int | None] = lambda _: None,
        round_s: float = 0.0,
    ) -> None:
        """`rounds_left`: how many rounds of samples come after a step; each takes `round_s` until one is measured.

        `next_round`: after which step the next one comes.
        """
        self.total = total_steps
        self.first = self.done = status.step = first_step
        self._rounds_left = rounds_left
        self._next_round = next_round
        self._round_s = round_s
        self.skipped = 0
        self._status = status
        self._lines = _truncated(folder / "metrics.jsonl", first_step).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "logs"), purge_step=first_step + 1)
        # tqdm's own time does not know of samples.
        shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        self._bar = tqdm(total=total_steps, initial=first_step, disable=not _columns(), bar_format=shape)
        self._log_redirect = contextlib.ExitStack()  # log lines go above the bar, not into it
        if not self._bar.disable:
            self._log_redirect.enter_context(logging_redirect_tqdm())
        self._reported = self._logged = -LINE_INTERVALS_S[-1][1]
        self._began = time.monotonic()
        self._spent = 0.0  # seconds of training before `_began`, without validation and samples
        self._images = 0
        self._losses: list[float] = []  # of this start
        self._has_risen = False

    def describe(self, text: str) -> None:
        """Show what the run was told to do, in Markdown, on TensorBoard's page of texts."""
        self._board.add_text("plan", escaped(text), self.first)

    def samples(self, step: int, files: Sequence[Path]) -> None:
        """Show the samples of `step` on TensorBoard, which compares them over the steps. Any thread may call this."""
        writer: FileWriter = self._board._get_file_writer()
        for path in files:
            known = own_files.read_sample_name(path.name)
            image = read_sample(path)
            if known is None or image is None:
                continue
            _, number, strength = known
            tag = f"sample/{number:02d}" if strength == 1 else f"sample/{number:02d} at {strength:g}"
            # The file as it is: `add_image` would compress it once more, which takes longer than a training step.
            png = read_regular(path, limit=LARGEST_SAMPLE)
            shown = Summary.Image(height=image.height, width=image.width, colorspace=RGB, encoded_image_string=png)
            writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=shown)]), step)
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
        if not step.skipped:
            recorded |= _by_noise(step)
            self._losses.append(step.loss)
            self._warn_if_risen()
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
        self._bar.set_postfix_str(f"loss {step.loss:.4f}, {self._outlook()}")
        if not is_reported:
            return
        self._reported = now
        left = self.eta_s()
        values = {**row, "images_per_second": round(speed, 3), "eta_s": round(left), "risen": str(self.risen() or "")}
        self._status.update(values)
        if self._bar.disable and (now - self._logged >= self._line_interval_s() or step.number == self.total):
            self._logged = now
            log.info(
                "step %d/%d  epoch %d  loss %.4f  %.2f images/s  %s",
                step.number, self.total, step.epoch, step.loss, speed, self._outlook(),
            )  # fmt: skip

    def _warn_if_risen(self) -> None:
        """Once: whoever trains with it may stop, and go on from a save before it."""
        if self._has_risen or len(self._losses) % trend.STRETCH:
            return
        found = trend.risen(self._losses)
        if found:
            self._has_risen = True
            log.warning("Step %d: %s. %s", self.done, found, trend.ADVICE)

    def risen(self) -> trend.Risen | None:
        """How the loss of this start has risen; None where it has not."""
        return trend.risen(self._losses)

    def _outlook(self) -> str:
        """The time that is left, and when the next samples come."""
        following = self._next_round(self.done)
        samples = f", next samples at step {following}" if following else ""
        return f"{clock(self.eta_s())} left{samples}"

    def _line_interval_s(self) -> float:
        """Seconds between two lines of the log: fewer lines in a longer job."""
        return next(interval for since, interval in LINE_INTERVALS_S if self._seconds() >= since)

    def record(self, row: dict[str, Any]) -> None:
        """Append a row of numbers, one of them the `step`, to metrics.jsonl and TensorBoard."""
        self._lines.write(json.dumps({**row, "time": round(time.time(), 3)}) + "\n")
        self._lines.flush()
        for key, value in row.items():
            if key not in ("step", "epoch"):
                self._board.add_scalar(key, value, row["step"])

    @contextlib.contextmanager
    def aside(self, *, is_round: bool = False) -> Iterator[None]:
        """Inside, time does not count as training. `is_round`: it is what a round of samples takes."""
        began = time.monotonic()
        self._spent += began - self._began
        yield
        self._began = time.monotonic()
        if is_round:
            self._round_s = self._began - began

    def images_per_second(self) -> float:
        """The mean over the training time of this process."""
        return self._images / max(self._seconds(), 1e-9)

    def step_s(self) -> float:
        """The mean of a step in this process, in seconds; 0 before the first one."""
        done = self.done - self.first
        return self._seconds() / done if done else 0.0

    def rounds_s(self) -> float:
        """Seconds that the rounds of samples that are left take."""
        return self._rounds_left(self.done) * self._round_s

    def eta_s(self) -> float:
        """Seconds that the steps to come take at the mean speed so far, with their samples; 0 before the first step."""
        if self.done == self.first:
            return 0.0
        return self.step_s() * (self.total - self.done) + self.rounds_s()

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


def _by_noise(step: Step) -> dict[str, float]:
    """The loss of each band of noise levels that an image of the step was in."""
    pairs = zip(noise_bands.KEYS, step.band_losses, strict=False)
    return {key: loss for key, loss in pairs if loss is not None}


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
