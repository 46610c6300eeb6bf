"""Does training wait for the cache? `python -m bench loading` prints one line of JSON.

Items of Flux.1's size (T5 tokens 512 x 4096 in bf16, latents of 1280 x 768 pixels) are written to disk. The time of a
step that reads them through the prefetching thread is compared with the time of a step whose data is in memory. Both
steps multiply matrices for 0.3 s, so the difference is waiting.
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

STEPS = 24
BATCH = 4
STEP_S = 0.3


def step(weight: torch.Tensor, seconds: float) -> None:
    """Multiply matrices for so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        weight @ weight


def measure(batches: Iterator[list[dict[str, torch.Tensor]]], weight: torch.Tensor) -> float:
    """Median seconds from the start of one step to the start of the next."""
    marks = [time.perf_counter()]
    for _ in batches:
        step(weight, STEP_S)
        marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in itertools.pairwise(marks))


def main(arguments: list[str]) -> None:  # noqa: ARG001 (it takes none)
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
