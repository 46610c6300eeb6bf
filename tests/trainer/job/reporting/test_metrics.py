"""What a run shows while it trains: one bar on a terminal, plain lines anywhere else."""

import contextlib
import fcntl
import json
import logging
import os
import pty
import struct
import sys
import termios

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.drawings import draw
from tests.support.plans import job_plan
from trainer.job.reporting.metrics import Metrics, plan_as_markdown
from trainer.job.reporting.status import Status
from trainer.spec.messages.noise_bands import KEYS
from trainer.training.loop import Step


@pytest.fixture
def shown(tmp_path, monkeypatch, caplog):
    """`shown(columns)`: all that three steps, and a word between them, put on a terminal of that width."""

    def run(columns: int) -> str:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            caplog.set_level(logging.INFO)
            handler = logging.StreamHandler(terminal)
            patch.setattr(logging.getLogger(), "handlers", [handler])
            metrics = Metrics(tmp_path, Status(tmp_path), total_steps=3, first_step=0)
            for number in (1, 2, 3):
                metrics.step(Step(number, 1, 2, loss=0.25, grad_norm=1.0), learning_rate=1e-4)
                logging.info("a word")
            metrics.close()
            logging.info("the end")
            assert logging.getLogger().handlers == [handler]
        text = b""
        with contextlib.suppress(OSError):  # which is the end of what was written; one read may give a part
            while read := os.read(ours, 2**16):
                text += read
        os.close(ours)
        return text.decode()

    return run


def test_a_loss_that_has_risen_is_warned_of_once(tmp_path, caplog):
    metrics = Metrics(tmp_path, Status(tmp_path), total_steps=100, first_step=0)
    for number in range(1, 101):
        loss = 0.5 if number <= 40 else 1.5
        metrics.step(Step(number, 1, 1, loss=loss, grad_norm=1.0), learning_rate=1e-4)
    metrics.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and warnings[0].startswith("Step 60: the loss has risen from 0.5 (median of the first 20")
    assert "PARAMS_D_COEF" in warnings[0] and metrics.risen() == (0.5, 1.5, 30)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["risen"] == str(metrics.risen())
    Metrics(tmp_path, Status(tmp_path), total_steps=1, first_step=0).step(
        Step(1, 1, 1, loss=0.5, grad_norm=1.0), learning_rate=1e-4
    )
    assert json.loads((tmp_path / "status.json").read_text())["risen"] == ""


def test_a_terminal_gets_one_bar_with_the_time_that_is_left_and_words_above_it(shown):
    text = shown(100)
    assert "3/3" in text and "loss 0.2500" in text and "step 1/3" not in text
    screen = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    assert screen.count("a word") == 3 and "the end" in screen
    assert sum("3/3" in line for line in screen) == 1


def test_a_terminal_that_does_not_know_its_width_gets_lines(shown):
    text = shown(0)
    assert "step 1/3  epoch 1  loss 0.2500" in text and "step 3/3" in text and "%|" not in text


# ---- the time that is left


def test_the_time_that_is_left_counts_the_samples_to_come(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    rounds = {1: 3, 2: 2}  # after each step
    metrics = Metrics(
        tmp_path, Status(tmp_path), total_steps=10, first_step=0, rounds_left=lambda step: rounds[step], round_s=7.0
    )

    def step(number):
        now[0] += 2.0
        metrics.step(Step(number, 1, 2, loss=0.25, grad_norm=1.0), learning_rate=1e-4)

    step(1)
    assert metrics.step_s() == 2.0 and metrics.eta_s() == 9 * 2.0 + 3 * 7.0  # as predicted
    with metrics.aside(is_round=True):
        now[0] += 5.0
    with metrics.aside():  # a validation is no round
        now[0] += 90.0
    step(2)
    assert metrics.step_s() == 2.0 and metrics.eta_s() == 8 * 2.0 + 2 * 5.0
    metrics.close()


def test_a_long_job_writes_fewer_lines_and_names_the_next_samples(tmp_path, monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    metrics = Metrics(tmp_path, Status(tmp_path), total_steps=2000, first_step=0, next_round=lambda step: 500)
    with caplog.at_level(logging.INFO):
        for number in range(1, 1201):
            now[0] += 1.0
            metrics.step(Step(number, 1, 2, loss=0.25, grad_norm=1.0), learning_rate=1e-4)
    metrics.close()
    lines = [message for message in caplog.messages if message.startswith("step ")]
    steps = [int(line.split()[1].partition("/")[0]) for line in lines]
    assert sum(step <= 60 for step in steps) == 12 and sum(60 < step <= 600 for step in steps) == 18
    assert sum(step > 600 for step in steps) == 10
    assert lines[0].endswith("0:33:19 left, next samples at step 500")


# ---- TensorBoard


@pytest.fixture
def board(tmp_path):
    """A function that reads what a run showed: scalars by tag, tags of images, texts by tag."""

    def read():
        events = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
        events.Reload()
        tags = events.Tags()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
        images = {tag: [(e.step, e.width, e.height) for e in events.Images(tag)] for tag in tags["images"]}
        texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]}
        return scalars, images, texts

    return read


