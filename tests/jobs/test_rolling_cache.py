"""A cache that may hold a part of the images only: an epoch goes through the parts, wherever the job is stopped."""

from __future__ import annotations

import hashlib
import signal

import pytest

from tests.support import shards

# Miniatures are taken for 2 bytes a pixel: 8 KiB each at 64 × 64. So three or four images are a window.
WINDOW = {"MAX_CACHE_GIB": str(30_000 / 2**30)}
SHORT = {"PARAMS_MAX_STEPS": "20", "PARAMS_SAVE_EVERY_N_STEPS": "0", "PARAMS_RESOLUTION": "64"}


def settings(job, tmp_path, name, **changes):
    places = {"OUTPUT_PATH": str(tmp_path / name), "CACHE_PATH": str(tmp_path / f"{name} cache")}
    return {"DATASET_NAME": str(tmp_path / "shards"), **SHORT, **WINDOW, **places, **changes}


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cached(tmp_path, name):
    return list((tmp_path / f"{name} cache" / "rolling").rglob("*.safetensors"))


def test_a_run_stopped_in_the_midst_of_a_window_ends_as_one_that_was_not(job, tmp_path):
    shards.make(tmp_path / "shards", 2, 5)
    code, printed = job.run(**settings(job, tmp_path, "whole"))
    assert code == 0, printed
    assert "an epoch goes through 4 windows" in printed, printed
    assert printed.count("Encoded window") == 7  # in two epochs, of which the second begins with the last of the first
    assert not (tmp_path / "whole cache" / "rolling").exists() or not cached(tmp_path, "whole")

    stopped = settings(job, tmp_path, "stopped")
    job.environment["OUTPUT_PATH"] = stopped["OUTPUT_PATH"]
    process = job.start(**stopped)
    job.wait_for_step(process, 12)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 143, printed
    step = job.status()["step"]
    assert 12 <= step < 20
    assert 0 < len(cached(tmp_path, "stopped")) <= 2 * 3 + 5  # images and captions of one window, and prompts
    code, printed = job.run(**stopped)
    assert code == 0, printed
    assert f"Resumed at step {step} of 20." in printed
    assert sha(tmp_path / "stopped" / "x.safetensors") == sha(tmp_path / "whole" / "x.safetensors")


def test_two_processes_go_through_the_windows_as_one_does(job, tmp_path):
    shards.make(tmp_path / "shards", 2, 5)
    exact = {"PARAMS_PRECISION": "fp32", "PARAMS_COMPILE": "false", "PARAMS_MAX_STEPS": "6", "BACKEND": "cpu"}
    losses = {}
    for name, changes in (("two", {"NUM_GPUS": "2"}), ("one", {"PARAMS_GRADIENT_ACCUMULATION": "2"})):
        asked = settings(job, tmp_path, name, **exact, **changes)
        job.environment["OUTPUT_PATH"] = asked["OUTPUT_PATH"]
        code, printed = job.run(**asked)
        assert code == 0 and "goes through 4 windows" in printed, printed
        losses[name] = [row["loss"] for row in job.metrics() if "loss" in row]
    assert len(losses["one"]) == 6 and losses["two"] == pytest.approx(losses["one"], rel=1e-4)
