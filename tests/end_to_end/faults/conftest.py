"""A tiny job, its undisturbed result, and a process that forks trainers for it."""

import dataclasses
import hashlib
import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from trainer.spec.plan import Plan

# On an accelerator attention's backward pass adds in no fixed order, but for that of plain matrix products.
EXACT = {"PARAMS_ATTENTION": "_native_math", "PARAMS_COMPILE": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
EXACT = EXACT if torch.cuda.is_available() else {}
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FINAL = "x.safetensors"


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Server:
    """The forking process."""

    folder: Path
    process: subprocess.Popen = field(init=False)
    read: bytes = b""

    def __post_init__(self):
        environment = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")],
            cwd=ROOT,
            env={**environment, **EXACT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def ask(self, **what):
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        return self.answer()

    def answer(self, timeout=None):
        """The next answer; None if there is none within `timeout` seconds."""
        while b"\n" not in self.read:
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                return None
            block = os.read(self.process.stdout.fileno(), 4096)
            assert block, "the forking process is gone"
            self.read += block
        line, _, self.read = self.read.partition(b"\n")
        return json.loads(line)


@dataclass
class Run:
    """One output folder of the tiny job, and a server to run it in."""

    server: Server
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
        if fault:
            fault = {"fired": str(self.fired), **fault}
        return self.server.ask(plan=str(path), log=str(self.log), fault=fault)["pid"]

    def wait(self, timeout=None):
        """The exit code; None if the run is not over after `timeout` seconds."""
        answer = self.server.answer(timeout)
        return answer["code"] if answer else None

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
    server: Server
    plan: Plan
    reference: str  # hash of the final LoRA of an undisturbed run
    base: Path


@pytest.fixture(scope="session")
def tiny(small_pictures, tmp_path_factory):
    """The tiny job, run once as a user would and once by the server, with the same result."""
    base = tmp_path_factory.mktemp("tiny")
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}
    environment |= {
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
        "PARAMS_NETWORK_DIM": "4",
        "PARAMS_CAPTION_DROPOUT_RATE": "0.2",
        "SOURCE_DATE_EPOCH": "1700000000",
        **EXACT,
    }
    done = subprocess.run(
        [sys.executable, "-m", "entrypoint"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    plan = Plan.from_json((base / "first" / "plan.json").read_text())
    server = Server(base)
    again = Run(server, base / "second", plan)
    modules = base / "modules.json"
    path = again.folder / "plan.json"
    path.write_text(dataclasses.replace(plan, output=dataclasses.replace(plan.output, path=str(again.out))).to_json())
    server.ask(plan=str(path), log=str(again.log), modules=str(modules))
    assert server.answer()["code"] == 0, again.said()
    assert sha(base / "first" / FINAL) == again.final
    server.ask(**{"import": json.loads(modules.read_text())})
    yield Tiny(server, plan, again.final, base)
    server.process.stdin.close()
    server.process.wait(timeout=20)


@pytest.fixture
def run(tiny, tmp_path):
    """The tiny job in an output folder of its own."""
    return Run(tiny.server, tmp_path, tiny.plan)
