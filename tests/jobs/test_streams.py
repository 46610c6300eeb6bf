"""Shards of a bucket that do not all fit: they come and go while the job trains."""

from __future__ import annotations

import hashlib
import signal

import pytest

from tests.support import shards
from tests.support.bucket_server import Buckets

SHORT = {"PARAMS_MAX_STEPS": "24", "PARAMS_SAVE_EVERY_N_STEPS": "0", "PARAMS_RESOLUTION": "64"}
ROOM = 60_000  # bytes: of six shards of some 20 kB each, with what is encoded of their images


@pytest.fixture
def bucket(tmp_path):
    folder = shards.make(tmp_path / "shards", 6, 2)
    with Buckets() as server:
        for path in sorted(folder.iterdir()):
            server.objects[f"mine/data/{path.name}"] = path.read_bytes()
        yield server


def settings(bucket, tmp_path, name, **changes):
    places = {"OUTPUT_PATH": str(tmp_path / name), "CACHE_PATH": str(tmp_path / f"{name} cache")}
    cap = {"MAX_CACHE_GIB": str(ROOM / 2**30)}
    return {"DATASET_NAME": "s3://mine/data", **SHORT, **bucket.keys, **cap, **places, **changes}


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def here(tmp_path, name):
    return sorted(path.name for path in (tmp_path / f"{name} cache" / "streams").glob("*/shards/*.tar"))


def test_shards_come_and_go_and_a_stop_in_the_midst_changes_nothing(job, bucket, tmp_path):
    most = []
    for name in list(bucket.objects):
        bucket.rules[f"/{name}"] = lambda _: most.append(len(here(tmp_path, "whole")))
    code, printed = job.run(**settings(bucket, tmp_path, "whole"))
    assert code == 0, printed
    assert "To stream: " in printed and "12 images, 12 captions" in printed and "goes through" in printed, printed
    assert max(most) < 6 and not here(tmp_path, "whole")
    assert not (tmp_path / "whole cache" / "datasets").exists()

    stopped = settings(bucket, tmp_path, "stopped")
    job.environment["OUTPUT_PATH"] = stopped["OUTPUT_PATH"]
    process = job.start(**stopped)
    job.wait_for_step(process, 9)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 143, printed
    bucket.asked.clear()
    code, printed = job.run(**stopped)
    assert code == 0 and "Resumed at step" in printed, printed
    assert sha(tmp_path / "stopped" / "x.safetensors") == sha(tmp_path / "whole" / "x.safetensors")


def test_all_shards_that_fit_are_fetched_once_and_read_where_they_are(job, bucket, tmp_path):
    code, printed = job.run(**settings(bucket, tmp_path, "fits", MAX_CACHE_GIB="1", PARAMS_MAX_STEPS="2"))
    assert code == 0 and "To fetch: " in printed and "goes through" not in printed, printed
    assert len(list((tmp_path / "fits cache" / "datasets").rglob("*.tar"))) == 6


def test_a_shard_that_is_gone_in_the_midst_is_named_and_the_job_goes_on_once_it_is_back(job, bucket, tmp_path):
    gone = True

    def answer(_):
        is_training = (tmp_path / "gone" / "metrics.jsonl").exists()
        return (404, {}, b"<Error><Code>NoSuchKey</Code></Error>") if gone and is_training else None

    bucket.rules |= dict.fromkeys((f"/{name}" for name in bucket.objects), answer)
    code, printed = job.run(**settings(bucket, tmp_path, "gone"))
    assert code == 75 and ".tar: the server has no such file" in printed, printed
    assert "Put it back as it was" in printed
    gone = False
    code, printed = job.run(**settings(bucket, tmp_path, "gone"))
    assert code == 0 and "24/24" in printed and "Resumed at step" in printed, printed


def test_a_shard_that_was_never_there_or_is_damaged_is_said_and_the_others_are_trained_on(job, bucket, tmp_path):
    bucket.objects["mine/data/00005.tar"] = b"<html>no tar</html>" * 600
    code, printed = job.run(**settings(bucket, tmp_path, "hurt", PARAMS_MAX_STEPS="4"))
    assert code == 65 and "00005.tar" in printed and "1 of 6 shards are more than 10 %" in printed, printed


def test_what_needs_all_images_at_once_is_refused(job, bucket, tmp_path):
    config = tmp_path / "dataset.json"
    config.write_text('{"datasets": [{"validation_split": 0.2, "subsets": [{}]}]}')
    code, printed = job.run(**settings(bucket, tmp_path, "held", DATASET_CONFIG=str(config)))
    assert code == 78 and "validation_split needs all images at once" in printed and "Fix: remove it" in printed, (
        printed
    )
