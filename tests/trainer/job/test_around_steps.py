"""Around the steps: what the rehearsal gives up where memory runs out, and what a stop between two steps saves."""

import dataclasses
import hashlib
import json
import logging
import random
import signal
import threading

import pytest
import torch
from PIL import Image

from trainer.checkpoints import state_files
from trainer.engine.cuda_graphs import EagerStep
from trainer.job import build, rehearsal, sampling, session
from trainer.job.run import run
from trainer.spec.errors import StopRequestedError
from trainer.storage import own_files
from trainer.training import loop
from trainer.training.stop_flag import StopFlag


@pytest.fixture
def job(job_plan, tmp_path, monkeypatch):
    """`job(failures)`: a short job whose captured steps run out of memory so often; its LoRA, runners, fallbacks."""
    asked = {"PARAMS_MAX_STEPS": "2", "PARAMS_OPTIMIZER_TYPE": "adamw"}
    plan = job_plan("flux", **asked)

    def make(failures, *, replay=True, after=0, below=False, **variables):
        made, lowered = [], []

        class Recording(EagerStep):
            capturing = True

            def __init__(self, *params, warms_up_each):
                super().__init__(*params)
                made.append(self)
                self.calls, self.renewed, self.given_up, self.sizes = 0, 0, False, []

            def __call__(self, work, inputs):
                if self.comparing:  # with a launched step, once more
                    return super().__call__(work, inputs)
                self.calls += 1
                self.sizes.append(tuple(inputs["noised.noisy_BCHW"].shape))
                if after < self.calls <= after + failures:
                    raise torch.OutOfMemoryError("no memory")
                return super().__call__(work, inputs)

            def reset(self):
                self.renewed += 1

            def disable(self):
                self.given_up, self.capturing = True, False
                return self.calls <= after + 1  # what it held is given back once

        monkeypatch.setattr(build, "GraphStep", Recording)
        monkeypatch.setattr(rehearsal.Engine, "step_down", lambda self, problem: lowered.append(problem))
        monkeypatch.setattr(rehearsal.Engine, "can_capture", lambda self, rung=0: rung == 0 or below)
        own_plan = job_plan("flux", **asked, **variables) if variables else plan
        out = tmp_path / f"out-{failures}-{replay}-{after}-{below}"
        output = dataclasses.replace(own_plan.output, path=str(out))
        engine = dataclasses.replace(own_plan.engine, replay=replay)
        run(dataclasses.replace(own_plan, engine=engine, output=output), StopFlag())
        return hashlib.sha256((out / "x.safetensors").read_bytes()).hexdigest(), made, lowered

    return make


def test_a_captured_step_is_rehearsed_as_it_trains(job):
    plain, none, _ = job(0, replay=False)
    recorded, (runner,), lowered = job(0)
    assert none == [] and lowered == [] and recorded == plain
    assert runner.calls == 1 + 2  # the rehearsal, and two steps


def test_the_batch_that_needs_most_memory_is_rehearsed_though_another_has_more_pixels(job_plan, tmp_path, monkeypatch):
    def sized(side, count):
        subset = {"image_dir": str(tmp_path / "pictures"), "caption_extension": ".txt"}
        return {"resolution": side, "batch_size": count, "subsets": [subset]}

    predict, train, calls = session.Session.predict, session.Session.train, []

    def measured(self, noisy, *given):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            found = predict(self, noisy, *given)
        calls.append((noisy.numel(), sum(kept)))
        return found

    rehearsed = []
    monkeypatch.setattr(session.Session, "predict", measured)
    monkeypatch.setattr(
        session.Session, "train", lambda self, *given, **named: rehearsed.extend(calls) or train(self, *given, **named)
    )
    sizes = json.dumps({"datasets": [sized(96, 1), sized(64, 2)]})  # 36 and 16 tokens of a picture, and 64 of its text
    run(job_plan("flux", DATASET_NAME="", DATASET_CONFIG=sizes, PARAMS_MAX_STEPS="3"), StopFlag())
    steps = calls[len(rehearsed) : len(rehearsed) + 3]
    assert max(steps)[1] < max(kept for _, kept in steps) <= max(kept for _, kept in rehearsed)


def test_cuda_graphs_are_disabled_before_anything_is_recomputed(job):
    plain, _, _ = job(0, replay=False)
    given_up, (runner,), lowered = job(1)
    assert runner.calls == 1 + 1 + 2 and runner.given_up and lowered == [] and given_up == plain


def test_an_uncompiled_step_is_captured_with_the_next_strategy_instead(job):
    plain, _, _ = job(0, replay=False)
    found, (runner,), lowered = job(1, below=True)
    assert runner.calls == 1 + 1 + 2 and runner.renewed == 1 and not runner.given_up
    assert len(lowered) == 1 and found == plain


def test_out_of_memory_in_a_captured_step_disables_cuda_graphs_first(job, caplog):
    caplog.set_level(logging.WARNING)
    plain, _, _ = job(0, replay=False)
    found, (runner,), lowered = job(1, after=1)  # past the rehearsal
    assert runner.calls == 1 + 1 + 2 and lowered == [] and found == plain
    assert "CUDA graphs are disabled" in caplog.text and "at once" not in caplog.text


