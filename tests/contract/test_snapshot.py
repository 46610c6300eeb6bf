"""Copies for a save are those of the moment they were taken, while training goes on."""

import time

import pytest
import torch

from trainer.snapshot import Background, Snapshots


def test_a_copy_is_not_the_original():
    weight = torch.nn.Parameter(torch.ones(3))
    snapshots = Snapshots(torch.optim.SGD([weight], lr=1.0), "cpu")
    tree = {"a": [weight, (1, None)], "b": {0: {"x": weight}}}
    taken = snapshots.take(tree)
    with torch.no_grad():
        weight += 1
    tree["b"][0]["y"] = 2
    assert taken["a"][1] == (1, None) and taken["b"].keys() == {0} and taken["b"][0].keys() == {"x"}
    assert torch.equal(taken["a"][0], torch.ones(3)) and torch.equal(taken["b"][0]["x"], torch.ones(3))


def test_what_fails_in_the_background_is_raised_in_front():
    background = Background()
    background.begin(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.join()
    background.begin(lambda: None)
    background.join()
    background.close()


@pytest.mark.alone
@pytest.mark.gpu
def test_copies_beside_the_next_step():
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
        snapshots.reuse()
        taken = snapshots.take({"params": list(params), "state": optimizer.state_dict()["state"]})
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
