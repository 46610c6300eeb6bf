"""Two processes that train together equal one that accumulates two micro-batches per step."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from entrypoint.processes.launch import member_environment
from entrypoint.system.environment import child_environment
from tests.support.team import BAD, STEPS, Model, micro_batch, trained
from trainer.data.records import ImageRecord
from trainer.engine.cuda_graphs import EagerStep
from trainer.job.handover import HandedOver, hand_over, receive
from trainer.spec.errors import SettingsError
from trainer.training.distributed import Workers, workers_from_environment
from trainer.training.loop import train
from trainer.training.objective import FlowMatching
from trainer.training.step_guard import StepGuard
from trainer.training.stop_flag import StopFlag

CASES = ["plain", "bad", "memory", "joined", "joined memory", "frozen memory", "sharded memory"]
CASES.append("stop")  # the wish to stop stays


def start(folder, *cases):
    """The two processes; their results go to `folder`."""
    (folder / "together").mkdir()
    given = {**child_environment(os.environ), "RESULTS": str(folder)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.team", *cases],
            env=given | member_environment(given, folder / "together", rank, size=2),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Steps, weights and guard of each of the two, by case."""
    folder = tmp_path_factory.mktemp("pair")
    said = [process.communicate(timeout=120)[1] for process in start(folder, *CASES)]
    found = {}
    for case in CASES:
        each = [folder / f"{case}-{rank}" for rank in range(2)]
        assert all(path.with_suffix(".json").exists() for path in each), said
        told = [json.loads(path.with_suffix(".json").read_text()) for path in each]
        found[case] = [(t["steps"], load_file(f"{p}.safetensors"), t["guard"]) for t, p in zip(told, each, strict=True)]
    return found, said


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", ["plain", "bad", "memory", "joined", "joined memory"])
def test_two_processes_are_one_with_two_micro_batches_to_a_step(pair, case):
    """Of unequal sizes; also where the second has none, where a weight is used by one alone, or by none at all."""
    steps, weights, guard = trained(Workers(), {"memory": "plain", "joined memory": "joined"}.get(case, case))
    for theirs, their_weights, their_guard in pair[0][case]:
        assert len(theirs) == len(steps) == len(STEPS)
        for ours, other in zip(steps, theirs, strict=True):
            assert other[:2] == pytest.approx(ours[:2], rel=1e-5, nan_ok=True) and other[2:4] == ours[2:4]
        for name, value in weights.items():
            torch.testing.assert_close(their_weights[name], value, rtol=0, atol=1e-6)
        assert their_guard["skipped"] == guard["skipped"] == (case == "bad")
    assert [row[3] for row in steps].index(True) == BAD - 1 if case == "bad" else not any(row[3] for row in steps)


def test_both_have_the_same_bits(pair):
    for (steps, weights, guard), (others, their_weights, their_guard) in pair[0].values():
        assert same(weights, their_weights) and str(steps) == str(others) and guard == their_guard


def test_sharded_weights_train_as_those_that_each_process_has(pair):
    """Also where one process runs out of memory and does more passes than the other, or has no images in a step."""
    for (steps, weights, guard), (others, their_weights, their_guard) in zip(
        pair[0]["frozen memory"], pair[0]["sharded memory"], strict=True
    ):
        assert len(steps) == len(STEPS) and str(steps) == str(others) and same(weights, their_weights)
        assert guard == their_guard
    halved = [said.count("from now on 1 at once") for said in pair[1]]
    assert halved == [0, len([case for case in CASES if case.endswith("memory")])]


def test_flat_parameters_train_as_separate_ones_do():
    apart, joined = (trained(Workers(), case) for case in ("plain", "joined"))
    assert [row[:2] for row in joined[0]] == [pytest.approx(row[:2], rel=1e-6) for row in apart[0]]
    for name, value in apart[1].items():
        torch.testing.assert_close(joined[1][name], value, rtol=0, atol=1e-6)


def test_the_process_with_the_bad_image_names_it(pair):
    first, second = pair[1]
    assert "an image of another process" in first and "bad data" not in first
    assert "bad data: the encoded 6-0.png" in second


def test_a_stop_of_the_first_process_reaches_all_after_the_same_step(pair):
    for steps, _, _ in pair[0]["stop"]:
        assert [row[4] for row in steps] == [False, False, True]


@pytest.mark.slow
def test_weights_that_differ_between_processes_are_an_error(tmp_path):
    for process in start(tmp_path, "apart"):
        assert "The 2 processes have different weights" in process.communicate(timeout=120)[1]
        assert process.returncode == 1


def test_prepared_data_survives_the_handover(tmp_path, job_plan):
    images = (
        ImageRecord("a.png", Path("/x/a.png"), "1" * 64, 4, 5, 0, 0, None),
        ImageRecord("b/c.png", Path("/x/b/c.png"), "2" * 64, 4, 5, 0, 1, "ä", True, Path("/m"), "3"),
    )
    for state in (None, Path("/out/state/step-00000004")):
        given = HandedOver(job_plan("flux"), state, images)
        hand_over(Workers(0, 2, tmp_path), given)
        assert receive(Workers(1, 2, tmp_path), lambda: None) == given


def test_other_processes_wait_for_work_of_the_first(tmp_path):
    first, second, done = Workers(0, 2, tmp_path), Workers(1, 2, tmp_path), []
    first.on_first(lambda: done.append(1), lambda: None)
    second.on_first(lambda: done.append(2), lambda: None)
    assert done == [1]
    ticks = iter(range(3))

    def check_in():
        if next(ticks) == 2:
            first.on_first(lambda: done.append(3), lambda: None)

    second.on_first(lambda: done.append(4), check_in)
    assert done == [1, 3]


def test_a_plan_for_several_processes_is_refused_by_one(job_plan):
    plan = job_plan("flux", NUM_GPUS="2")
    with pytest.raises(SettingsError, match="NUM_GPUS=2"):
        workers_from_environment(plan.engine.num_gpus, {}, StopFlag())
    assert dataclasses.astuple(plan.engine)[1] == 2


def steps(groups, objective=None, runner=EagerStep):
    """The losses of a single process, up to what ends it, and that."""
    model, losses = Model(), []
    params = [*model.parameters()]
    optimizer = torch.optim.AdamW(params, lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    options = {"max_grad_norm": 1.0, "guard": StepGuard(), "device": "cpu", "seed": 7, "first_step": 1}
    objective, runner = objective or FlowMatching(), runner(params)
    trained = {"params": params, "optimizer": optimizer, "schedule": schedule, "runner": runner, **options}
    try:
        for step in train(groups, predict=model, objective=objective, **trained):
            losses.append(step.loss)
    except OSError as problem:
        return losses, str(problem)
    return losses, None


class Recording(EagerStep):
    capturing = True


def test_a_batch_that_cannot_be_read_is_raised_after_the_step_before_it():
    def groups(good):
        yield from ((1, [micro_batch(i, 2)]) for i in range(good))
        raise OSError("gone")

    for good in (0, 1, 3):
        losses, problem = steps(groups(good))
        assert len(losses) == good and problem == "gone"


def test_out_of_memory_while_prefetching_is_handled_in_the_step_of_that_batch():
    class Scarce(FlowMatching):
        calls = 0

        def add_noise(self, *given):
            Scarce.calls += 1
            if Scarce.calls == 2:
                raise torch.OutOfMemoryError("made up")
            return super().add_noise(*given)

    groups = [(1, [micro_batch(i, 2)]) for i in range(4)]
    assert steps(groups, Scarce(), Recording) == steps(groups) and Scarce.calls == 5
