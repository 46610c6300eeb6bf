"""Stable Diffusion 3 and 3.5: the scheduler, texts without T5, and which layers are adapted. More: test_families.py."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from trainer.engine import adapters
from trainer.families import sd3
from trainer.training.objective import FlowMatching, shifted

MINIATURE = Path(sd3.FACTS.models["mini-sd3"].source)


def scheduler():
    """As SD3 and SD3.5 ship it."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def test_noisy_latents_and_the_shift_are_those_of_the_scheduler():
    latents, noise = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4)
    steps = scheduler().timesteps[[100, 500, 900]]
    drawn = FlowMatching().at(latents, steps / 1000, noise)
    torch.testing.assert_close(drawn.noisy_BCHW, scheduler().scale_noise(latents, steps, noise))
    assert sd3.FACTS.flow_shift == 3.0
    plain = torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64)
    torch.testing.assert_close(shifted(plain, 3.0).float(), scheduler().sigmas[:1000], atol=1e-6, rtol=1e-6)


# ---- texts


@pytest.fixture
def without_t5(tmp_path):
    """The miniature as a folder that lacks the third encoder, as many have it."""
    folder = tmp_path / "model"
    shutil.copytree(MINIATURE, folder, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    return folder


def test_without_t5_there_are_zeros_as_in_the_pipeline(without_t5):
    encoders = sd3.load_encoders(without_t5, device="cpu", dtype=torch.float32)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        MINIATURE, text_encoder_3=None, tokenizer_3=None, torch_dtype=torch.float32
    )
    with torch.no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt("a red spot", "a red spot", "a red spot")
    got = sd3.encode_text(encoders, ["a red spot"])[0]
    torch.testing.assert_close(got["tokens"], tokens[0])
    torch.testing.assert_close(got["pooled"], pooled[0])
    assert got["tokens"][-sd3.T5_TOKENS :].abs().max() == 0


# ---- adapters


def test_every_linear_layer_but_those_of_the_norms_gets_an_adapter(sd3_denoiser):
    """Both attentions where there are two; the last block, whose text goes no further, without the text's output."""
    expected = {
        f"{outer}.{inner}"
        for outer, block in sd3.blocks(sd3_denoiser)
        for inner, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear) and not inner.startswith("norm")
    }
    options = {"targets": sd3.FACTS.targets, "fused": {}, "rank": 3, "alpha": 2.0, "seed": 7}
    adapters.add_adapters(sd3_denoiser, sd3.blocks(sd3_denoiser), **options)
    found = {key.rpartition(".lora_")[0] for key in adapters.state(sd3_denoiser)}
    assert found == expected
    assert "transformer_blocks.0.attn2.to_q" in found and "transformer_blocks.1.ff_context.net.2" in found
    assert not any(k.startswith(("transformer_blocks.2.ff_context", "transformer_blocks.2.attn.to_add")) for k in found)
