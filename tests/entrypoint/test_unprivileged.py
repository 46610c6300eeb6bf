"""A container gives up root where another user can do the job, and says why where not. For real, in processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from entrypoint import unprivileged

ROOT = Path(__file__).parents[2]
SOMEBODY = 12345
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up root")
START = """
import json, os, sys
from entrypoint import unprivileged
os.setgroups([0, 44])
unprivileged.DEVICE_FILES = json.loads(os.environ.pop("DEVICES"))
def go_on(program, words, own):
    ids = {"uids": os.getresuid(), "gids": os.getresgid(), "groups": os.getgroups()}
    print(json.dumps({"words": words[1:], **ids}))
os.execve = go_on
unprivileged.main(sys.argv[1:])
"""


@pytest.fixture
def volume():
    """A folder that other users can reach, unlike those of pytest."""
    place = Path(tempfile.mkdtemp(prefix="kiln-volume-"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


def start(volume, *words, devices=(), **environment):
    """What the container would go on as, and what it says."""
    paths = {"OUTPUT_PATH": f"{volume}/output", "CACHE_PATH": f"{volume}/cache", "HF_HOME": f"{volume}/hf"}
    done = subprocess.run(
        [sys.executable, "-c", START, *words],
        env={"PYTHONPATH": str(ROOT), "DEVICES": json.dumps(list(devices)), **paths, **environment},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


def give(volume, uid=SOMEBODY, gid=SOMEBODY):
    os.chown(volume, uid, gid)


def test_the_owner_of_the_volume_is_who_the_job_runs_as(volume):
    """For good: no saved id is left to go back to. Groups that give access to devices stay."""
    give(volume)
    found, said = start(volume, "train", HOME="/root")
    assert found == {
        "words": ["-m", "entrypoint", "train"],
        "uids": [SOMEBODY] * 3,
        "gids": [SOMEBODY] * 3,
        "groups": [44],
    }
    assert said == ""


@pytest.mark.parametrize(("mode", "gid"), [(0o777, 77), (0o2775, 0)])
def test_a_volume_of_roots_that_others_can_write_to_needs_no_root(volume, mode, gid):
    give(volume, 0, gid)
    volume.chmod(mode)
    found, said = start(volume)
    assert found["uids"] == [10001] * 3 and found["gids"] == [0] * 3 and said == ""


def test_a_volume_that_is_roots_alone_is_explained(volume):
    found, said = start(volume, "check")
    assert found["uids"] == [0] * 3
    assert "This container goes on as root: user 10001 cannot write to" in said and str(volume) in said
    assert "start the container with --user" in said


@pytest.mark.parametrize("name", ["output", "cache", "hf"])
def test_one_folder_of_roots_is_enough(volume, name):
    """Those that an earlier container made as root, for example."""
    give(volume)
    (volume / name).mkdir()
    found, said = start(volume)
    assert found["uids"] == [0] * 3 and f"cannot write to {volume / name}" in said


@pytest.mark.parametrize("variable", ["DATASET_NAME", "MODEL_PATH", "DATASET_CONFIG"])
def test_what_the_job_reads_must_be_readable(volume, variable):
    give(volume)
    (volume / "secret").write_text("x")
    (volume / "secret").chmod(0o600)
    found, said = start(volume, **{variable: f"{volume}/secret"})
    assert found["uids"] == [0] * 3 and f"cannot read {volume}/secret" in said


def test_a_device_that_is_roots_keeps_root(volume):
    give(volume)
    device = volume / "device0"
    device.touch(mode=0o600)
    assert start(volume, devices=[f"{volume}/device*"])[0]["uids"] == [0] * 3
    os.chown(device, 0, 44)
    device.chmod(0o660)  # as --group-add does it
    assert start(volume, devices=[f"{volume}/device*"])[0]["uids"] == [SOMEBODY] * 3


@pytest.mark.parametrize("word", ["shell", "sample", "export"])
def test_programs_that_write_where_they_are_told_run_as_the_container_started(volume, word):
    give(volume)
    found, said = start(volume, word, "x")
    assert (found["uids"], found["words"], said) == ([0] * 3, ["-m", "entrypoint", word, "x"], "")


def test_no_list_of_folders_leads_to_the_current_one():
    """An empty entry means the current folder, which is on the volume."""
    given = {"PATH": ":/usr/bin::bin", "LD_LIBRARY_PATH": "/opt/rocm/lib:", "PYTHONPATH": ".:/opt/kiln", "X": ":y"}
    expected = {"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/opt/rocm/lib", "PYTHONPATH": "/opt/kiln", "X": ":y"}
    assert unprivileged.without_current_folder(given) == expected


def test_a_rented_pod_stays_root(volume):
    give(volume)
    assert start(volume, RUNPOD_POD_ID="x")[0]["uids"] == [0] * 3
