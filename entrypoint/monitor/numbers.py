"""metrics.jsonl as columns, read on as it grows, and thinned for a chart that has fewer pixels than the run has steps.

A row of a step and a row of a validation count alike: the number of rows that a viewer has is its place. A resumed run
replaces the file, which begins a new `generation`.
"""

from __future__ import annotations

import math
import os
from array import array
from pathlib import Path
from typing import Any

from entrypoint.report.metric_rows import VALIDATION, metric_row
from trainer.spec.messages import noise_bands
from trainer.storage.read import open_unlinked

COLUMNS = ("step", "loss", "lr", "grad_norm", "prodigy_d", "images_per_second", "memory_gib", *noise_bands.KEYS)
MOST_POINTS = 2000  # of a curve, when a viewer comes
LONGEST_READ = 1 << 24  # bytes at once
DIGITS = 6  # significant, of what is sent

Document = dict[str, Any]


class Numbers:
    """The numbers of a run so far. NaN stands for what a row does not have."""

    def __init__(self) -> None:
        self.generation = 0
        self._clear()

    def _clear(self) -> None:
        self._inode = -1
        self._offset = 0
        self._columns = {name: array("d") for name in COLUMNS}
        self._validation = (array("d"), array("d"))  # steps, losses
        # How many rows of steps there were before each validation, so that one number is the place of a viewer.
        self._before_validation = array("q")

    @property
    def rows(self) -> int:
        return len(self._columns["step"]) + len(self._validation[0])

    @property
    def last_step(self) -> int:
        steps = self._columns["step"]
        return int(steps[-1]) if steps else 0

    def read_on(self, path: Path) -> bool:
        """Read what is new in `path`; whether anything is."""
        try:
            with open_unlinked(path) as file:
                found = os.fstat(file.fileno())
                is_other = found.st_ino != self._inode or found.st_size < self._offset
                if is_other:
                    if self.rows:
                        self.generation += 1
                    self._clear()
                    self._inode = found.st_ino
                file.seek(self._offset)
                data = file.read(LONGEST_READ)
        except OSError:
            return False
        whole = data[: data.rfind(b"\n") + 1]  # the last line may be half written
        self._offset += len(whole)
        for line in whole.splitlines():
            self._add(line)
        return is_other or bool(whole)

    def _add(self, line: bytes) -> None:
        row = metric_row(line)
        if row is None:
            return
        if VALIDATION in row:
            self._before_validation.append(len(self._columns["step"]))
            self._validation[0].append(row["step"])
            self._validation[1].append(row[VALIDATION])
            return
        for name, column in self._columns.items():
            column.append(row.get(name, math.nan))

    def history(self) -> Document:
        """All of it, as means of as many steps as make at most MOST_POINTS points. `every`: how many."""
        count = len(self._columns["step"])
        every = max(1, math.ceil(count / MOST_POINTS))
        columns: Document = {"step": []}
        for begin in range(0, count, every):
            columns["step"].append(int(self._columns["step"][min(begin + every, count) - 1]))
        for name in COLUMNS[1:]:
            column = self._columns[name]
            columns[name] = [_mean(column[begin : begin + every]) for begin in range(0, count, every)]
        pairs = list(zip(*self._validation, strict=True))
        stride = max(1, math.ceil(len(pairs) / MOST_POINTS))
        validation = [[int(step), _short(loss)] for step, loss in pairs[::stride]]
        return {"every": every, "columns": columns, "validation": validation}

    def since(self, rows: int) -> Document:
        """The rows after the first `rows`, one point each."""
        validations = sum(1 for number, before in enumerate(self._before_validation) if number + before < rows)
        first = rows - validations
        columns: Document = {"step": [int(step) for step in self._columns["step"][first:]]}
        for name in COLUMNS[1:]:
            columns[name] = [_short(value) for value in self._columns[name][first:]]
        pairs = zip(self._validation[0][validations:], self._validation[1][validations:], strict=True)
        return {"columns": columns, "validation": [[int(step), _short(loss)] for step, loss in pairs]}


def _mean(values: array[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return _short(sum(known) / len(known)) if known else None


def _short(value: float) -> float | None:
    """A number as JSON may have it, without digits that no chart shows."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
