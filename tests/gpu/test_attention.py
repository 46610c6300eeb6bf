"""Attention as jobs run it on this device: right at every length, and nothing beside its inputs is read."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from trainer.attention import mend

pytestmark = pytest.mark.gpu
HEADS, BESIDE = 3, 2**20
# Those of a text alone; Flux.1's at 320 x 192, 512 x 512 and 640 x 640; SD3's at 1024 x 1024. Kernels work on blocks of
# 64 or 128 tokens, and what is left over after them is where they were wrong before (pytorch/pytorch#196678).
TOKENS = [77, 752, 1536, 2112, 4429]


def placed(tokens, dim, generator):
    """(2, heads, tokens, dim) as blocks hand it over, between numbers that are none."""
    shape = (2, tokens, HEADS, dim)
    room = torch.full((2 * BESIDE + 2 * tokens * HEADS * dim,), float("nan"), device="cuda", dtype=torch.bfloat16)
    inside = room[BESIDE:-BESIDE].view(shape)
    inside.copy_(torch.randn(shape, device="cuda", generator=generator))
    return inside.transpose(1, 2)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_and_its_gradients_are_those_of_full_precision(tokens, dim):
    generator = torch.Generator("cuda").manual_seed(tokens)
    q, k, v, g = (placed(tokens, dim, generator) for _ in "qkvg")
    found, wanted = [], []
    for results, dtype, backends in (
        (found, torch.bfloat16, None),
        (wanted, torch.float32, [SDPBackend.MATH]),
    ):
        given = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        if backends is None:
            out = scaled_dot_product_attention(*given)
        else:
            with sdpa_kernel(backends):
                out = scaled_dot_product_attention(*given)
        results += [out, *torch.autograd.grad(out, given, g.to(dtype))]
    for a, b in zip(found, wanted, strict=True):
        assert a.isfinite().all() and (a.float() - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_may_be_laid_out_in_any_way(compiled):
    """As Flux.1's blocks lay it out: a part of longer rows, or rows of its own."""
    mend()
    tokens, dim = (1088, 64) if compiled else (1216, 64)  # of a size that nothing else has used

    def attended(q, k, v, beside):
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.cat([out, beside], 2) if beside is not None else out

    run = torch.compile(attended) if compiled else attended
    generator = torch.Generator("cuda").manual_seed(0)
    for more in (4 * HEADS * dim, 0, 3, 8):  # numbers beside it in each row
        q, k, v, g = (placed(tokens, dim, generator) for _ in "qkvg")
        g = g.transpose(1, 2).flatten(2)
        beside = torch.zeros(2, tokens, more, device="cuda", dtype=g.dtype) if more else None
        given = [t.detach().requires_grad_() for t in (q, k, v)]
        wide = g if beside is None else torch.cat([g, beside], 2)
        found = torch.autograd.grad(run(*given, beside), given, wide)
        exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
        with sdpa_kernel([SDPBackend.MATH]):
            wanted = torch.autograd.grad(attended(*exact, None), exact, g.float())
        for a, b in zip(found, wanted, strict=True):
            assert a.isfinite().all() and (a.float() - b).norm() < 2e-2 * b.norm()
