"""A snapshot keeps the values of the moment when it was taken, while training continues."""

import dataclasses
import itertools
import threading
import time
from functools import partial

import pytest
import torch

from trainer.checkpoints.snapshots import BackgroundWriter, Snapshots
from trainer.spec.family import get_family
from trainer.spec.optimizers import OPTIMIZERS
from trainer.training import optimizers
from trainer.training.ema import Ema
from trainer.training.state import TrainingState
from trainer.training.step_guard import StepGuard
from trainer.training.text_encoders import TextEncoders


def test_a_copy_is_not_the_original():
    weight = torch.nn.Parameter(torch.ones(3))
    snapshots = Snapshots(torch.optim.SGD([weight], lr=1.0), "cpu")
    tree = {"a": [weight, (1, None)], "b": {0: {"x": weight}}}
    taken = snapshots.copy(tree)
    with torch.no_grad():
        weight += 1
    tree["b"][0]["y"] = 2
    assert taken["a"][1] == (1, None) and taken["b"].keys() == {0} and taken["b"][0].keys() == {"x"}
    assert torch.equal(taken["a"][0], torch.ones(3)) and torch.equal(taken["b"][0]["x"], torch.ones(3))


def test_on_a_gpu_the_copy_is_between_what_was_queued_before_and_the_next_step_of_the_optimiser(monkeypatch):
    """The order of what is queued, on streams that only note it; what it is worth in time, a GPU shows below."""
    order = []

    class Event:
        def synchronize(self):
            order.append("the host waits for the copy")

    class Stream:
        def wait_stream(self, other):
            order.append(f"the side stream waits for the {other.name}")

        def record_event(self):
            order.append("the copy is complete")
            return Event()

        def __enter__(self):
            order.append("on the side stream")

        def __exit__(self, *_):
            order.append("on the main stream")

    main = Stream()
    main.name = "main stream"
    main.wait_event = lambda event: order.append("the main stream waits for the copy")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    snapshots = Snapshots(optimizer, "cuda")
    optimizer.step()
    snapshots.wait()
    assert order == [] and weight.tolist() == [0.0, 0.0, 0.0]  # nothing was copied yet
    taken = snapshots.copy({"weight": weight})
    copied = ["the side stream waits for the main stream", "on the side stream", "the copy is complete"]
    assert order == [*copied, "on the main stream"] and taken["weight"].tolist() == [0.0, 0.0, 0.0]
    order.clear()
    optimizer.step()
    snapshots.wait()
    assert order == ["the main stream waits for the copy", "the host waits for the copy"]
    assert taken["weight"].tolist() == [0.0, 0.0, 0.0] and weight.tolist() == [-1.0, -1.0, -1.0]


def test_buffers_are_reused_only_after_release():
    snapshots, weights = Snapshots(torch.optim.SGD([torch.zeros(1)], lr=1.0), "cpu"), torch.rand(5, 7)
    first = snapshots.copy([weights, weights.half(), torch.tensor(3), torch.empty(0)])
    second = snapshots.copy([weights + 1])
    assert torch.equal(first[0], weights) and torch.equal(second[0], weights + 1)
    assert torch.equal(first[1], weights.half()) and first[2] == 3 and first[3].numel() == 0
    snapshots.release()
    third = snapshots.copy([weights + 2, weights + 3])
    assert {t.data_ptr() for t in third} == {first[0].data_ptr(), second[0].data_ptr()}
    assert torch.equal(third[0], weights + 2) and torch.equal(third[1], weights + 3)


def test_buffers_of_large_tensors_waste_little_memory():
    snapshots = Snapshots(torch.optim.SGD([torch.zeros(1)], lr=1.0), "cpu")
    snapshots.copy([torch.zeros(3 * 2**20) for _ in range(40)])  # 480 MiB
    assert snapshots.bytes < 1.1 * 480 * 2**20


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rehearsed_state_has_the_buffers_of_every_save(name, monkeypatch):
    """The buffers of a rehearsal serve all saves; and the rehearsal leaves no trace in what is trained."""
    plain, rehearsed = training_state(name), training_state(name)
    snapshots = Snapshots(rehearsed.optimizer, "cpu")
    snapshots.copy(rehearsed.first_state())
    assert not any(rehearsed.optimizer.state_dict()["state"].values())
    monkeypatch.setattr(snapshots, "_allocate", None)  # from here on nothing can be taken
    for number in range(4):
        for one in (plain, rehearsed):
            x = torch.randn(32, 96, generator=torch.Generator().manual_seed(number))
            (x @ one.optimizer_params[0] @ one.optimizer_params[1] - x[:, :8]).square().mean().backward()
            one.optimizer.step()
            one.schedule.step()
            one.optimizer.zero_grad()
        snapshots.release()
        snapshots.copy(rehearsed.state())
    assert all(torch.equal(a, b) for a, b in zip(plain.optimizer_params, rehearsed.optimizer_params, strict=True))


def training_state(name):
    """Of two matrices, one of them zero as in an adapter, with an average."""
    torch.manual_seed(0)
    spec, params = OPTIMIZERS[name], [torch.nn.Parameter(torch.randn(96, 64)), torch.nn.Parameter(torch.zeros(64, 8))]
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    rates = {"learning_rate": spec.learning_rate, "weight_decay": 0.1}
    new = partial(optimizers.make_optimizer, name, groups, **rates, args=spec.defaults, warmup_steps=2)
    optimizer = new()
    schedule = optimizers.make_schedule("constant", optimizer, warmup_steps=0, total_steps=9, num_cycles=1)
    both, average = (params, params), Ema(params, 0.9)
    made = TrainingState(None, TextEncoders(get_family("flux")), *both, optimizer, new, schedule, average, StepGuard())
    made.adapters = {str(i): p.detach() for i, p in enumerate(params)}
    made.text_adapters = {}
    return made


