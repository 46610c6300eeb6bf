"""Adapters that are cast to 16 bits all at once train as those that are cast one by one."""

import pytest
import torch

from bench.step import Bench
from trainer.engine.cuda_graphs import EagerStep
from trainer.engine.quantization.cast_adapters import AdapterCast


@pytest.mark.parametrize("variant", ["none+eager", "all+eager", "none+eager+plain"])
@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_a_shared_cast_gives_gradients_with_the_same_bits(name, variant):
    bench = Bench(name, "fp8", small=True)
    engine = bench.engine(set(variant.split("+")))
    (adapter_cast,) = bench.runner.pass_context.args
    assert len(adapter_cast.layers) > 10
    for layer in adapter_cast.layers:
        layer.scaling["default"] = 0.5
    found = []
    for around in (AdapterCast(bench.model, bench.dtype), None):
        bench.runner = EagerStep(bench.params, bench.optimizer_params, *[around] if around else [])
        found.append([bench.backward(engine, 2), *(p.grad.clone() for p in bench.params)])
    assert sum(bool(g.any()) for g in found[0]) > 0.9 * len(bench.params)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(m.shared_cast is None for m in engine.denoiser.modules() if hasattr(m, "shared_cast"))


def test_adapters_with_different_scales_are_cast_one_by_one():
    bench = Bench("flux", "fp8", small=True)
    next(m for m in bench.model.modules() if hasattr(m, "cast_weights")).scaling["default"] = 3.0
    assert AdapterCast(bench.model, bench.dtype).layers == []
    assert AdapterCast(bench.model, torch.float32).layers == []
