"""Stable Diffusion 3 and 3.5 against diffusers' own pipeline and scheduler."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from trainer.engine import adapters
from trainer.families import sd3
from trainer.lora_files import convert, peft_bridge, write
from trainer.spec.plan import Prompt
from trainer.training.objective import FlowMatching, shifted

MINIATURE = Path(sd3.FACTS.models["mini-sd3"].source)


def scheduler():
    """As SD3 and SD3.5 ship it."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def pipeline(denoiser, vae):
    pipe = StableDiffusion3Pipeline(
        scheduler=scheduler(), vae=vae, transformer=denoiser, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_euler_steps_with_predict_are_those_of_the_pipeline(sd3_denoiser, sd3_vae, text):
    start_BCHW, nothing = torch.randn(2, 16, 6, 10), {k: torch.randn_like(v) for k, v in text.items()}
    pipe = pipeline(sd3_denoiser, sd3_vae)
    expected_BCHW = pipe(
        prompt_embeds=text["tokens"],
        pooled_prompt_embeds=text["pooled"],
        negative_prompt_embeds=nothing["tokens"],
        negative_pooled_prompt_embeds=nothing["pooled"],
        guidance_scale=4.0,
        num_inference_steps=5,
        height=48,
        width=80,
        latents=start_BCHW,
        output_type="latent",
    ).images

    x_BCHW = start_BCHW
    for now, after in zip(pipe.scheduler.sigmas[:-1], pipe.scheduler.sigmas[1:], strict=True):
        with torch.no_grad():
            plain, told = (sd3.predict(sd3_denoiser, x_BCHW, now.expand(2), text=words) for words in (nothing, text))
        x_BCHW = x_BCHW + (after - now) * (plain + 4.0 * (told - plain))
    torch.testing.assert_close(x_BCHW, expected_BCHW, rtol=1e-4, atol=1e-4)


def test_noisy_latents_and_the_shift_are_those_of_the_scheduler():
    latents, noise = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4)
    steps = scheduler().timesteps[[100, 500, 900]]
    drawn = FlowMatching().at(latents, steps / 1000, noise)
    torch.testing.assert_close(drawn.noisy_BCHW, scheduler().scale_noise(latents, steps, noise))
    assert sd3.FACTS.flow_shift == 3.0
    plain = torch.linspace(1, 1 / 1000, 1000, dtype=torch.float64)
    torch.testing.assert_close(shifted(plain, 3.0).float(), scheduler().sigmas[:1000], atol=1e-6, rtol=1e-6)


def test_latents_are_what_the_pipeline_decodes(sd3_vae):
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, std = sd3.encode_images(sd3_vae, pixels).chunk(2, dim=1)
    with torch.no_grad():
        spread = sd3_vae.encode(pixels).latent_dist
        # The two lines of StableDiffusion3Pipeline before it decodes.
        got = sd3_vae.decode(mean / sd3_vae.config.scaling_factor + sd3_vae.config.shift_factor).sample
        torch.testing.assert_close(got, sd3_vae.decode(spread.mean).sample, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, spread.std * 1.5305)
    torch.testing.assert_close(mean, (spread.mean - 0.0609) * 1.5305)


def test_a_wide_picture_is_not_a_turned_high_one(sd3_denoiser, text):
    x = torch.randn(1, 16, 4, 8)
    one = {k: v[:1] for k, v in text.items()}
    with torch.no_grad():
        wide = sd3.predict(sd3_denoiser, x, torch.tensor([0.5]), text=one)
        high = sd3.predict(sd3_denoiser, x.transpose(2, 3), torch.tensor([0.5]), text=one)
    assert wide.shape == (1, 16, 4, 8) and not torch.allclose(wide, high.transpose(2, 3), atol=1e-2)


# ---- texts and samples


@pytest.fixture
def without_t5(tmp_path):
    """The miniature as a folder that lacks the third encoder, as many have it."""
    folder = tmp_path / "model"
    shutil.copytree(MINIATURE, folder, ignore=shutil.ignore_patterns("text_encoder_3", "tokenizer_3"))
    return folder


