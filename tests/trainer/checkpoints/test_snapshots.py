"""A snapshot keeps the values of the moment when it was taken, while training continues."""

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
