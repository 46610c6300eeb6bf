"""What every family keeps to, against diffusers' own pipeline of it. A new family adds a row to CASES.

Shapes: B images, C channels, H and W of latents, a sixth of SDXL's sizes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImagePipeline,
)

from tests.support import models
from tests.support.miniatures import PIPELINES, encoded, family_of, folder, pipeline
from trainer.data.batches import stack_texts
from trainer.engine import adapters
from trainer.lora_files import convert, peft_bridge, write
from trainer.spec.family import family_names
from trainer.spec.plan import Prompt

RANK, ALPHA, STEPS = 3, 2.0, 5


@dataclass(frozen=True)
class Case:
    """What differs between families, and between base models of one."""

    channels: int
    size: tuple[int, int]  # of latents, height and width
    scale: float = 1.0  # latents are (the VAE's - shift) * scale
    shift: float = 0.0
    cfg: float = 1.0  # how far the pipeline goes from the negative caption; 1: it computes none
    guidance: float = 1.0  # embedded
    denoiser: str = "transformer"  # the pipeline's name for it
    encoders: int = 2  # of text
    more: dict[str, Any] = field(default_factory=dict)  # that the pipeline is made with


CASES = {
    "flux": Case(16, (6, 10), 0.3611, 0.1159, guidance=2.5),
    "flux2": Case(16, (6, 10), cfg=4.0, encoders=1),
    "flux2_dev": Case(16, (6, 10), guidance=2.5, encoders=1),
    "sd3": Case(16, (6, 10), 1.5305, 0.0609, cfg=4.0, encoders=3),
    "sdxl": Case(4, (8, 12), 0.13025, 0.0, cfg=5.0, denoiser="unet", more={"add_watermarker": False}),
    "z_image": Case(16, (6, 10), 0.3611, 0.1159, cfg=4.0, encoders=1),
    "qwen_image": Case(16, (6, 10), cfg=4.0, encoders=1),
    "krea2": Case(16, (6, 10), cfg=4.0, encoders=1),
}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # as SDXL ships
every_family = pytest.mark.parametrize("name", CASES)
# q, k and v of a family with fused projections have an adapter each, or one together.
each_split = pytest.mark.parametrize(
    ("name", "split"), [(n, s) for n in CASES for s in (True, False) if s or family_of(n).FACTS.fused_targets]
)


@pytest.fixture
def text(name):
    """Embeddings of two captions, as a micro-batch has them."""
    return getattr(models, f"{name}_text", models.text)()


def test_every_family_has_a_case():
    assert {family_of(name).FACTS.name for name in CASES} == set(family_names())


def small(name, part):
    """`part`: "denoiser" or "vae"."""
    return getattr(models, f"{name}_{part}")()


def scheduler_of(name, prediction="epsilon"):
    """As the published model ships it."""
    if name in ("flux", "flux2", "flux2_dev"):
        return models.flux_scheduler()
    if name == "sd3":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name == "qwen_image":
        return models.qwen_image_scheduler()
    if name == "krea2":
        return models.krea2_scheduler()
    if name == "z_image":
        return FlowMatchEulerDiscreteScheduler(shift=6.0)
    return EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading", prediction_type=prediction)


def pipeline_of(name, denoiser, scheduler=None):
    """diffusers' pipeline of the small models, without text encoders."""
    case = CASES[name]
    suffixes = ["", *(f"_{i}" for i in range(2, case.encoders + 1))]
    without = {f"{part}{suffix}": None for part in ("text_encoder", "tokenizer") for suffix in suffixes}
    parts = {"vae": small(name, "vae"), case.denoiser: denoiser, "scheduler": scheduler or scheduler_of(name)}
    pipe = PIPELINES[name](**without, **parts, **case.more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def predicted(name, denoiser, noisy_BCHW, t_B, text):
    case, (height, width) = CASES[name], (8 * side for side in noisy_BCHW.shape[2:])
    sizes_B6 = torch.tensor([[height, width, 0, 0, height, width]] * len(noisy_BCHW), dtype=torch.float32)
    with torch.no_grad():
        return family_of(name).predict(
            denoiser, noisy_BCHW, t_B, text=text, guidance=case.guidance, geometry_B6=sizes_B6
        )


def output(name, denoiser, text):
    """The denoiser's output for something made up, the same each time."""
    torch.manual_seed(4)
    x_BCHW = torch.randn(2, CASES[name].channels, *CASES[name].size)
    return predicted(name, denoiser, x_BCHW, torch.tensor([0.3, 0.8]), text)


# ---- samples


def flow_euler(scheduler, x_BCHW, guided):
    for now, after in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        x_BCHW = x_BCHW + (after - now) * guided(x_BCHW, now.expand(2))
    return x_BCHW


def denoising_euler(scheduler, x_BCHW, guided):
    x_BCHW = x_BCHW * scheduler.init_noise_sigma
    for time, now, after in zip(scheduler.timesteps, scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        noisy_BCHW = x_BCHW / (now**2 + 1).sqrt()
        noise_BCHW = guided(noisy_BCHW, (time / 1000).expand(2))
        if scheduler.config.prediction_type == "v_prediction":  # the noise that this velocity means
            noise_BCHW = noise_BCHW / (now**2 + 1).sqrt() + noisy_BCHW * now / (now**2 + 1).sqrt()
        x_BCHW = x_BCHW + (after - now) * noise_BCHW
    return x_BCHW


def packed(name, latents_BCHW):
    """Latents as the pipeline takes them."""
    if name == "flux":
        return FluxPipeline._pack_latents(latents_BCHW, *latents_BCHW.shape)
    if name == "qwen_image":
        return QwenImagePipeline._pack_latents(latents_BCHW, *latents_BCHW.shape)
    if name in ("flux2", "flux2_dev"):
        return Flux2KleinPipeline._patchify_latents(latents_BCHW)
    if name == "krea2":
        return pipeline_of(name, None)._pack_latents(latents_BCHW, *latents_BCHW.shape)
    return latents_BCHW


def returned(name, latents_BCHW):
    """Latents as the pipeline returns them: FLUX.2 klein's as its VAE decodes them, dev's as the denoiser has them."""
    if name == "flux2_dev":
        return Flux2KleinPipeline._pack_latents(packed(name, latents_BCHW))
    if name != "flux2":
        return packed(name, latents_BCHW)
    statistics = models.flux2_vae().bn
    deviation = (statistics.running_var + statistics.eps).sqrt()
    patches_BCHW = packed(name, latents_BCHW) * deviation[:, None, None] + statistics.running_mean[:, None, None]
    return Flux2KleinPipeline._unpatchify_latents(patches_BCHW)


def guided_by(name, told_BCHW, plain_BCHW):
    """What the pipeline makes of the predictions with the caption and with the negative one."""
    found_BCHW = plain_BCHW + CASES[name].cfg * (told_BCHW - plain_BCHW)
    if name != "qwen_image":
        return found_BCHW
    # Each token gets the length that it has with the caption alone. A token is a patch of 2 x 2.
    length_B1HW = [
        torch.nn.functional.lp_pool2d(each.square().sum(dim=1, keepdim=True), 1, 2).sqrt()
        for each in (told_BCHW, found_BCHW)
    ]
    return found_BCHW * (length_B1HW[0] / length_B1HW[1]).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def prompt_arguments(name, text, nothing):
    """What the pipeline is called with: embeddings, negative ones, and how far to go from these."""
    case = CASES[name]
    if name == "z_image":  # lists of captions without their padding; the scale counts from 0
        real = text["real"]
        positive, negative = ([t["tokens"][i, real[i]] for i in range(len(real))] for t in (text, nothing))
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative, "guidance_scale": case.cfg - 1}
    if name == "flux2_dev":
        return {"prompt_embeds": text["tokens"], "guidance_scale": case.guidance}
    if name == "flux2":
        negative = {"negative_prompt_embeds": nothing["tokens"]}
        return {"prompt_embeds": text["tokens"], **negative, "guidance_scale": case.cfg}
    if name in ("qwen_image", "krea2"):
        masks = [~t["padding"] for t in (text, nothing)]
        scale = {"true_cfg_scale": case.cfg} if name == "qwen_image" else {"guidance_scale": case.cfg - 1}
        found = {"prompt_embeds": text["tokens"], "prompt_embeds_mask": masks[0], **scale}
        return {**found, "negative_prompt_embeds": nothing["tokens"], "negative_prompt_embeds_mask": masks[1]}
    found = {"prompt_embeds": text["tokens"], "pooled_prompt_embeds": text["pooled"]}
    if name == "flux":
        return {**found, "guidance_scale": case.guidance}
    negative = {"negative_prompt_embeds": nothing["tokens"], "negative_pooled_prompt_embeds": nothing["pooled"]}
    return {**found, **negative, "guidance_scale": case.cfg}


@pytest.mark.parametrize(
    ("name", "prediction"),
    [
        *(
            ("flux", None),
            ("flux2", None),
            ("flux2_dev", None),
            ("sd3", None),
            ("sdxl", "epsilon"),
            ("sdxl", "v_prediction"),
        ),
        *(("z_image", None), ("qwen_image", None), ("krea2", None)),
    ],
)
def test_euler_steps_with_predict_are_those_of_the_pipeline(name, prediction, text):
    case, denoiser = CASES[name], small(name, "denoiser")
    (height, width) = case.size
    nothing = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in text.items()}
    start_BCHW = torch.randn(2, case.channels, height, width)
    scheduler = scheduler_of(name, prediction)
    expected = pipeline_of(name, denoiser, scheduler)(
        num_inference_steps=STEPS,
        height=8 * height,
        width=8 * width,
        latents=packed(name, start_BCHW),
        output_type="latent",
        **prompt_arguments(name, text, nothing),
    ).images

    def guided(noisy_BCHW, t_B):
        told = predicted(name, denoiser, noisy_BCHW, t_B, text)
        if case.cfg == 1.0:
            return told
        return guided_by(name, told, predicted(name, denoiser, noisy_BCHW, t_B, nothing))

    euler = denoising_euler if prediction else flow_euler
    got = returned(name, euler(scheduler, start_BCHW, guided))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "negative"),
    [
        *(
            ("flux", ""),
            ("flux2", ""),
            ("flux2_dev", ""),
            ("sd3", "blue"),
            ("sdxl", ""),
            ("sdxl", "a blue ring"),
            ("z_image", "blue"),
        ),
        *(("qwen_image", ""), ("qwen_image", "a blue ring"), ("krea2", ""), ("krea2", "a blue ring")),
    ],
)
def test_samples_are_those_of_the_whole_pipeline(name, negative, capfd):
    kind, pipe, plain = family_of(name), pipeline(name), CASES[name].cfg == 1.0
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 2.5 if plain else 4.0}
    if name == "qwen_image":
        options = {"true_cfg_scale": 4.0, "negative_prompt": negative}
    elif not plain and name != "flux2":  # whose pipeline knows the empty one alone
        options["negative_prompt"] = negative or None
    if name in ("flux", "flux2", "flux2_dev", "sd3"):
        last = [part for part in pipe.components if part.startswith("tokenizer")][-1]
        options["max_sequence_length"] = getattr(pipe, last).model_max_length
    expected = pipe(
        prompt="a red spot",
        width=96,
        height=64,
        num_inference_steps=4,
        generator=torch.Generator("cpu").manual_seed(3),
        **options,
    ).images[0]
    encoders = kind.load_encoders(folder(name), device="cpu", dtype=torch.float32)
    texts = [{k: v[None] for k, v in t.items()} for t in kind.encode_text(encoders, ["a red spot", negative])]
    guidance, cfg = (2.5, 1.0) if plain else (1.0, 4.0 + (name in ("z_image", "krea2")))
    denoiser = kind.load_denoiser(folder(name), device="cpu", dtype=torch.float32)
    vae = kind.load_vae(folder(name), device="cpu")
    capfd.readouterr()
    with torch.no_grad():
        got = kind.sample(
            denoiser,
            vae,
            folder(name),
            prompt=Prompt("a red spot", 96, 64, seed=3, steps=4, guidance=guidance, cfg=cfg, negative=negative),
            text=texts[0],
            negative=texts[1],
        )
    assert np.abs(np.asarray(got, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
    assert "it/s" not in "".join(capfd.readouterr()), "no progress bar among the lines of the log"


# ---- images and texts


@every_family
def test_latents_are_what_the_pipeline_decodes(name):
    case, vae = CASES[name], small(name, "vae")
    pixels_BCHW = torch.rand(2, 3, 32, 48) * 2 - 1
    mean_BCHW, std_BCHW = family_of(name).encode_images(vae, pixels_BCHW).chunk(2, dim=1)
    if name in ("flux2", "flux2_dev"):  # as its pipeline encodes the images that it refers to: the mean alone
        expected = pipeline_of(name, None)._encode_vae_image(pixels_BCHW, generator=None).detach()
        torch.testing.assert_close(packed(name, mean_BCHW), expected)
        assert not std_BCHW.any()
        with torch.no_grad():
            torch.testing.assert_close(returned("flux2", mean_BCHW), vae.encode(pixels_BCHW).latent_dist.mean)
        return
    if name in ("qwen_image", "krea2"):  # one frame, and statistics of each channel
        with torch.no_grad():
            spread = vae.encode(pixels_BCHW.unsqueeze(2)).latent_dist
        usual_mean, usual_std = torch.tensor([vae.config.latents_mean, vae.config.latents_std])[..., None, None]
        torch.testing.assert_close(mean_BCHW * usual_std + usual_mean, spread.mean.squeeze(2), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(std_BCHW * usual_std, spread.std.squeeze(2))
        return
    with torch.no_grad():
        spread = vae.encode(pixels_BCHW).latent_dist
        # As the pipelines do before they decode.
        got = vae.decode(mean_BCHW / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).sample
        torch.testing.assert_close(got, vae.decode(spread.mean).sample, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std_BCHW, spread.std * case.scale)
    torch.testing.assert_close(mean_BCHW, (spread.mean - case.shift) * case.scale)


@every_family
def test_texts_are_those_of_the_whole_pipeline(name):
    kind, words = family_of(name), ["a red spot", ""]
    encoders = kind.load_encoders(folder(name), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        expected = encoded(name, pipeline(name), words)
    for caption, item in enumerate(kind.encode_text(encoders, words)):
        for key, wanted in expected.items():
            found = item[key][item["real"]] if "real" in item else item[key]
            torch.testing.assert_close(found, wanted[caption])


@every_family
def test_a_batch_has_a_mask_for_captions_that_differ_in_length(name):
    kind = family_of(name)
    encoders = kind.load_encoders(folder(name), device="cpu", dtype=torch.float32)
    text = stack_texts(kind.encode_text(encoders, ["a red spot " * 20, ""]))
    assert ("padding" in text) == kind.FACTS.masks_captions


@every_family
def test_a_wide_image_is_not_a_transposed_high_one(name, text):
    denoiser = small(name, "denoiser")
    x_BCHW, t_B = torch.randn(1, CASES[name].channels, 4, 8), torch.tensor([0.5])
    one = {k: v[:1] for k, v in text.items()}
    wide = predicted(name, denoiser, x_BCHW, t_B, one)
    high = predicted(name, denoiser, x_BCHW.transpose(2, 3), t_B, one)
    assert wide.shape == x_BCHW.shape and not torch.allclose(wide, high.transpose(2, 3), atol=1e-2)


# ---- adapters


def adapted(name, denoiser, *, split):
    """Random adapters on the denoiser; the fused targets, by which their state is read."""
    kind = family_of(name)
    fused = {} if split else kind.FACTS.fused_targets
    adapters.fuse_projections(kind.blocks(denoiser), fused=fused, targets=kind.FACTS.targets)
    params = adapters.add_adapters(
        denoiser, kind.blocks(denoiser), targets=kind.FACTS.targets, fused=fused, rank=RANK, alpha=ALPHA, seed=7
    )
    torch.manual_seed(3)
    for p in params:
        torch.nn.init.normal_(p, std=0.3)
    return params


def how(name):
    """What reading a file onto adapters, and writing one, takes besides them."""
    facts = family_of(name).FACTS
    return {"prefix": facts.lora_prefix, "fused": facts.fused_targets, "scale": ALPHA / RANK}


def write_lora(name, denoiser, path):
    modules = peft_bridge.from_peft_state(adapters.state(denoiser), **how(name))
    # The first that diffusers reads at any width.
    key_format = "native" if "native" in family_of(name).LORA_KEYS.file_formats else "peft"
    write.write_lora(
        path, convert.to_file(modules, key_format, family_of(name).FACTS.name).tensors, {"ss_network_dim": str(RANK)}
    )


@each_split
def test_the_file_gives_the_trained_model_in_diffusers(name, split, text, tmp_path):
    denoiser = small(name, "denoiser")
    plain = copy.deepcopy(denoiser)
    adapted(name, denoiser, split=split)
    trained = output(name, denoiser, text)
    write_lora(name, denoiser, tmp_path / "x.safetensors")

    assert (output(name, plain, text) - trained).abs().max() > 0.1
    pipeline_of(name, plain).load_lora_weights(tmp_path / "x.safetensors")
    torch.testing.assert_close(output(name, plain, text), trained, atol=1e-4, rtol=1e-4)


@each_split
def test_a_file_begins_a_new_run_where_it_ended(name, split, text, tmp_path):
    denoiser = small(name, "denoiser")
    other = copy.deepcopy(denoiser)
    adapted(name, denoiser, split=split)
    write_lora(name, denoiser, tmp_path / "x.safetensors")
    for p in adapted(name, other, split=split):
        torch.nn.init.zeros_(p)
    back = convert.load(tmp_path / "x.safetensors", family_of(name).FACTS.name)
    adapters.load(other, peft_bridge.to_peft_state(back, adapters.state(other), **how(name)))
    torch.testing.assert_close(output(name, other, text), output(name, denoiser, text), atol=1e-5, rtol=1e-5)


@each_split
def test_adapters_are_fp32_on_a_bf16_model(name, split):
    denoiser = small(name, "denoiser").to(torch.bfloat16)
    assert {p.dtype for p in adapted(name, denoiser, split=split)} == {torch.float32}
