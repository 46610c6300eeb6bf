"""CUDA graph captures that fail, and when sizes run before they are captured. On a GPU: tests/gpu/test_engine.py."""

import contextlib
import logging
import types

import pytest
import torch

from trainer.engine import cuda_graphs
from trainer.engine.cuda_graphs import CaptureError, GraphStep, _CapturedGraph


class Pool:
    """A pool without an allocator."""

    handle = (0, 1)

    is_broken = False

    def __init__(self, *_):
        self.stream = None
        self.dropped = []

    def allocating(self):
        return contextlib.nullcontext()

    def end_failed_capture(self):
        pass

    def close(self):
        pass


@pytest.fixture
def runner(monkeypatch):
    """A GraphStep whose captures raise a second error at their end, as CUDA's do after a failure."""

    @contextlib.contextmanager
    def graph(*_given, **_options):
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904

    monkeypatch.setattr(cuda_graphs, "GraphPool", Pool)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    for name in ("synchronize", "empty_cache", "set_rng_state", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: None)
    stream = types.SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return GraphStep([torch.nn.Parameter(torch.ones(3))])


def failing(problem):
    def work(_inputs):
        raise problem

    return work


def test_a_step_that_cannot_be_captured_is_logged_once_and_runs_eagerly_from_then_on(runner, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(runner, "_warm_up", lambda *_: None)
    x = torch.full((3,), 2.0)
    assert runner._capture(failing(RuntimeError("it waits\nfor the device")), {"x": x}) is None
    assert not runner.capturing and not runner.short_of_memory
    assert [r.getMessage() for r in caplog.records] == [
        "Steps cannot be captured as a CUDA graph, and run kernel by kernel: it waits"
    ]
    told = runner(lambda given: ((runner.params[0] * given["x"]), (runner.params[0] * given["x"]).sum()), {"x": x})
    assert torch.equal(told, x) and torch.equal(runner.flat_grad, x)


def test_running_out_of_memory_during_a_capture_does_not_end_capturing(runner):
    with pytest.raises(torch.OutOfMemoryError, match="16 GiB"):
        runner._capture_graph(failing(torch.OutOfMemoryError("16 GiB")), {})
    assert runner.capturing
    runner.too_large.add("a size")
    assert runner.short_of_memory


class Graph:
    """Replays what it was captured from."""

    def __init__(self, replay=lambda: None):
        self.replay = replay


@pytest.fixture
def room(runner, monkeypatch):
    """`room(count)`: memory for so many graphs. Returns the sizes of all captures that were tried, in order."""
    tried = []

    def make(count):
        def capture(_work, inputs):
            tried.append(len(inputs["x"]))
            fits = len(runner.captured) < count
            return _CapturedGraph(Graph(), {k: v.clone() for k, v in inputs.items()}, torch.zeros(3)) if fits else None

        monkeypatch.setattr(runner, "_capture", capture)
        return tried

    return make


def step(runner, size):
    runner(lambda given: (given["x"], (runner.params[0].sum() * given["x"]).sum()), {"x": torch.ones(size)})


def test_a_size_that_does_not_fit_runs_eagerly_and_others_stay_captured(runner, room, caplog):
    caplog.set_level(logging.WARNING)
    tried = room(1)
    for _ in range(10):
        step(runner, 3)
        step(runner, 5)
    assert tried == [3, 5] and runner.short_of_memory and len(caplog.records) == 1 and len(runner.captured) == 1
    runner.release()
    step(runner, 5)
    assert tried == [3, 5]  # a size that does not fit is not tried again
    runner.reset()
    step(runner, 5)
    assert tried == [3, 5, 5] and not runner.short_of_memory


def test_in_a_rehearsal_a_size_that_does_not_fit_is_an_error(runner, room):
    room(1)
    runner.must_capture = True
    step(runner, 3)
    with pytest.raises(torch.OutOfMemoryError, match="no memory to capture"):
        step(runner, 5)
    assert runner.capturing and not runner.too_large


@pytest.fixture
def passes(runner, monkeypatch):
    """What the runner does with each size: warm it up, or capture it. `fails`: sizes that need a warm-up."""
    done, fails = [], set()

    def warm_up(_work, inputs):
        done.append(("warm", len(inputs["x"])))

    def capture_graph(_work, inputs):
        size = len(inputs["x"])
        if size in fails and ("warm", size) not in done:
            raise CaptureError("something is not there yet")
        done.append(("capture", size))
        return _CapturedGraph(Graph(), inputs, torch.zeros(3))

    monkeypatch.setattr(runner, "_warm_up", warm_up)
    monkeypatch.setattr(runner, "_capture_graph", capture_graph)
    return done, fails


def test_only_the_first_size_runs_before_it_is_captured_unless_another_needs_it(runner, passes):
    done, fails = passes
    runner.warms_up_each = lambda: False
    fails.add(7)
    for size in (3, 5, 7, 3, 5):
        step(runner, size)
    assert done == [("warm", 3), ("capture", 3), ("capture", 5), ("warm", 7), ("capture", 7)] and runner.capturing


def test_where_first_passes_compile_each_size_runs_before_it_is_captured(runner, passes):
    done, _ = passes
    for size in (3, 5):
        step(runner, size)
    assert done == [("warm", 3), ("capture", 3), ("warm", 5), ("capture", 5)]


def test_a_first_pass_that_leaves_something_in_the_pool_drops_the_graphs_before(runner, monkeypatch):
    left = iter([0, 0, 0, 512])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(left))
    work = lambda given: (given["x"], (runner.params[0].sum() * given["x"]).sum())  # noqa: E731
    runner.captured["a size"] = _CapturedGraph("its graph", {}, torch.zeros(3))
    runner._warm_up(work, {"x": torch.ones(3)})
    assert runner.captured
    runner._warm_up(work, {"x": torch.ones(5)})
    assert not runner.captured and not runner.flat_grad.any()
    assert runner.pool.dropped == ["its graph"]  # it goes with the pool
    assert runner.has_dropped
    runner.reset()
    assert not runner.has_dropped


