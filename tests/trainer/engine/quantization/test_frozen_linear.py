"""Frozen layers in 8 and 4 bits with adapters, against float64 and against the same model in full precision."""

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trainer.engine import adapters
from trainer.engine.kernels.reference import max_value, quantize_rows
from trainer.engine.load import place_denoiser
from trainer.engine.memory import checkpointing
from trainer.engine.quantization.formats import WEIGHT_FORMATS
from trainer.engine.quantization.frozen_linear import FrozenLinear
from trainer.spec.family import get_family
from trainer.training.step_guard import LOSS_SCALE

# The relative error that one rounding to the format allows: half a step of 3 bits of mantissa, or of 127 steps.
ALLOWED = {
    "fp8": 0.05,
    "fp8-fnuz": 0.05,
    "fp8-storage": 0.04,
    "fp8-fnuz-storage": 0.04,
    "int8": 0.02,
    "int8-storage": 0.015,
    "nf4": 0.11,
}
MINIATURE = Path(get_family("flux").FACTS.models["mini-flux"].source)
TYPES = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8]


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def layer(n=128, k=64, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(k, n).to(torch.bfloat16).requires_grad_(False)


@pytest.mark.parametrize("dtype", TYPES)
def test_quantised_rows_are_within_half_a_step(dtype):
    torch.manual_seed(0)
    x = torch.randn(50, 64) * torch.logspace(-6, 6, 50)[:, None]
    values, scale = quantize_rows(x, None, dtype)
    assert values.dtype == dtype and scale.shape == (50, 1) and values.float().abs().max() <= max_value(dtype)
    step = 2**-4 if dtype.is_floating_point else 0.5 / 127
    against = x.abs() if dtype.is_floating_point else x.abs().amax(1, keepdim=True)
    # Near zero, FP8 is subnormal: it has equal steps too.
    smallest = x.abs().amax(1, keepdim=True) * 2**-6 / max_value(dtype)
    assert ((values.float() * scale - x).abs() <= torch.maximum(against * step, smallest) * 1.001).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_zeros_outliers_and_infinities_quantise_without_nan(dtype):
    x = torch.randn(5, 64)
    x[0], x[1, 3], x[2, 5], x[3, 7] = 0, 1e30, float("inf"), 1e-30
    values, scale = quantize_rows(x, None, dtype)
    back = values.float() * scale
    assert back.isfinite().all() and scale.isfinite().all() and (back[0] == 0).all()
    assert back[2, 5] > 1e38 and back[1, 3] == pytest.approx(1e30, rel=0.07)


def test_a_nan_is_not_hidden():
    x = torch.randn(2, 64)
    x[1, 3] = float("nan")
    values, scale = quantize_rows(x, None, torch.float8_e4m3fn)
    assert (values.float() * scale)[1].isnan().any() and (values.float() * scale)[0].isfinite().all()


def test_fnuz_values_end_at_a_quarter_of_240_and_have_no_negative_zero():
    values, _ = quantize_rows(torch.tensor([[-1e-9, 1.0, -1.0, 0.0]]), None, torch.float8_e4m3fnuz)
    assert values.float().abs().max() == 60
    assert not (values.view(torch.uint8) == 0x80).any()  # which would be NaN there


@pytest.mark.parametrize("has_adapter", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_products_and_gradients_are_those_of_float64(weight_format, has_bias, has_adapter):
    torch.manual_seed(1)
    linear = layer()
    if not has_bias:
        linear.bias = None
    frozen = FrozenLinear(linear, weight_format)
    x = torch.randn(2, 32, 64).bfloat16().requires_grad_()
    adapter = []
    if has_adapter:
        adapter = [torch.randn(4, 64).bfloat16().requires_grad_(), torch.randn(128, 4).bfloat16().requires_grad_()]
    g = torch.randn(2, 32, 128).bfloat16()
    y = frozen.linear(x, *(adapter or (None, None)))
    y.backward(g)
    found = [y.detach(), x.grad, *(matrix.grad for matrix in adapter)]

    wide = [t.detach().double().requires_grad_() for t in (x, *adapter)]
    wanted = wide[0] @ linear.weight.double().t()
    if has_bias:
        wanted = wanted + linear.bias.double()
    if has_adapter:
        wanted = wanted + (wide[0] @ wide[1].t()) @ wide[2].t()
    wanted.backward(g.double())
    names = ["y", "x", "down", "up"][: 2 + len(adapter)]
    for which, a, b in zip(names, found, [wanted.detach(), *(t.grad for t in wide)], strict=True):
        assert error(a, b) < (ALLOWED[weight_format] if which in "yx" else 0.01), which


@pytest.mark.parametrize("weight_format", WEIGHT_FORMATS)
def test_only_the_quantised_weight_is_stored(weight_format):
    linear = layer(n=256, k=512)
    held = sum(t.numel() * t.element_size() for t in (*FrozenLinear(linear, weight_format).state_dict().values(),))
    assert held <= 256 * 512 + 256 * 4 + 256 * 2 + 16
    assert error(FrozenLinear(linear, weight_format).weight, linear.weight) < ALLOWED[weight_format]


AGREE = [
    ("bf16", "bfloat16", 0.94, 0.995),
    ("fp16", "float16", 0.99, 0.999),
    ("fp8", "bfloat16", 0.94, 0.995),
    ("fp8-storage", "bfloat16", 0.94, 0.99),
    ("fp8-storage", "float16", 0.94, 0.995),
    ("int8", "bfloat16", 0.94, 0.995),
    ("int8", "float16", 0.94, 0.995),
    ("nf4", "bfloat16", 0.4, 0.85),
    ("torchao", "bfloat16", 0.85, 0.99),
]


@pytest.mark.parametrize(("precision", "dtype", "least", "median"), AGREE)
def test_gradients_of_a_miniature_point_where_those_of_full_precision_do(precision, dtype, least, median):
    family = get_family("flux")

    def gradients(precision, dtype):
        torch.manual_seed(0)
        model = family.load_denoiser(MINIATURE, device="cpu", dtype=torch.float32)
        options = {"fused": family.FACTS.fused_targets, "targets": family.FACTS.targets}
        place_denoiser(model, family.blocks(model), precision=precision, dtype=dtype, device="cpu", **options)
        adapters.add_adapters(model, family.blocks(model), **options, rank=4, alpha=4, seed=0)
        torch.manual_seed(2)
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.05)
        torch.manual_seed(3)
        config = model.config
        text = {
            "tokens": torch.randn(1, 16, config.joint_attention_dim).to(dtype),
            "pooled": torch.randn(1, config.pooled_projection_dim).to(dtype),
        }
        noisy = torch.randn(1, config.in_channels // 4, 16, 16)
        out = family.predict(model, noisy, torch.tensor([0.6]), text=text, guidance=1.0, geometry_B6=None)
        scale = LOSS_SCALE.get(str(dtype).removeprefix("torch."), 1)
        (out.float().square().mean() * scale).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    wanted, found = gradients("fp32", torch.float32), gradients(precision, getattr(torch, dtype))
    assert found.keys() == wanted.keys()
    cosines = [torch.cosine_similarity(found[n].flatten(), wanted[n].flatten(), dim=0).item() for n in wanted]
    assert min(cosines) > least and sorted(cosines)[len(cosines) // 2] > median


@pytest.mark.parametrize("policy", checkpointing.POLICIES)
@pytest.mark.parametrize("weight_format", [None, "fp8"])
def test_recomputing_changes_no_bit(policy, weight_format):
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = layer(64, 64, 1) if weight_format is None else FrozenLinear(layer(64, 64, 1), weight_format)

        def forward(self, x):
            q = self.q(x).unflatten(-1, (4, 16)).transpose(1, 2)
            return x + torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    def run(policies):
        blocks = [copy.deepcopy(block) for block in originals]
        checkpointing.apply(blocks, policies, compiled=False)
        torch.manual_seed(5)
        x = first = torch.randn(2, 32, 64).bfloat16().requires_grad_()
        for block in blocks:
            x = block(x)
        x.float().square().sum().backward()
        return x.detach(), first.grad

    originals = [Block() for _ in range(3)]
    plain, changed = run(["none"] * 3), run([policy, "none", policy])
    assert all(torch.equal(a, b) for a, b in zip(plain, changed, strict=True))


def test_a_checkpointed_frozen_layer_compiles():
    frozen = FrozenLinear(layer(), "fp8")
    x = torch.randn(32, 64).bfloat16().requires_grad_()

    def block(x):
        return torch.nn.functional.gelu(frozen(x))

    block(x).sum().backward()
    wanted, x.grad = x.grad, None
    torch.compile(lambda x: checkpoint(block, x, use_reentrant=False))(x).sum().backward()
    assert error(x.grad, wanted) < 0.02  # the compiler rounds in fewer places