def test_texts_are_those_of_the_whole_pipeline():
    encoders = sd3.load_encoders(MINIATURE, device="cpu", dtype=torch.float32)
    pipe = StableDiffusion3Pipeline.from_pretrained(MINIATURE, torch_dtype=torch.float32)
    words, length = ["a red spot", ""], pipe.tokenizer_3.model_max_length
    with torch.no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(words, words, words, max_sequence_length=length)
    got = sd3.encode_text(encoders, words)
    torch.testing.assert_close(torch.stack([t["tokens"] for t in got]), tokens)
    torch.testing.assert_close(torch.stack([t["pooled"] for t in got]), pooled)
    assert got[0]["tokens"].shape[0] == pipe.tokenizer.model_max_length + length


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


def test_samples_are_those_of_the_whole_pipeline():
    pipe = StableDiffusion3Pipeline.from_pretrained(MINIATURE, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        "a red spot",
        negative_prompt="blue",
        width=96,
        height=64,
        num_inference_steps=4,
        guidance_scale=4.0,
        max_sequence_length=pipe.tokenizer_3.model_max_length,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images[0]
    encoders = sd3.load_encoders(MINIATURE, device="cpu", dtype=torch.float32)
    texts = [{k: v[None] for k, v in t.items()} for t in sd3.encode_text(encoders, ["a red spot", "blue"])]
    with torch.no_grad():
        got = sd3.sample(
            sd3.load_denoiser(MINIATURE, device="cpu", dtype=torch.float32),
            sd3.load_vae(MINIATURE, device="cpu"),
            MINIATURE,
            prompt=Prompt("a red spot", 96, 64, seed=3, steps=4, guidance=1.0, cfg=4.0, negative="blue"),
            text=texts[0],
            negative=texts[1],
        )
    assert np.abs(np.asarray(got, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


# ---- adapters


def adapted(denoiser, rank=3, alpha=2.0):
    params = adapters.add_adapters(
        denoiser, sd3.blocks(denoiser), targets=sd3.FACTS.targets, fused={}, rank=rank, alpha=alpha, seed=7
    )
    torch.manual_seed(3)
    for p in params:
        torch.nn.init.normal_(p, std=0.3)
    return params


def velocity(denoiser, text):
    torch.manual_seed(4)
    x, t = torch.randn(2, 16, 4, 6), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        return sd3.predict(denoiser, x, t, text=text)


def test_the_file_gives_the_trained_model_in_diffusers(sd3_denoiser, sd3_vae, text, tmp_path):
    plain = copy.deepcopy(sd3_denoiser)
    adapted(sd3_denoiser)
    trained = velocity(sd3_denoiser, text)
    modules = peft_bridge.from_peft_state(
        adapters.state(sd3_denoiser), prefix=sd3.FACTS.lora_prefix, fused={}, scale=2.0 / 3
    )
    write.write_lora(tmp_path / "x.safetensors", convert.to_file(modules, "peft", "sd3").tensors, {})

    assert (velocity(plain, text) - trained).abs().max() > 0.1
    pipeline(plain, sd3_vae).load_lora_weights(tmp_path / "x.safetensors")
    torch.testing.assert_close(velocity(plain, text), trained, atol=1e-4, rtol=1e-4)


def test_every_linear_layer_but_those_of_the_norms_gets_an_adapter(sd3_denoiser):
    """Both attentions where there are two; the last block, whose text goes no further, without the text's output."""
    expected = {
        f"{outer}.{inner}"
        for outer, block in sd3.blocks(sd3_denoiser)
        for inner, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear) and not inner.startswith("norm")
    }
    adapted(sd3_denoiser)
    found = {key.rpartition(".lora_")[0] for key in adapters.state(sd3_denoiser)}
    assert found == expected
    assert "transformer_blocks.0.attn2.to_q" in found and "transformer_blocks.1.ff_context.net.2" in found
    assert not any(k.startswith(("transformer_blocks.2.ff_context", "transformer_blocks.2.attn.to_add")) for k in found)
