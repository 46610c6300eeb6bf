"""A checkpointed region that fails leaves nothing behind, and regions with checkpoints compile."""

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from trainer.engine.memory import checkpointing

CHECKPOINTED = [policy for policy, forward in checkpointing.POLICIES.items() if forward]


class Block(torch.nn.Module):
    """`fails`: in which of its forward passes memory runs out."""

    def __init__(self, fails=0):
        super().__init__()
        self.layer, self.fails, self.passes = torch.nn.Linear(16, 16), fails, 0

    def forward(self, x, *, more):
        x = self.layer(x).sin()
        if self.fails:
            self.passes += 1
            if self.passes == self.fails:
                raise torch.OutOfMemoryError("there is none")
        q = x[None, None]
        return x + more * torch.nn.functional.scaled_dot_product_attention(q, q, q)[0, 0]


def suspended(function, *args, use_reentrant, preserve_rng_state, context_fn=None, **kwargs):
    """torch's checkpoint as it was before version 2.13, with hooks that must not be called after the pass."""

    def gone(t):
        raise AssertionError("This hook is of a pass that is over.")

    def inside():
        with torch.autograd.graph.saved_tensors_hooks(gone, gone):
            yield

    generator = inside()
    next(generator)
    found = function(*args, **kwargs)
    next(generator, None)
    return found


def kept(x):
    """Whether autograd keeps a tensor as it is: then the gradient of its square is right."""
    x = x.detach().requires_grad_()
    x.square().sum().backward()
    return torch.equal(x.grad, 2 * x)


@pytest.mark.parametrize("policy", CHECKPOINTED)
@pytest.mark.parametrize("fails", [1, 2])
def test_a_region_that_fails_leaves_no_hook_and_no_mode(policy, fails):
    seen = []
    region = Block(fails)
    checkpointing.apply([region], [policy], compiled=False)
    x = torch.randn(4, 16, requires_grad=True)
    with pytest.raises(torch.OutOfMemoryError, match="there is none") as held:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            out = region(x, more=torch.ones(16))
        out.sum().backward()
    saved = len(seen)
    assert held.value.__traceback__ and _get_current_dispatch_mode_stack() == []
    assert kept(x) and len(seen) == saved and (saved > 0 or fails == 1)
    assert region.passes == fails
    assert region(x, more=torch.ones(16)).isfinite().all()


def test_a_failing_region_leaves_no_hook_with_an_older_torch(monkeypatch):
    monkeypatch.setattr(checkpointing, "checkpoint", suspended)
    region = Block(1)
    checkpointing.apply([region], ["all"], compiled=False)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError) as held:
        region(torch.randn(4, 16), more=1.0)
    assert held.value.__traceback__ and kept(torch.randn(4))


@pytest.mark.parametrize("policy", CHECKPOINTED)
def test_a_region_in_a_checkpoint_compiles_as_a_whole(policy):
    region = Block()
    checkpointing.apply([region], [policy], compiled=False)
    compiled = torch.compile(region, backend="aot_eager", fullgraph=True)
    found = []
    for run in (region, compiled):
        x = torch.linspace(-1, 1, 64).view(4, 16).requires_grad_()
        out = run(x, more=torch.ones(16))
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), (x, region.layer.weight))))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
