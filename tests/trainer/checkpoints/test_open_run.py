"""Opening the run that a job is: a kill at any moment of it changes nothing that another run has."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from tests.support.plans import job_plan as make_plan
from trainer.checkpoints.open_run import adopt_older_run, open_run


class Killed(BaseException):
    """In place of SIGKILL."""


@pytest.fixture
def plan(tmp_path):
    return make_plan(tmp_path, "flux", PARAMS_MAX_STEPS="12")


def other(plan, **values):
    return dataclasses.replace(plan, train=dataclasses.replace(plan.train, **values))


def kill_before(monkeypatch, number):
    """The call `number` (from 0) that changes a name raises Killed."""
    left = [number]

    def killing(call):
        def called(*arguments, **keywords):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*arguments, **keywords)

        return called

    for name in ("rename", "unlink", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, killing(getattr(os, name)))


def test_what_a_run_that_left_nothing_had_chosen_is_not_taken_over_by_the_next(plan, tmp_path, monkeypatch):
    """Its place is used again; killed before any call that changes a file."""
    first = open_run(plan, [])
    first.record.update({"automatic_steps": 1000})
    out = Path(plan.output.path)
    shutil.copytree(out, tmp_path / "before")
    kills = 0
    for number in range(100):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
        with monkeypatch.context() as patched:
            kill_before(patched, number)
            try:
                open_run(other(plan, seed=7), [])
                break
            except Killed:
                kills += 1
        adopt_older_run(out)
        opened = open_run(other(plan, seed=7), [])
        assert (opened.plan.output.name, opened.home) == ("x", out)
        assert not {"automatic_steps", "automatic_epochs"} & opened.record.values.keys()
    assert kills >= 4


def test_a_new_run_keeps_its_name_wherever_it_was_killed(plan, tmp_path, monkeypatch):
    open_run(plan, []).record.own("x.safetensors")
    out = Path(plan.output.path)
    (out / "x.safetensors").write_bytes(b"LoRA")
    shutil.copytree(out, tmp_path / "before")
    kills = 0
    for number in range(100):
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "before", out)
        with monkeypatch.context() as patched:
            kill_before(patched, number)
            try:
                open_run(other(plan, seed=7), [])
                break
            except Killed:
                kills += 1
        opened = open_run(other(plan, seed=7), [])
        assert opened.plan.output.name == "x-2" and opened.home == out / "runs" / "x-2"
        for path in (tmp_path / "before").rglob("*"):
            kept = out / path.relative_to(tmp_path / "before")
            assert path.is_dir() or kept.read_bytes() == path.read_bytes()
    assert kills >= 4
