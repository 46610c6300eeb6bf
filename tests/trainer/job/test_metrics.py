"""What a run shows while it trains: one bar on a terminal, plain lines anywhere else."""

import contextlib
import fcntl
import logging
import os
import pty
import struct
import sys
import termios

import pytest

from trainer.job.metrics import Metrics
from trainer.job.status import Status
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


def test_a_terminal_gets_one_bar_with_the_time_that_is_left_and_words_above_it(shown):
    text = shown(100)
    assert "3/3" in text and "loss 0.2500" in text and "step 1/3" not in text
    screen = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    assert screen.count("a word") == 3 and "the end" in screen
    assert sum("3/3" in line for line in screen) == 1


def test_a_terminal_that_does_not_know_its_width_gets_lines(shown):
    text = shown(0)
    assert "step 1/3  epoch 1  loss 0.2500" in text and "step 3/3" in text and "%|" not in text