def test_small_tensors_share_a_slab_and_none_overlaps_another():
    snapshots = Snapshots(torch.optim.SGD([torch.zeros(1)], lr=1.0), "cpu")
    tensors = [torch.full((size,), float(size)) for size in (1, 15, 16, 17, 1000)]
    taken = snapshots.copy(tensors)
    assert snapshots.bytes == 64 * 2**20 and snapshots.copied_bytes == 4 * sum(t.numel() for t in tensors)
    places = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in taken)
    assert all(begin % 64 == places[0][0] % 64 for begin, _ in places)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
    assert all(torch.equal(a, b) for a, b in zip(taken, tensors, strict=True))
    snapshots.release()
    assert snapshots.copied_bytes == 4 * sum(t.numel() for t in tensors)  # idle, and still there
    again = snapshots.copy(tensors[:2])
    assert snapshots.copied_bytes == 4 * sum(t.numel() for t in tensors) and snapshots.bytes == 64 * 2**20
    assert {t.data_ptr() for t in again} <= {t.data_ptr() for t in taken}
    snapshots.copy([torch.zeros(2**24), torch.zeros(2**24 + 1)])  # a slab, and a larger one
    assert snapshots.bytes == 64 * 2**20 * 2 + (2**26 + 64)


def test_dataclasses_and_other_values_are_copied_as_they_are():
    @dataclasses.dataclass(frozen=True)
    class Pair:
        tensor: torch.Tensor
        name: str

    snapshots = Snapshots(torch.optim.SGD([torch.zeros(1)], lr=1.0), "cpu")
    pair = Pair(torch.ones(2), "a")
    copy = snapshots.copy({"pair": pair, "kind": Pair, "number": 3})
    assert copy["pair"].name == "a" and torch.equal(copy["pair"].tensor, pair.tensor)
    assert copy["pair"].tensor is not pair.tensor and copy["kind"] is Pair and copy["number"] == 3
    snapshots.wait()
    snapshots.wait_on_device()


def test_one_task_runs_at_a_time_and_check_does_not_wait():
    background, gate, order = BackgroundWriter(), threading.Event(), []
    background.check()
    background.begin(lambda: gate.wait(60) and order.append("first"))
    background.check()
    assert order == []
    threading.Timer(0.05, gate.set).start()
    background.begin(lambda: order.append("second"))  # waits for the first
    assert order[0] == "first"
    background.join()
    assert order == ["first", "second"]
    background.join()
    background.close()


def test_check_raises_what_a_task_that_is_over_has_raised():
    background, over = BackgroundWriter(), threading.Event()

    def fails():
        try:
            raise OSError("full")
        finally:
            over.set()

    background.begin(fails)
    over.wait(60)
    with pytest.raises(OSError, match="full"):
        while True:  # the future is done a moment after the task
            background.check()
    background.check()
    background.begin(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.begin(lambda: None)
    background.close()


def test_an_error_at_the_end_is_logged(caplog):
    background = BackgroundWriter()
    background.begin(lambda: 1 / 0)
    background.close()
    assert "The last save failed as well: division by zero" in caplog.text
    caplog.clear()
    good = BackgroundWriter()
    good.begin(lambda: None)
    good.close()
    BackgroundWriter().close()
    assert caplog.text == ""


def test_an_error_of_the_background_writer_is_raised_by_join():
    background = BackgroundWriter()
    background.begin(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.join()
    background.begin(lambda: None)
    background.join()
    background.close()


@pytest.mark.alone
@pytest.mark.gpu
def test_copies_overlap_with_the_next_step():
    """A state of a LoRA of some 400 million parameters with AdamW, 4.8 GB; the step after a save is not longer."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    params = [torch.nn.Parameter(torch.randn(2048, 2048, device="cuda") * 0.01) for _ in range(96)]
    frozen = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    snapshots = Snapshots(optimizer, "cuda")

    def step():
        began = time.perf_counter()
        x = frozen
        for _ in range(400):
            x = x @ frozen * 1e-2
        loss = sum((p * p).sum() for p in params) + 0 * x.float().mean().nan_to_num()
        loss.backward()
        loss.item()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    plain = min(step() for _ in range(6))
    stalls, after = [], []
    for _ in range(4):
        expected = [p.detach().clone() for p in params]
        moments = [optimizer.state[p]["exp_avg"].clone() for p in params]
        torch.cuda.synchronize()
        began = time.perf_counter()
        snapshots.release()
        taken = snapshots.copy({"params": list(params), "state": optimizer.state_dict()["state"]})
        stalls.append(time.perf_counter() - began)
        after.append(step())
        snapshots.wait()
        assert all(torch.equal(t, e.cpu()) for t, e in zip(taken["params"], expected, strict=True))
        assert all(torch.equal(taken["state"][i]["exp_avg"], m.cpu()) for i, m in enumerate(moments))
    print(f"\nstep {1000 * plain:.0f} ms; stalls {[round(1000 * s) for s in stalls]} ms (the first one allocates)")
    print(f"steps after a save {[round(1000 * s) for s in after]} ms")
    late = max(s + a - plain for s, a in zip(stalls[1:], after[1:], strict=True))
    print(f"cost of a save at most {1000 * late:.0f} ms")
    assert late <= max(0.05, 0.02 * plain)
