"""What becomes of a recording that fails. The recordings themselves: tests/gpu/test_engine.py."""

import contextlib
import logging

import pytest
import torch

from trainer.replay import Replayed, _Recorded


@pytest.fixture
def runner(monkeypatch):
    """A runner whose captures fail once more at their end, as CUDA's do where something has ended them."""

    @contextlib.contextmanager
    def graph(*_given, **_options):
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return Replayed([torch.nn.Parameter(torch.ones(3))])


def failing(problem):
    def work(_inputs):
        raise problem

    return work


def test_what_cannot_be_recorded_is_told_once_and_launched_from_then_on(runner, caplog):
    caplog.set_level(logging.WARNING)
    assert runner._captured(failing(RuntimeError("it waits\nfor the device")), {}) is None
    assert not runner.recording and not runner.short_of_memory
    assert [r.getMessage() for r in caplog.records] == [
        "Steps cannot be recorded, and are launched kernel by kernel: it waits"
    ]
    x = torch.full((3,), 2.0)
    told = runner(lambda given: ((runner.params[0] * given["x"]), (runner.params[0] * given["x"]).sum()), {"x": x})
    assert torch.equal(told, x) and torch.equal(runner.flat, x)


def test_memory_that_runs_out_in_a_recording_is_no_reason_to_record_nothing(runner):
    with pytest.raises(torch.OutOfMemoryError, match="16 GiB"):
        runner._captured(failing(torch.OutOfMemoryError("16 GiB")), {})
    assert runner.recording
    runner.recorded["a size"] = None
    assert runner.short_of_memory


class Graph:
    def replay(self):
        pass


@pytest.mark.parametrize(("tries", "left"), [([None, "recorded"], "recorded"), ([None, None], None)])
def test_a_size_for_which_there_is_no_memory_gets_that_of_the_others_once(runner, monkeypatch, tries, left):
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    x, asked = torch.ones(3), []

    def record(key, _work, inputs):
        asked.append((key, dict(runner.recorded)))
        return tries[len(asked) - 1] and _Recorded(Graph(), dict(inputs), torch.zeros(3))

    runner.recorded["another size"] = _Recorded(Graph(), {}, x)
    monkeypatch.setattr(runner, "_record", record)
    for _ in range(2):
        runner(lambda given: (given["x"], (runner.params[0] * given["x"]).sum()), {"x": x})
    (key, others), (again, none) = asked  # and never after that
    assert key == again and list(others) == ["another size"] and not none
    assert list(runner.recorded) == [key] and (runner.recorded[key] is None) is (left is None)
    assert runner.short_of_memory is (left is None)
