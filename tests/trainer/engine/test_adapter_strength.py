"""Adapters at other strengths, against weights into which the same LoRA was merged with that strength."""

import pytest
import torch

from tests.support import models
from trainer.engine import adapters
from trainer.engine.adapter_strength import at_strength
from trainer.engine.quantization.frozen_linear import freeze
from trainer.families import flux
from trainer.lora_files import peft_bridge
from trainer.sample import apply_loras

FUSED, TARGETS = flux.FACTS.fused_targets, flux.FACTS.targets
X, T = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([0.3, 0.8])


def trained(kind, *, fused=FUSED, frozen=""):
    """A Flux model of the real class with adapters that have learnt something."""
    denoiser = models.flux_denoiser()
    adapters.fuse_projections(flux.blocks(denoiser), fused=fused, targets=TARGETS)
    if frozen:
        for _, block in flux.blocks(denoiser):
            freeze(block, frozen)
    params = adapters.add_adapters(
        denoiser, flux.blocks(denoiser), targets=TARGETS, fused=fused, rank=3, alpha=2.0, seed=7, kind=kind
    )
    generator = torch.Generator().manual_seed(5)
    for p in params:
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return denoiser


def output(denoiser):
    with torch.no_grad():
        return flux.predict(denoiser, X, T, text=models.text(), guidance=1.0)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.75, 1.5])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_the_model_is_that_of_the_file_at_this_strength(kind, strength):
    denoiser = trained(kind)
    scale = 2 / 3**0.5 if kind == "rslora" else 2 / 3
    modules = peft_bridge.from_peft_state(adapters.state(denoiser), prefix="transformer", fused=FUSED, scale=scale)
    merged, base = models.flux_denoiser(), models.flux_denoiser()
    apply_loras(merged, [(modules, strength)], component="transformer")
    with at_strength([denoiser], strength):
        got = output(denoiser)
    torch.testing.assert_close(got, output(merged), rtol=1e-4, atol=1e-4)
    assert torch.allclose(got, output(base), rtol=1e-4, atol=1e-4) == (strength == 0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_no_bit_of_it_stays(kind):
    denoiser = trained(kind)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in adapters.state(denoiser).items()}
    with pytest.raises(RuntimeError, match="in the middle"), at_strength([denoiser], 0.25):
        assert not torch.equal(adapters.state(denoiser)[next(k for k in before if "lora_B" in k)], before[next(
            k for k in before if "lora_B" in k)][1])  # fmt: skip
        raise RuntimeError("in the middle")
    for name, tensor in adapters.state(denoiser).items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])


def test_strength_0_without_dora_is_the_base_to_the_bit():
    denoiser = trained("lora", fused={})
    with at_strength([denoiser], 0.0):
        assert torch.equal(output(denoiser), output(models.flux_denoiser()))


@pytest.mark.parametrize("frozen", ["int8-storage", "fp8-storage"])
def test_dora_on_weights_in_8_bits(frozen):
    """The strength is that of the whole change: halfway between the two models, layer by layer."""
    denoiser = trained("dora", frozen=frozen)
    layer = next(m for m in denoiser.modules() if hasattr(m, "lora_magnitude_vector") and m.lora_magnitude_vector)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole, base = layer(x), layer.get_base_layer()(x)
        with at_strength([denoiser], 0.5):
            half = layer(x)
    torch.testing.assert_close(half, (whole + base) / 2, rtol=1e-4, atol=1e-4)
