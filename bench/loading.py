"""Does reading the cache hold training up? `python -m bench.loading`: one JSON line.

Items of Flux.1's real size (T5 tokens 512 × 4096 in bf16, latents of 1280×768 px) are written to disk, and the time of
a step that reads them through the prefetching thread is compared with that of one whose data is in memory already.
The step is a matrix product of about 0.3 s, so the figure is of waiting, not of arithmetic.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trainer.data.batches import prefetched

STEPS, BATCH = 24, 4


def step(weight: torch.Tensor, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        weight @ weight


def measure(batches: Iterator[list[dict[str, torch.Tensor]]], weight: torch.Tensor) -> float:
    """Median seconds from one step's start to the next's."""
    marks = [time.perf_counter()]
    for _ in batches:
        step(weight, 0.3)
        marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in itertools.pairwise(marks))


def main(arguments: list[str]) -> None:  # noqa: ARG001 (there is nothing to choose)
    weight = torch.randn(512, 512)
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / f"{i}.safetensors" for i in range(STEPS * BATCH)]
        for path in paths:
            item = {"tokens": torch.randn(512, 4096).bfloat16(), "moments": torch.randn(32, 96, 160)}
            save_file(item, path)
        groups = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
        held = [[load_file(p) for p in groups[0]]] * STEPS
        without = measure(iter(held), weight)
        loading = measure(prefetched([load_file(p) for p in group] for group in groups), weight)
    row = {"batch": BATCH, "step_s": round(without, 4), "step_with_loading_s": round(loading, 4)}
    print(json.dumps({**row, "ratio": round(loading / without, 3)}))


if __name__ == "__main__":
    main(sys.argv[1:])
