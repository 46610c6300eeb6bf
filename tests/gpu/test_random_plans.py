"""A hundred random plans under random caps of the device's memory: once rehearsed, none runs out of it.

PLANS=1 SEED=17 runs the plan of that seed alone; PLANS=1000 more of them.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.spec.family import family_names

ROOT = Path(__file__).resolve().parents[2]
PLANS, SEED = int(os.environ.get("PLANS", "100")), int(os.environ.get("SEED", "0"))

EACH = 4  # processes on an accelerator, which wait for the host most of the time


def made(device: int, of: range) -> list[dict[str, Any]]:
    """What became of those plans, in a process of their own: all of the device's memory that it has is theirs."""
    command = [sys.executable, "-m", "tests.support.attempts", "--plans", str(len(of)), "--seed", str(of.start)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(device)}
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rows = [row for row in told if "seed" in row]  # the last line is their sum
    print(*map(json.dumps, told[len(rows) :]))
    assert len(rows) == len(of), f"it ended with {done.returncode} after the plan of seed {of.start + len(rows)}"
    return rows


@pytest.mark.gpu
@pytest.mark.timeout(120 + 12 * PLANS)
def test_no_plan_runs_out_of_memory_once_it_is_rehearsed():
    devices = torch.cuda.device_count()
    count = min(PLANS, EACH * devices)
    bounds = [SEED + PLANS * i // count for i in range(count + 1)]
    shares = [range(*pair) for pair in pairwise(bounds)]
    with ThreadPoolExecutor(count) as pool:
        rows = [row for share in pool.map(made, [i % devices for i in range(count)], shares) for row in share]
    for row in (r for r in rows if r["what"] == "failed"):
        print(f"PLANS=1 SEED={row['seed']}:", json.dumps({**row, "why": ""}), row["why"], sep="\n")
    print(json.dumps(Counter(r["what"] for r in rows), indent=2))
    assert not [r["seed"] for r in rows if r["what"] == "failed"]
    assert all(r["left"] < 0.05 for r in rows)  # so that each plan found the device as a job does
    if PLANS < 100:
        return
    # Of each kind enough to mean something.
    ran = [r for r in rows if r["kind"] == "ran"]
    lower = Counter(r["rungs"] for r in ran)
    assert len(rows) - len(ran) >= 3 and lower[0] >= 10 and lower[1] >= 8  # the first are those that were refused
    assert sum(count for fallbacks, count in lower.items() if fallbacks > 1) >= 10
    assert sum(r["recorded"] for r in ran) >= 8 and any(r["compile"] == "true" for r in ran)
    assert {r["family"] for r in ran if r["rungs"]} == set(family_names())