def test_tensorboard_has_speed_memory_and_prodigys_estimate(tmp_path, board):
    metrics = Metrics(tmp_path, Status(tmp_path), total_steps=2, first_step=0)
    for number in (1, 2):
        metrics.step(Step(number, 1, 2, loss=0.25, grad_norm=1.0), learning_rate=2e-4, estimate=number / 1e4)
    metrics.record({"step": 2, "validation_loss": 0.125})
    metrics.close()
    scalars, _, _ = board()
    assert [step for step, _ in scalars["prodigy_d"]] == [1, 2] and scalars["prodigy_d"][1][1] == pytest.approx(2e-4)
    assert scalars["validation_loss"] == [(2, 0.125)] and scalars["lr"][0][1] == pytest.approx(2e-4)
    assert scalars["images_per_second"][-1][0] == 2 and scalars["memory_gib"][-1][1] > 0.05


def test_the_loss_by_noise_level_is_on_tensorboard_and_a_resumed_run_goes_on_with_it(tmp_path, board):
    def steps(first, bands):
        metrics = Metrics(tmp_path, Status(tmp_path), total_steps=9, first_step=first)
        for number, found in enumerate(bands, first + 1):
            step = Step(number, 1, 2, loss=0.25, grad_norm=1.0, skipped=found is None, band_losses=found or (1.0,) * 4)
            metrics.step(step, learning_rate=2e-4)
        metrics.close()

    steps(0, [(0.5, None, None, 0.125), (0.25, None, 0.75, None), (9.0,) * 4])
    assert board()[0]["loss_noise_75_100"] == [(1, 0.125), (3, 9.0)]
    steps(2, [None, (None, None, None, 2.0)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [[row.get(key) for key in KEYS] for row in rows] == [
        [0.5, None, None, 0.125], [0.25, None, 0.75, None], [None] * 4, [None, None, None, 2.0],
    ]  # fmt: skip


def test_other_optimisers_have_no_estimate(tmp_path, board):
    metrics = Metrics(tmp_path, Status(tmp_path), total_steps=1, first_step=0)
    metrics.step(Step(1, 1, 2, loss=0.25, grad_norm=1.0), learning_rate=2e-4)
    metrics.close()
    assert "prodigy_d" not in board()[0]
    assert "prodigy_d" not in (tmp_path / "metrics.jsonl").read_text()


def test_tensorboard_has_the_samples_as_images_and_the_plan_as_text(tmp_path, board):
    draw(64, 48, seed=1).save(tmp_path / "step-00000010-00.png")
    metrics = Metrics(tmp_path, Status(tmp_path), total_steps=20, first_step=0)
    plan = job_plan(tmp_path, "flux")
    metrics.describe(plan_as_markdown(plan))
    metrics.samples(10, [tmp_path / "step-00000010-00.png"])
    metrics.close()
    _, images, texts = board()
    assert images == {"sample/00": [(10, 64, 48)]}
    (text,) = texts.values()
    assert plan.reasons[0] in text and '"family": "flux"' in text
