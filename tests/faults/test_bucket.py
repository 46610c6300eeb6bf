"""C12: a bucket or a network volume as /workspace: what locks, flushes and renames do there."""

import pytest

BUCKET = {"kind": "bucket", "times": 100_000}


def test_a_volume_without_locks_whose_folders_cannot_be_flushed_gives_the_same_result(run, tiny):
    assert run(BUCKET) == 0, run.said()[-2000:]
    assert run.times_fired() > 10 and run.final == tiny.reference
    assert run.orphans() == []


@pytest.mark.slow
def test_a_killed_job_resumes_on_such_a_volume(run, tiny):
    assert run(BUCKET, train={"max_steps": 9}) == 0
    (run.out / "x.safetensors").unlink()
    assert run(BUCKET) == 0 and run.final == tiny.reference, run.said()[-2000:]


def test_a_bucket_without_renames_ends_the_job_at_once_and_says_what_is_missing(run):
    """No name can be half a file there, so nothing is trained that could not be saved."""
    assert run({**BUCKET, "rename": True}) == 74, run.said()[-2000:]
    assert "cannot rename files" in run.said() and "Traceback" not in run.said()
    assert not (run.out / "metrics.jsonl").exists() or not run.metrics()