def test_a_pool_that_a_failed_capture_has_broken_is_renewed_before_another_attempt(runner, passes):
    _, fails = passes
    runner.warms_up_each = lambda: False
    fails.add(5)
    step(runner, 3)
    runner.pool.is_broken = True
    first = runner.pool
    step(runner, 5)
    assert runner.pool is not first and runner.capturing and len(runner.captured) == 1 and runner.has_dropped
    with runner.sampling(torch.nn.Module(), Decoder()):
        runner.pool.is_broken = True
    assert not runner.pool.is_broken and not runner.captured


class Decoder(torch.nn.Module):
    def decode(self, x):
        return x


@pytest.mark.parametrize(("factor", "agrees"), [(1.0, True), (1.05, True), (0.0, False), (float("nan"), False)])
def test_a_replay_that_gives_another_gradient_ends_capturing(runner, caplog, factor, agrees):
    """As memory that is shared by mistake would: the step itself then has the launched gradient."""
    x = torch.tensor([1.0, 2.0, 3.0])

    def work(given):
        losses = runner.params[0] * given["x"]
        return losses, losses.sum()

    replayed = Graph(lambda: runner.flat_grad.add_(factor * x))
    sizes = (("x", x.shape, x.dtype),)
    runner.captured[sizes] = _CapturedGraph(replayed, {"x": x.clone()}, torch.zeros(3))
    runner.comparing = True
    runner(work, {"x": x})
    assert runner.capturing == agrees and ("not the launched one" in caplog.text) != agrees
    assert torch.allclose(runner.flat_grad, (factor if agrees else 1) * x)


def test_where_there_is_nothing_to_compare_with_the_graph_is_believed(runner):
    x = torch.tensor([1.0, float("nan"), 3.0])
    captured = _CapturedGraph(Graph(), {"x": x.clone()}, torch.zeros(3))
    assert runner._agrees(captured, lambda given: (given["x"], (runner.params[0] * given["x"]).sum()), {"x": x})
    assert runner._agrees(captured, failing(torch.OutOfMemoryError("short")), {"x": x})