def test_cuda_graphs_leave_room_for_the_optimiser_or_are_disabled(job, monkeypatch):
    plain, _, _ = job(0, replay=False)
    first_state, rehearsed, at, short = rehearsal.TrainingState.first_state, rehearsal.Rehearsal.fits, [], []

    def full(self):
        if at[-1].runner.capturing and at[-1].runner.calls:
            short.append(True)
            raise torch.OutOfMemoryError("no memory beside it")
        return first_state(self)

    monkeypatch.setattr(rehearsal.TrainingState, "first_state", full)
    monkeypatch.setattr(rehearsal.Rehearsal, "fits", lambda self, *given: at.append(self) or rehearsed(self, *given))
    found, (runner,), lowered = job(0)
    assert short == [True] and runner.calls == 1 + 1 + 2 and lowered == [] and found == plain


def test_a_captured_step_of_every_size_is_rehearsed_the_largest_first(job, tmp_path):
    """Three shapes, and the last batch of the square ones has one image."""
    rng = random.Random(0)
    (tmp_path / "shapes").mkdir()
    for number, size in enumerate([(96, 96), (96, 96), (96, 96), (128, 64), (64, 128)]):
        Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])).save(tmp_path / f"shapes/{number}.png")
        (tmp_path / f"shapes/{number}.txt").write_text("a picture")
    subset = {"image_dir": str(tmp_path / "shapes"), "caption_extension": ".txt"}
    dataset = {"resolution": 96, "batch_size": 2, "enable_bucket": True, "min_bucket_reso": 64, "subsets": [subset]}
    asked = {"DATASET_NAME": "", "DATASET_CONFIG": json.dumps({"datasets": [{**dataset, "bucket_reso_steps": 32}]})}
    _, (runner,), lowered = job(0, **asked)
    each = [(2, 12, 12), (1, 12, 12), (1, 8, 16), (1, 16, 8)]
    rehearsed = [(count, height, width) for count, _, height, width in runner.sizes[: len(each)]]
    assert rehearsed[:2] == each[:2] and sorted(rehearsed) == sorted(each) and lowered == []
    assert {size[0] * size[2] * size[3] for size in runner.sizes[len(each) :]} <= {288, 144, 128}


def test_a_step_that_cannot_be_captured_is_rehearsed_again_as_an_eager_one(job, monkeypatch):
    """As where a kernel of another library waits for the device: with less memory than there is, and other sizes."""
    plain, _, _ = job(0, replay=False)
    rehearsed = rehearsal.Rehearsal.fits

    def ends(self, *given):
        found = rehearsed(self, *given)
        self.runner.capturing = False
        return found

    monkeypatch.setattr(rehearsal.Rehearsal, "fits", ends)
    found, (runner,), lowered = job(0)
    assert runner.calls == 2 + 2 and lowered == [] and found == plain


def test_adapter_columns_are_dropped_before_cuda_graphs_are_disabled(job, monkeypatch):
    plain, _, _ = job(0, replay=False)
    left = [True]
    monkeypatch.setattr(rehearsal.Engine, "drop_adapter_columns", lambda _: bool(left) and left.pop())
    found, (runner,), lowered = job(1)
    assert (
        runner.calls == 1 + 1 + 2 and runner.renewed == 1 and not runner.given_up and lowered == [] and found == plain
    )


def test_a_stop_while_a_sample_is_drawn_saves_the_step_first(job_plan, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --s 1")
    asked = {"SAMPLE_PROMPTS": str(prompts), "PARAMS_SAMPLE_EVERY_N_STEPS": "3", "PARAMS_MAX_STEPS": "8"}
    plan, stop = job_plan("flux", PARAMS_OPTIMIZER_TYPE="adamw", **asked), StopFlag()
    draw = sampling.draw_all

    def interrupted(*given, step, **named):
        if step == 3:
            stop.signal = signal.SIGTERM
        return draw(*given, step=step, **named)

    monkeypatch.setattr(sampling, "draw_all", interrupted)
    with pytest.raises(StopRequestedError):
        run(plan, stop)
    assert state_files.latest(tmp_path / "out" / "state").step == 3


def test_steps_go_on_while_the_contact_sheet_is_written(job_plan, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle --s 1")
    asked = {"SAMPLE_PROMPTS": str(prompts), "PARAMS_SAMPLE_EVERY_N_STEPS": "1", "PARAMS_MAX_STEPS": "1"}
    plan, stepped, train = job_plan("flux", PARAMS_OPTIMIZER_TYPE="adamw", **asked), threading.Event(), loop.train
    write = session.contact_sheet

    def trained(*given, **named):
        for step in train(*given, **named):
            stepped.set()
            yield step

    def written_after_the_step(*given):
        assert stepped.wait(30), "the step waits for the contact sheet"
        return write(*given)

    monkeypatch.setattr(loop, "train", trained)
    monkeypatch.setattr(session, "contact_sheet", written_after_the_step)
    run(plan, StopFlag())
    assert own_files.is_sheet(tmp_path / "out" / "sample" / own_files.SHEET_NAME)
    events = b"".join(path.read_bytes() for path in (tmp_path / "out" / "logs").iterdir())
    for path in (tmp_path / "out" / "sample").glob("step-*.png"):
        assert path.read_bytes() in events
