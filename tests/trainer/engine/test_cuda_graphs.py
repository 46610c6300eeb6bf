"""CUDA graph captures that fail. Captures that succeed: tests/gpu/test_engine.py."""

import contextlib
import logging

import pytest
import torch

from trainer.engine.cuda_graphs import GraphStep, _CapturedGraph


@pytest.fixture
def runner(monkeypatch):
    """A GraphStep whose captures raise a second error at their end, as CUDA's do after a failure."""

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
    return GraphStep([torch.nn.Parameter(torch.ones(3))])


def failing(problem):
    def work(_inputs):
        raise problem

    return work


def test_a_step_that_cannot_be_captured_is_logged_once_and_runs_eagerly_from_then_on(runner, caplog):
    caplog.set_level(logging.WARNING)
    assert runner._capture_graph(failing(RuntimeError("it waits\nfor the device")), {}) is None
    assert not runner.capturing and not runner.short_of_memory
    assert [r.getMessage() for r in caplog.records] == [
        "Steps cannot be captured as a CUDA graph, and run kernel by kernel: it waits"
    ]
    x = torch.full((3,), 2.0)
    told = runner(lambda given: ((runner.params[0] * given["x"]), (runner.params[0] * given["x"]).sum()), {"x": x})
    assert torch.equal(told, x) and torch.equal(runner.flat_grad, x)


def test_running_out_of_memory_during_a_capture_does_not_end_capturing(runner):
    with pytest.raises(torch.OutOfMemoryError, match="16 GiB"):
        runner._capture_graph(failing(torch.OutOfMemoryError("16 GiB")), {})
    assert runner.capturing
    runner.too_large.add("a size")
    assert runner.short_of_memory


class Graph:
    def replay(self):
        pass


@pytest.fixture
def room(runner, monkeypatch):
    """`room(count)`: memory for so many graphs at once. Returns the sizes of all captures that were tried, in order."""
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    tried = []

    def make(count):
        def record(key, _work, inputs):
            tried.append(len(inputs["x"]))
            fits = len(runner.captured) < count
            return _CapturedGraph(Graph(), {k: v.clone() for k, v in inputs.items()}, torch.zeros(3)) if fits else None

        monkeypatch.setattr(runner, "_capture", record)
        return tried

    return make


def step(runner, size):
    runner(lambda given: (given["x"], (runner.params[0].sum() * given["x"]).sum()), {"x": torch.ones(size)})


def test_a_size_evicts_the_graphs_of_others_once_and_runs_eagerly_after_that(runner, room, caplog):
    caplog.set_level(logging.WARNING)
    tried = room(1)
    for _ in range(10):
        step(runner, 3)
        step(runner, 5)
    # The second size evicts the first, which is then tried once more.
    assert tried == [3, 5, 5, 3] and runner.short_of_memory and len(caplog.records) == 1
    runner.release()
    step(runner, 3)
    assert tried == [3, 5, 5, 3]  # a size that does not fit is not tried again
    runner.reset()
    step(runner, 3)
    assert tried[4:] == [3] and not runner.short_of_memory


def test_without_any_memory_each_size_is_tried_once(runner, room):
    tried = room(0)
    for _ in range(3):
        step(runner, 3)
        step(runner, 5)
    assert tried == [3, 5] and runner.short_of_memory and runner.capturing
