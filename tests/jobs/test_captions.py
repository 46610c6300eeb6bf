"""A whole job that captions and trains: captions go into the LoRA, are kept, and a stopped job ends with the same."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest
from safetensors import safe_open

from tests.support.captioners import make_florence2, make_llava, make_tagger


@pytest.fixture
def dogs(job, photographs):
    """Photographs without their captions."""
    folder = job.folder / "dogs"
    shutil.copytree(photographs / "dog", folder, ignore=shutil.ignore_patterns("*.txt"))
    return folder


def view(job) -> dict[str, dict]:
    rows = [json.loads(line) for line in (job.out / "dataset-images.jsonl").read_text().splitlines()]
    return {row["name"]: row for row in rows if "captions" in row}


def variables(job, dogs, model) -> dict[str, str]:
    names = {"DATASET_NAME": str(dogs), "CAPTION_WITH": str(model), "CACHE_PATH": str(job.folder / "own-cache")}
    return {**names, "TRIGGER_WORD": "ohwx", "CAPTION_MAX_TOKENS": "12", "PARAMS_MAX_STEPS": "2"}


def test_a_job_captions_and_trains(job, dogs):
    asked = variables(job, dogs, make_tagger(job.folder / "tagger"))
    (dogs / "00.txt").write_text("a dog by hand")
    code, printed = job.run("--check", **asked)
    assert code == 0, printed
    assert "tagger captions 4 of 5 images before training" in printed
    code, printed = job.run(**asked)
    assert code == 0, printed
    assert "4 captions missing: tagger makes them" in printed and "Captioned 4 images" in printed
    rows = view(job)
    assert rows["00.jpg"]["captions"] == ["ohwx, a dog by hand"] and "captioned_by" not in rows["00.jpg"]
    assert all(row["captioned_by"] == "tagger" for name, row in rows.items() if name != "00.jpg")
    assert all(row["captions"][0].startswith("ohwx, ") for row in rows.values())
    with safe_open(job.out / "x.safetensors", "pt") as file:
        (frequency,) = json.loads(file.metadata()["ss_tag_frequency"]).values()
    tags = rows["01.jpg"]["captions"][0].removeprefix("ohwx, ").split(", ")
    assert set(tags) <= set(frequency)
    assert str(job.folder) not in (job.out / "dataset-images.jsonl").read_text()
    assert "made by tagger" in (job.out / "dataset-report.csv").read_text(encoding="utf-8-sig")
    assert not (dogs / "01.txt").exists()
    code, printed = job.run(**asked)
    assert code == 0 and "This job is done" in printed, printed


def test_a_job_that_is_stopped_while_it_captions_goes_on_and_ends_with_the_same_captions(job, dogs, photographs):
    for number in range(3):
        for image in sorted((photographs / "can").glob("*.jpg")):
            # Another image each, since equal ones are captioned once: bytes after the end of a JPEG change no pixel.
            (dogs / f"can{number}-{image.name}").write_bytes(image.read_bytes() + bytes([number]))
    asked = variables(job, dogs, make_llava(job.folder / "llava")) | {"CAPTION_MAX_TOKENS": "64"}
    process = job.start(**asked)
    kept = job.folder / "own-cache" / "captions"
    deadline = time.monotonic() + 120
    while not list(kept.rglob("*.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.printed()
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 143, printed
    before = {path: path.read_text() for path in kept.rglob("*.json")}
    assert 0 < len(before) < 23
    code, printed = job.run(**asked)
    assert code == 0, printed
    assert f"Captioning {23 - len(before)} images" in printed
    assert {path: path.read_text() for path in before} == before
    resumed = {name: row["captions"] for name, row in view(job).items()}
    whole = {**asked, "OUTPUT_PATH": str(job.folder / "whole"), "CACHE_PATH": str(job.folder / "another-cache")}
    job.environment["OUTPUT_PATH"] = whole["OUTPUT_PATH"]
    code, printed = job.run(**whole)
    assert code == 0, printed
    assert {name: row["captions"] for name, row in view(job).items()} == resumed


def test_captions_beside_the_images_are_the_users_from_then_on(job, dogs):
    asked = variables(job, dogs, make_florence2(job.folder / "florence2")) | {"CAPTION_WRITE": "true"}
    code, printed = job.run(**asked)
    assert code == 0 and "5 captions written beside the images" in printed, printed
    files = {path.name: path.read_text() for path in dogs.glob("*.txt")}
    assert len(files) == 5
    code, printed = job.run(**asked | {"PARAMS_MAX_STEPS": "3"})
    assert code == 0, printed
    assert "New run" not in printed  # the same captions, wherever they are read
    assert {path.name: path.read_text() for path in dogs.glob("*.txt")} == files


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"CAPTION_WITH": "microsoft/Florence-2-large"}, "Fix: florence-community/Florence-2-large"),
        ({"CAPTION_WITH": "/nowhere"}, "CAPTION_WITH='/nowhere' is not an existing folder"),
        ({"CAPTION_WITH": "blip"}, "is neither a folder nor the name of a repository"),
        ({"CAPTION_WITH": "", "CAPTION_WRITE": "true"}, "CAPTION_WRITE=true belongs to CAPTION_WITH"),
        ({"CAPTION_PROMPT": "Name {trigger}.", "TRIGGER_WORD": ""}, "speaks of the trigger word, and there is none"),
        ({"DATASET_NAME": "org/images", "CAPTION_WRITE": "true"}, "CAPTION_WRITE=true: org/images"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_read(job, dogs, changes, says):
    asked = variables(job, dogs, make_tagger(job.folder / "tagger", side=32))
    code, printed = job.run("--check", **{**asked, **changes})
    assert code == 78 and says in printed, printed
