"""How a job starts: what it downloads side by side, what ends it, and weights that are in the image already."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entrypoint.bake import COMMIT, with_baked
from entrypoint.fetch.fetch import fetch_model
from entrypoint.fetch.http import RetryPolicy
from tests.support.hub import Hub, read_folder
from trainer.spec.family import base_models, get_family
from trainer.spec.plan import ModelPlan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


@pytest.fixture
def far(job, hub, images, tmp_path):
    """The short job, with its model and its pictures on the Hub."""
    hub.add("model", "org/model", read_folder(Path(base_models()["mini-flux"][1].source)))
    hub.add("dataset", "org/pictures", read_folder(images))
    job.environment |= {
        "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "BASE_MODEL": "mini-flux", "MODEL_PATH": "org/model",
        "DATASET_NAME": "org/pictures", "BACKEND": "cpu", "CACHE_PATH": str(tmp_path / "cache"),
        "PARAMS_MAX_STEPS": "2", "PARAMS_RESOLUTION": "128",
    }  # fmt: skip
    return job


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stalled(hub):
    """The largest file of the model comes to a halt in its middle."""
    (files,) = hub.repos["model", "org/model"].commits.values()
    largest = max(files.values(), key=len)
    return hub.fault(f"/cdn/{hashlib.sha256(largest).hexdigest()}", stall_at=len(largest) // 2)


@pytest.mark.slow
def test_pictures_and_weights_come_at_the_same_time(far, hub):
    stall = stalled(hub)
    process = far.start()
    wait_for(stall.reached.is_set)
    wait_for(lambda: len([a for a in hub.asked("/datasets/org/pictures/resolve/*") if a.status < 400]) >= 6)
    assert not stall.released.is_set()
    stall.released.set()
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert "To fetch: " in printed and (far.out / "x.safetensors").is_file()

    hub.down = True  # the volume has all of it now
    code, printed = far.run(HF_HUB_OFFLINE="1", PARAMS_MAX_STEPS="3", OUTPUT_PATH=str(far.folder / "again"))
    assert code == 0, printed


def test_an_error_of_one_ends_the_other(far, hub):
    stall = stalled(hub)
    hub.fault("/datasets/org/pictures/resolve/*", status=503, times=12, headers={"Retry-After": "3"})
    hub.fault("/datasets/org/pictures/resolve/*", status=403, times=99)
    began = time.monotonic()
    process = far.start()
    wait_for(stall.reached.is_set)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 77 and "DATASET_NAME=org/pictures" in printed
    assert time.monotonic() - began < 30


def test_a_signal_ends_both(far, hub):
    stall = stalled(hub)
    process = far.start()
    wait_for(stall.reached.is_set)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 143, printed


@pytest.mark.slow
def test_the_key_in_an_address_is_written_nowhere_and_may_be_renewed(job, hub, images, tmp_path):
    folder = Path(shutil.make_archive(str(tmp_path / "p"), "zip", images))
    hub.plain["/files/p.zip"] = folder.read_bytes()
    asked = {"CACHE_PATH": str(tmp_path / "cache"), "PARAMS_MAX_STEPS": "1"}
    code, printed = job.run(DATASET_NAME=f"{hub.endpoint}/files/p.zip?key=canary", **asked)
    assert code == 0 and "canary" not in printed, printed
    assert not [p for p in job.out.rglob("*") if p.is_file() and b"canary" in p.read_bytes()]
    code, printed = job.run(DATASET_NAME=f"{hub.endpoint}/files/p.zip?key=another", **asked)
    assert code == 0 and "is done" in printed, printed


def test_weights_in_the_image_need_no_network(hub, tmp_path):
    model = ModelPlan("sdxl", "sdxl", base_models()["sdxl"][1].source)
    files = read_folder(Path(base_models()["mini-sdxl"][1].source))
    published = base_models()["sdxl"][1].published
    files["unet/config.json"] = json.dumps(published.configs["unet/config.json"]).encode()
    commit = hub.add("model", model.source, files)
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "entrypoint.bake", "sdxl", str(tmp_path / "image"), str(tmp_path / "hf")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "image").iterdir()
    assert not any(path.is_symlink() for path in folder.rglob("*")) and (folder / COMMIT).is_file()

    baked = with_baked(model, tmp_path / "image")
    assert baked.path == str(folder) and baked.commit == commit
    found = fetch_model(
        baked,
        patterns=get_family("sdxl").FACTS.files,
        token=None,
        hub_cache=tmp_path / "none",
        retries=RetryPolicy(budget=0.0),
    )
    assert found.path == str(folder) and not (tmp_path / "none").exists()
    asked_for = ModelPlan("sdxl", "sdxl", model.source, revision="fp16")
    assert with_baked(asked_for, tmp_path / "image") is asked_for


@pytest.mark.parametrize("name", ["fluks", "mini-flux"])
def test_only_models_of_the_hub_are_baked(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "entrypoint.bake", name, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 78 and f"BAKE_MODEL={name}" in done.stderr and "sdxl" in done.stderr
