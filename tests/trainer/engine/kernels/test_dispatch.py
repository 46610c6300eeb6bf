"""On a CPU the references run, whether Triton is installed or not, also in compiled code."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.engine.kernels import dispatch, reference
from trainer.engine.quantization.frozen_linear import FrozenLinear


@pytest.mark.parametrize("weight_format", ["fp8", "fp8-fnuz-storage", "int8", "int8-storage"])
def test_a_compiled_layer_needs_no_triton_on_a_cpu(weight_format):
    torch.manual_seed(0)
    layer = FrozenLinear(torch.nn.Linear(64, 128).bfloat16().requires_grad_(False), weight_format)
    compiled = torch.compile(layer, backend="aot_eager")
    results = []
    for forward in (layer, compiled):
        x = torch.linspace(-1, 1, 32 * 64).view(32, 64).bfloat16().requires_grad_()
        y = forward(x)
        y.float().sum().backward()
        results.append((y, x.grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("given", [(None, torch.ones(2, 8)), (torch.zeros(2, 4), torch.ones(2, 8))])
def test_the_first_tensor_tells_the_device(given):
    found = dispatch.gelu_rows(*given, False, torch.float8_e4m3fn, True)
    wanted = reference.gelu_rows(*given, False, torch.float8_e4m3fn, True)
    assert torch.equal(found[2], wanted[2])


@pytest.mark.parametrize("skips", [0, 1])
def test_the_compiler_gets_the_operator(skips):
    """Its tensors have sizes and no data. In what `allow_in_graph` marks, only they tell that it is at work."""
    pytest.importorskip("triton", reason="without it there is no other kernel to choose")
    with FakeTensorMode():
        rows = torch.empty(2, 64, device="cuda", dtype=torch.bfloat16)
        given = (None, rows) if skips else (rows, rows)
        values, scales, _ = dispatch.gelu_rows(*given, False, torch.float8_e4m3fn, True)
    assert values.shape == (2, 64 if skips else 128) and scales.shape == (2, 1)
    assert values.device.type == "cuda"


def test_weights_that_only_store_8_bits_have_the_types_of_their_hardware(monkeypatch):
    """CDNA 3 has no FP8 but that without a negative zero; CDNA 4 has NVIDIA's."""
    from trainer.engine.quantization import formats

    monkeypatch.setattr(torch.version, "hip", "7.2")
    for name, dtype in (("gfx942", torch.float8_e4m3fnuz), ("gfx950", torch.float8_e4m3fn)):
        properties = type("Properties", (), {"gcnArchName": f"{name}:sramecc+"})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        for precision in ("fp8", "fp8-storage"):
            chosen = formats.weight_format_for(precision, "cuda")
            stored = formats.STORAGE_ONLY.get(chosen, chosen)
            assert formats.WEIGHT_FORMATS[chosen].dtype == formats.WEIGHT_FORMATS[stored].dtype == dtype
