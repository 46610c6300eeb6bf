"""Jobs as a user starts them: an environment in, real processes, files out."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Job:
    """One output folder, and the environment that fills it."""

    folder: Path
    environment: dict[str, str]

    @property
    def out(self) -> Path:
        return Path(self.environment["OUTPUT_PATH"])

    def start(self, *arguments: str, **changes: str) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}
        return subprocess.Popen(
            [sys.executable, "-m", "entrypoint", *arguments],
            cwd=ROOT,
            env={"OMP_NUM_THREADS": "1", **environment, **self.environment, **changes},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **changes: str) -> tuple[int, str]:
        """Exit code, and all that was printed."""
        process = self.start(*arguments, **changes)
        printed, _ = process.communicate(timeout=900)
        return process.returncode, printed

    def wait_for_step(self, process: subprocess.Popen, step: int) -> None:
        """Return as soon as `step` is in metrics.jsonl."""
        deadline = time.monotonic() + 120
        while not any(row["step"] >= step for row in self.metrics()):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def metrics(self) -> list[dict]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def status(self) -> dict:
        return json.loads((self.out / "status.json").read_text())


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def job(tmp_path, shared_cache, images):
    """A short job on the miniature: 12 steps, no samples."""
    return Job(
        tmp_path,
        {
            "BASE_MODEL": "mini-flux",
            "DATASET_NAME": str(images),
            "OUTPUT_PATH": str(tmp_path / "output"),
            "CACHE_PATH": str(shared_cache),
            "HF_HOME": str(tmp_path / "hf"),
            "OUTPUT_NAME": "x",
            "PARAMS_MAX_STEPS": "12",
            "PARAMS_SAMPLE_EVERY_N_STEPS": "0",
            "PARAMS_SAVE_EVERY_N_STEPS": "4",
            "PARAMS_NETWORK_DIM": "4",
            "SOURCE_DATE_EPOCH": "1700000000",
        },
    )


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Six drawn pictures of two shapes with sidecar captions."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        image = Image.new("RGB", (128, 128) if i % 2 else (160, 96), (30 * i, 200 - 30 * i, 90))
        ImageDraw.Draw(image).ellipse((20 + 5 * i, 20, 60 + 5 * i, 60), fill=(250, 40 * i, 0))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a spot, number {i}")
    return folder
