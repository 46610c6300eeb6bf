"""A long job: memory, files and threads stay what they are. STEPS=20000 is the whole; the default is a tenth."""

import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.spec.plan import Prompt

STEPS = int(os.environ.get("STEPS", "2000"))
# All that a long job does, with less arithmetic in each step.
SHORT_STEPS = {"optim": {"name": "adamw", "learning_rate": 1e-3, "args": {}}, "lora": {"targets": ("attn.to_out.0",)}}


def measured(number):
    """Resident memory in MiB, open files, threads of a process; what is taken of the accelerator's memory, in MiB.

    Nothing of one that is ending, which gives its memory back first and may take its time for the rest.
    """
    status = dict(line.split(":", 1) for line in Path(f"/proc/{number}/status").read_text().splitlines())
    if "VmRSS" not in status:
        return None
    free, whole = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 2**20)
    files = len(os.listdir(f"/proc/{number}/fd"))
    return int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"]), (whole - free) / 2**20


def slope(values):
    """Growth over the whole series by a straight line, relative to its mean."""
    values = np.asarray(values, float)
    return np.polyfit(np.linspace(0, 1, len(values)), values, 1)[0] / values.mean()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_long_job_does_not_grow(run):
    prompt = {"text": "a spot", "width": 32, "height": 32, "seed": 1, "steps": 2, "guidance": 3.5, "cfg": 1.0}
    run.plan = dataclasses.replace(run.plan, prompts=(Prompt(**prompt),))
    every = max(50, STEPS // 40)
    number = run.start(train={"max_steps": STEPS}, output={"save_every": every, "sample_every": every}, **SHORT_STEPS)
    series = []
    while (code := run.wait(timeout=1.0 if series else 0.1)) is None:
        if series or ((run.out / "metrics.jsonl").exists() and run.metrics()):  # it trains
            found = measured(number)
            series += [(time.monotonic(), *found)] if found else []
    assert code == 0, run.said()[-2000:]
    later = np.array(series[len(series) // 4 :])  # the first quarter fills caches
    memory, files, threads, device = slope(later[:, 1]), later[:, 2], later[:, 3], slope(later[:, 4])
    log = (run.out / "run.log").stat().st_size
    print(
        f"\n{STEPS} steps, {STEPS // every} saves and samples, {series[-1][0] - series[0][0]:.0f} s: memory "
        f"{later[:, 1].mean():.0f} MiB, growth {100 * memory:.2f} %; open files {files.min():.0f} to {files.max():.0f} "
        f"(slope {100 * slope(files):.2f} %); threads {threads.min():.0f} to {threads.max():.0f}; run.log {log} bytes; "
        f"of the accelerator {later[:, 4].mean():.0f} MiB, growth {100 * device:.2f} %"
    )
    assert memory < 0.01 and device < 0.01
    assert np.median(files[-5:]) <= np.median(files[:5]) + 1 and np.median(threads[-5:]) <= np.median(threads[:5]) + 1
    minutes = (series[-1][0] - series[0][0]) / 60
    assert log < 20_000 + 2_000 * minutes + 400 * STEPS / every
    assert len(list((run.out / "state").iterdir())) == 3
