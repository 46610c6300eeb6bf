"""Adapter columns: LoRA terms that are computed in the FP8 product of the frozen weight."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.engine import execution
from trainer.engine.execution import Engine
from trainer.engine.kernels.reference import append_adapter_columns, pad_columns, quantize_rows, quantize_weight
from trainer.engine.quantization.formats import FORWARD_UP_FACTOR
from trainer.engine.quantization.frozen_linear import FrozenLinear
from trainer.spec.adapter_columns import adapter_columns
from trainer.spec.plan import EnginePlan

TYPES = [torch.float8_e4m3fn, torch.float8_e4m3fnuz]
M, N, K = 24, 240, 256


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(1e-30)).item()


def operands(rank, *, of_b=0.02, of_a=1.0, seed=0):
    """Activations, a weight, an A as peft initialises it, times `of_a`, and a B as large as training makes it."""
    torch.manual_seed(seed)
    x, w = torch.randn(M, K) * torch.logspace(-2, 2, M)[:, None], torch.randn(N, K) * 0.05
    down = (torch.rand(rank, K) * 2 - 1) * of_a / math.sqrt(K)
    return x.bfloat16(), w, down.bfloat16(), (torch.randn(N, rank) * of_b).bfloat16()


def of_adapter(x, w, down, up, dtype):
    """What adapter columns add to the product, in float64; and what they should add."""
    padding = adapter_columns(len(down))
    x8, x_scale = quantize_rows(x, None, dtype, padding)
    w8, w_scale = quantize_weight(w, dtype)
    w8 = pad_columns(w8, padding)
    h = x @ down.t()
    append_adapter_columns(x8, x_scale, h, w8, w_scale, up, K, FORWARD_UP_FACTOR)
    part = x8[:, K:].double() @ w8[:, K:].double().t() * x_scale.double() * w_scale.double()
    return part, h.double() @ up.double().t()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rank", [1, 4, 5, 16])
def test_adapter_columns_are_as_precise_as_bf16(rank, dtype):
    found, wanted = of_adapter(*operands(rank), dtype)
    assert error(found, wanted) < 4e-3  # 8 bits of mantissa, twice


@given(
    of_b=st.floats(1e-5, 0.5), of_a=st.floats(0.1, 10), rank=st.integers(1, 24), seed=st.integers(0, 99),
    dtype=st.sampled_from(TYPES),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_at_any_size_of_a_and_b_the_columns_are_exact_or_too_small_to_count(of_b, of_a, rank, seed, dtype):
    x, w, down, up = operands(rank, of_b=of_b, of_a=of_a, seed=seed)
    found, wanted = of_adapter(x, w, down, up, dtype)
    base = x.double() @ w.double().t()
    of_rounding = 0.03  # relative error of the frozen weight's product in FP8
    off = (found - wanted).norm(dim=1)
    assert (off < 0.01 * wanted.norm(dim=1) + 0.02 * of_rounding * base.norm(dim=1)).all()


def test_values_that_are_too_large_saturate_and_nan_stays():
    x, w, down, up = operands(4)
    found, _ = of_adapter(x, w, down, up * 1e6, TYPES[0])
    assert found.isfinite().all()
    up[3, 1] = math.nan
    found, _ = of_adapter(x, w, down, up, TYPES[0])
    assert found[:, 3].isnan().all() and found[:, :3].isfinite().all()


@pytest.mark.parametrize("largest", [0.0, 1e-6, 1e-3, 0.1])
def test_a_weight_of_nearly_zeros_has_its_adapter_added_after_the_product(largest):
    x, w, down, up = operands(4, of_b=0.05)  # up to some 0.2
    linear = torch.nn.Linear(K, N, bias=False).requires_grad_(False)
    linear.weight.data.copy_(w * largest / w.abs().max())
    frozen = FrozenLinear(linear.bfloat16(), "fp8", 4)
    assert bool(frozen.rank) == (largest >= 1e-3)
    found = frozen.linear(x, down, up).double()
    wanted = x.double() @ frozen.weight.double().t() + (x @ down.t()).double() @ up.double().t()
    assert error(found, wanted) < 0.03
    rank = FrozenLinear(torch.nn.Linear(12288, 256).bfloat16().requires_grad_(False), "fp8", 16).rank
    assert rank == 16  # new layers, whose weights are drawn between ±0.009, get columns


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 1e-4])
def test_small_rows_of_a_weight_are_nearly_as_precise_as_large_ones(ratio):
    w = torch.randn(32, 256)
    w[1:] *= ratio
    (values, scale) = quantize_weight(w, TYPES[0])
    assert error((values.float() * scale.t())[1:], w[1:]) < 0.05


@pytest.mark.parametrize("rank", [4, 16, 64])  # the last one has no columns: its term is added after the product
@pytest.mark.parametrize("transposed", [False, True])
def test_products_and_gradients_are_those_of_a_layer_without_adapter_columns(rank, transposed):
    """They differ by the adapter's rounding only; the frozen weight's part has the same bits."""
    x, w, down, up = operands(rank)
    linear = torch.nn.Linear(K, N)
    linear.weight.data.copy_(w)
    linear = linear.bfloat16().requires_grad_(False)
    found = []
    for columns_rank in (0, rank):
        frozen = FrozenLinear(linear, "fp8", columns_rank)
        assert frozen.weight_NF.shape[1] == (384 if columns_rank and rank < 64 else K)
        frozen.keep_transposed(transposed)
        leaves = [t.clone().requires_grad_() for t in (x, down, up)]
        y = frozen.linear(*leaves)
        torch.manual_seed(5)
        y.backward(torch.randn(M, N).bfloat16())
        found.append([y.detach(), *(t.grad for t in leaves)])
    frozen.drop_adapter_columns()
    assert frozen.weight_NF.shape[1] == K and torch.equal(frozen.linear(x, down, up), found[0][0])
    added_afterwards, in_columns = found
    assert all(error(a, b) < 4e-3 for a, b in zip(in_columns, added_afterwards, strict=True))


def test_an_engine_drops_transposed_copies_first_and_then_adapter_columns(monkeypatch):
    """After the columns, the activation offload looks up anew which tensors are weights, since they have moved."""

    class Told:
        known = 0

        def __init__(self, *_, **__):
            pass

        def find_weights(self):
            self.known += 1

    monkeypatch.setattr(execution, "ActivationOffload", Told)
    linear = torch.nn.Linear(K, N).bfloat16().requires_grad_(False)
    model = torch.nn.Sequential(FrozenLinear(linear, "fp8", 4))
    made = Engine(model, [model], EnginePlan(recompute="all", offload="activations", turned_weights=True))
    layer = model[0]
    assert layer.weight_t_KN is not None and layer.rank == 4 and made.next_offloads_more
    assert made.drop_adapter_columns() and layer.weight_t_KN is None and layer.rank == 4 and made.offload.known == 0
    assert made.drop_adapter_columns() and layer.rank == 0 and made.offload.known == 1
    assert not made.drop_adapter_columns()
