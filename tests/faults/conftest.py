"""A tiny job, its undisturbed result, and runs of it with faults: forked, so that a start costs no imports."""

import dataclasses
import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from tests.support import faults
from tests.support.programs import ROOT, Programs, basic_environment
from trainer.spec.plan import Plan

# On an accelerator attention's backward pass adds in no fixed order otherwise.
EXACT = {"PARAMS_DETERMINISTIC": "true"} if torch.cuda.is_available() else {}
FINAL = "x.safetensors"


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Run:
    """One output folder of the tiny job, and trainers that fill it."""

    programs: Programs
    folder: Path
    plan: Plan

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.out, self.log, self.fired = self.folder / "output", self.folder / "log.txt", self.folder / "fired.txt"

    def start(self, fault=None, **changes):
        """Begin a run with changes to sections of the plan, train={"max_steps": 3}; returns the process number."""
        plan = dataclasses.replace(self.plan, output=dataclasses.replace(self.plan.output, path=str(self.out)))
        for section, values in changes.items():
            plan = dataclasses.replace(plan, **{section: dataclasses.replace(getattr(plan, section), **values)})
        path = self.folder / "plan.json"
        path.write_text(plan.to_json())
        environment = {**basic_environment(), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), faults.PLACE))
        if fault:
            environment["KILN_FAULT"] = json.dumps({"fired": str(self.fired), **fault})
        arguments = ("-m", "trainer", str(path))
        self.process = self.programs.start(*arguments, environment=environment, output=self.log)
        return self.process.pid

    def wait(self, timeout=None):
        """The exit code; None if the run is not over after `timeout` seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def __call__(self, fault=None, **changes):
        """Run to the end; the exit code."""
        self.start(fault, **changes)
        return self.wait()

    @property
    def final(self):
        return sha(self.out / FINAL)

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def times_fired(self):
        return len(self.fired.read_text().splitlines()) if self.fired.exists() else 0

    def status(self):
        return json.loads((self.out / "status.json").read_text())

    def metrics(self):
        return [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]

    def orphans(self):
        """What a killed process was writing."""
        return [p for p in self.out.rglob(".*") if ".tmp" in p.name]

    def states(self):
        return sorted(p.name for p in (self.out / "state").glob("step-*"))


@pytest.fixture(scope="session")
def small_pictures(tmp_path_factory):
    """Sixteen pictures of 32 pixels with captions."""
    folder = tmp_path_factory.mktemp("small")
    for i in range(16):
        image = Image.new("RGB", (32, 32), (15 * i, 240 - 15 * i, 90))
        ImageDraw.Draw(image).ellipse((2 + i % 8, 4, 18 + i % 8, 20), fill=(250, 15 * i, 0))
        image.save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"a spot, number {i}")
    return folder


@dataclass
class Tiny:
    plan: Plan
    reference: str  # hash of the final LoRA of an undisturbed run
    base: Path
    environment: dict[str, str]  # that makes the job, as a user would


@pytest.fixture(scope="session")
def tiny(small_pictures, tmp_path_factory, all_programs):
    """The tiny job, run once as a user would and once forked, with the same result."""
    base = tmp_path_factory.mktemp("tiny")
    environment = {
        **basic_environment(),
        "OMP_NUM_THREADS": "1",
        "BASE_MODEL": "mini-flux",
        "DATASET_NAME": str(small_pictures),
        "OUTPUT_PATH": str(base / "first"),
        "CACHE_PATH": str(base / "cache"),
        "HF_HOME": str(base / "hf"),
        "OUTPUT_NAME": "x",
        "PARAMS_RESOLUTION": "32",
        "PARAMS_BATCH_SIZE": "2",
        "PARAMS_MAX_STEPS": "24",
        "PARAMS_SAMPLE_EVERY_N_STEPS": "0",
        "PARAMS_SAVE_EVERY_N_STEPS": "4",
        "KEEP_CHECKPOINTS": "3",
        "PARAMS_NETWORK_DIM": "4",
        "PARAMS_SAVE_PRECISION": "fp32",  # a run that differs in the last bit has another hash
        "PARAMS_CAPTION_DROPOUT_RATE": "0.2",
        "SOURCE_DATE_EPOCH": "1700000000",
        **EXACT,
    }
    done = all_programs.run("-m", "entrypoint", environment=environment, own_interpreter=True)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = Plan.from_json((base / "first" / "plan.json").read_text())
    again = Run(all_programs, base / "second", plan)
    assert again() == 0, again.said()
    assert sha(base / "first" / FINAL) == again.final
    return Tiny(plan, again.final, base, environment)


@pytest.fixture
def run(tiny, tmp_path, programs):
    """The tiny job in an output folder of its own."""
    return Run(programs, tmp_path, tiny.plan)
