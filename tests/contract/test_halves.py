"""Adapters whose matrices are cast for all of them at once are trained as those that are cast one by one."""

import pytest
import torch

from bench.step import Bench
from trainer.engine.cuda_graphs import EagerStep
from trainer.engine.quantization.cast_adapters import AdapterCast


@pytest.mark.parametrize("way", ["none+eager", "all+eager", "none+eager+plain"])
@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_the_gradient_has_the_same_bits(name, way):
    bench = Bench(name, "fp8", small=True)
    engine = bench.engine(set(way.split("+")))
    (halves,) = bench.runner.pass_context.args
    assert len(halves.layers) > 10
    for layer in halves.layers:
        layer.scaling["default"] = 0.5
    found = []
    for around in (AdapterCast(bench.model, bench.dtype), None):
        bench.runner = EagerStep(bench.params, bench.optimizer_params, *[around] if around else [])
        found.append([bench.backward(engine, 2), *(p.grad.clone() for p in bench.params)])
    assert sum(bool(g.any()) for g in found[0]) > 0.9 * len(bench.params)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(layer.ready is None for layer in engine.denoiser.modules() if hasattr(layer, "ready"))


def test_adapters_that_do_not_count_alike_are_left_alone():
    bench = Bench("flux", "fp8", small=True)
    next(m for m in bench.model.modules() if hasattr(m, "halves")).scaling["default"] = 3.0
    assert AdapterCast(bench.model, bench.dtype).layers == []
    assert AdapterCast(bench.model, torch.float32).layers == []
