"""Which norms the rotary kernel takes, and that recomputing its outputs changes no bit and saves nothing of them."""

import pytest
import torch

from trainer.engine import rope

HEADS, DIM = 2, 8


def norm(size=DIM):
    made = torch.nn.RMSNorm(size, eps=1e-5).requires_grad_(False)
    torch.nn.init.normal_(made.weight)
    return made


@pytest.mark.parametrize(("size", "wanted"), [(1, True), (2, True), (3, False), (6, False), (64, True), (96, False)])
def test_heads_have_a_size_that_is_a_power_of_two(size, wanted):
    assert rope.can_fuse_rope(norm(size)) is wanted
    assert rope.can_fuse_rope(norm(64), norm(size)) is wanted and rope.can_fuse_rope(norm(size), norm(64)) is wanted


def test_norms_are_frozen_and_have_a_weight():
    assert rope.can_fuse_rope()
    assert not rope.can_fuse_rope(norm(), torch.nn.RMSNorm(DIM, elementwise_affine=False))
    assert not rope.can_fuse_rope(norm(), norm().requires_grad_(True))


def attention(q, k, v):
    """torch's own, which saves its inputs as views with other strides, and its output."""
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).exp()


@pytest.mark.parametrize("lengths", [(5, 4), (9,)])
def test_recomputed_queries_and_keys_give_the_same_bits(lengths, monkeypatch):
    torch.manual_seed(0)
    cos_sin = torch.randn(9, DIM), torch.randn(9, DIM)
    norms = [(norm(), norm()) for _ in lengths]
    inputs = [torch.randn(2, n, 3 * HEADS * DIM) for n in lengths]
    rotate, rotated = rope.rotate, []
    monkeypatch.setattr(rope, "rotate", lambda *args: rotated.append(1) or rotate(*args))
    found = []
    for recompute in (False, True):
        rotated.clear()
        leaves = [x.clone().requires_grad_() for x in inputs]
        sources = [(x, *pair) for x, pair in zip(leaves, norms, strict=True)]
        out = rope.rope_attention(sources, cos_sin, attention, recompute_rope=recompute)
        out.square().sum().backward()
        assert len(rotated) == (2 if recompute else 1)
        found.append([out.detach(), *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) and b.abs().max() > 0 for a, b in zip(*found, strict=True))
