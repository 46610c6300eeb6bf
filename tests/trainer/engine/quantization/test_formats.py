"""The numbers that formats are chosen and scaled by, against tables; where a bias is added; which layers are frozen."""

import types

import pytest
import torch

from trainer.engine.quantization import formats
from trainer.engine.quantization.formats import STORAGE_ONLY, WEIGHT_FORMATS, weight_format_for
from trainer.engine.quantization.frozen_linear import FrozenLinear, dequantized_matmul, freeze


@pytest.mark.parametrize(
    ("in_features", "factor"), [(1, 16), (16, 64), (64, 128), (1280, 512), (3072, 1024), (12288, 2048)]
)
def test_the_backward_pass_shifts_a_by_the_power_of_two_nearest_to_16_roots_of_k(in_features, factor):
    assert formats.backward_up_factor(in_features) == factor


@pytest.mark.parametrize(
    ("outputs", "columns", "later"), [(2**17, 5248, False), (2**16, 5248, True), (2**16, 5120, False)]
)
def test_a_bias_that_cublas_has_no_kernel_for_is_added_after_the_product(outputs, columns, later, monkeypatch):
    given = {}

    def scaled_mm(x, w, *, bias, **_):
        given["bias"] = bias
        return torch.zeros(x.shape[0], w.shape[1], dtype=torch.bfloat16)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    rows = outputs // 256
    x, w = torch.empty(rows, columns, device="cpu", dtype=torch.uint8), torch.empty(256, columns, dtype=torch.uint8)
    bias = torch.ones(256, dtype=torch.bfloat16)
    y = formats.fp8_product(x, torch.ones(rows, 1), w, torch.ones(1, 256), bias, None, None, columns, 4.0)
    assert (given["bias"] is None) is later and bool((y == 1).all()) is later


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("rank", "padding", "multiplied", "is_added"),
    [(5, 16, 80, False), (6, 16, 64, True), (6, 32, 96, False), (None, 16, 64, False), (5, 0, 64, True)],
)
def test_an_adapter_is_in_the_product_where_there_is_room_and_added_elsewhere(
    rank, padding, multiplied, is_added, has_bias, monkeypatch
):
    """Of 64 features; 15 columns of rank 5 are padded to 16, 18 of rank 6 to 32."""
    widths = []

    def scaled_mm(x, w, **_):
        widths.append((x.shape[1], w.shape[0]))
        return torch.zeros(x.shape[0], w.shape[1], dtype=torch.bfloat16)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    x, w = torch.zeros(4, 64 + padding), torch.zeros(32, 64 + padding)
    x, w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    bias = torch.ones(32, dtype=torch.bfloat16) if has_bias else None
    h, up = (torch.ones(4, rank).bfloat16(), torch.ones(32, rank).bfloat16()) if rank else (None, None)
    y = formats.fp8_product(x, torch.ones(4, 1), w, torch.ones(1, 32), bias, h, up, 64, 1.0)
    assert widths == [(multiplied, multiplied)]
    assert bool((y == (rank or 0)).all()) if is_added else not y.any()
    assert w[:, 64:].float().any() == x[:, 64:].float().any() == (multiplied > 64)


@pytest.mark.parametrize(
    ("precision", "device", "hip", "arch", "wanted"),
    [
        ("bf16", "cuda", None, "", None),
        ("fp8", "cuda", None, "", "fp8"),
        ("fp8", "cpu", "6.2", "gfx942", "fp8"),
        ("fp8", "cuda", "6.2", "gfx942:sramecc+", "fp8-fnuz"),
        ("fp8", "cuda", "7.0", "gfx950", "fp8"),
        ("int8", "cuda", "6.2", "gfx942", "int8"),
        ("nf4", "cuda", "6.2", "gfx942", "nf4"),
    ],
)
def test_cdna_3_alone_gets_the_types_without_a_negative_zero(precision, device, hip, arch, wanted, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: [types.SimpleNamespace(gcnArchName=arch)][index]
    )
    assert weight_format_for(precision, device) == wanted


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_layers_of_other_sizes_and_modulations_do_not_multiply_in_8_bits(name):
    multiple = {"nf4": 64, "fp8-storage": 1, "fp8-fnuz-storage": 1, "int8-storage": 1}.get(name, 16)
    block = torch.nn.Module()
    block.fits = torch.nn.Linear(64, 128)
    block.narrow = torch.nn.Linear(64 - 1, 128)
    block.short = torch.nn.Linear(64, 128 - 1)
    block.norm = torch.nn.Module()
    block.norm.linear = torch.nn.Linear(64, 128)
    block.requires_grad_(False).bfloat16()
    freeze(block, name, rank=lambda layer: {"fits": 2}.get(layer, 0))
    assert block.fits.weight_format == name
    assert isinstance(block.narrow, FrozenLinear) is isinstance(block.short, FrozenLinear) is (multiple == 1)
    assert block.norm.linear.weight_format == STORAGE_ONLY.get(name, name)
    assert block.fits.rank == (2 if name in ("fp8", "fp8-fnuz") and 5 * 16 <= 64 else 0)


def test_torchao_gets_all_linear_layers_of_multiples_of_16_but_the_last_projections():
    block = torch.nn.ModuleDict(
        {
            "fits": torch.nn.Linear(32, 48),
            "narrow": torch.nn.Linear(40, 48),
            "short": torch.nn.Linear(32, 40),
            "proj_out": torch.nn.Linear(32, 48),
            "norm": torch.nn.LayerNorm(32),
            "inner": torch.nn.ModuleDict({"proj_out": torch.nn.Linear(16, 16), "proj": torch.nn.Linear(16, 16)}),
        }
    )
    freeze(block.requires_grad_(False).bfloat16(), "torchao")
    found = {name for name, module in block.named_modules() if type(module).__name__ == "Float8Linear"}
    assert found == {"fits", "inner.proj"}


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_products_inside_dequantized_matmul_are_those_of_the_dequantised_weight(name):
    torch.manual_seed(0)
    layer = FrozenLinear(torch.nn.Linear(128, 128).requires_grad_(False).bfloat16(), name)
    x = torch.randn(5, 128).bfloat16()
    plain, wanted = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
    with pytest.raises(KeyError), dequantized_matmul(layer):
        torch.testing.assert_close(layer(x), wanted, rtol=1e-2, atol=1e-2)
        assert layer.weight_format == STORAGE_ONLY.get(name, name)
        raise KeyError
    assert layer.weight_format == name and torch.equal(layer(x), plain)
