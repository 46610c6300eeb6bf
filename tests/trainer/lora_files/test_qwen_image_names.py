"""Qwen-Image's LoRA files: the spellings of every tool, written out here, and what diffusers makes of our formats."""

import copy

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file, save_file

from tests.support import models
from trainer.export import export_command
from trainer.lora_files import convert
from trainer.lora_files.weights import LoraWeights
from trainer.sample import apply_loras

RANK = 3
WIDE = 128  # of the MLPs
LAYERS = {  # name → (rows, columns), in the small model
    **{f"attn.{name}": (32, 32) for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
    **{f"attn.add_{x}_proj": (32, 32) for x in "qkv"},
    **{f"{of}_mlp.net.0.proj": (WIDE, 32) for of in ("img", "txt")},
    **{f"{of}_mlp.net.2": (32, WIDE) for of in ("img", "txt")},
    **{f"{of}_mod.1": (192, 32) for of in ("img", "txt")},
}


@pytest.fixture
def modules():
    """Random adapters of every layer of the blocks, by diffusers' names, with a scale that is not 1."""
    torch.manual_seed(1)
    made = {}
    for block in range(3):
        for layer, (rows, columns) in LAYERS.items():
            down, up = torch.randn(RANK, columns) / 4, torch.randn(rows, RANK) / 4
            made[f"transformer.transformer_blocks.{block}.{layer}"] = LoraWeights(down, up, 0.5)
    return made


def deltas(modules):
    return {name: weights.scale * weights.up @ weights.down for name, weights in modules.items()}


def assert_same(found, expected):
    found, expected = deltas(found), deltas(expected)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


def kohya(modules, prefix="lora_unet_"):
    tensors = {}
    for name, weights in modules.items():
        stem = f"{prefix}{name.removeprefix('transformer.').replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = weights.down, weights.up
        tensors[f"{stem}.alpha"] = torch.tensor(weights.scale * RANK)
    return tensors


def dotted(modules, prefix="diffusion_model.", adapter=""):
    tensors = {}
    for name, weights in modules.items():
        stem = f"{prefix}{name.removeprefix('transformer.')}"
        tensors[f"{stem}.lora_A.{adapter}weight"] = weights.down
        tensors[f"{stem}.lora_B.{adapter}weight"] = weights.scale * weights.up
    return tensors


def comfyui(modules):
    tensors = {}
    for name, weights in modules.items():
        stem = name.replace("transformer.", "diffusion_model.", 1)
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = weights.down, weights.up
        tensors[f"{stem}.alpha"] = torch.tensor(weights.scale * RANK)
    return tensors


SPELLINGS = {
    "musubi-tuner": kohya,
    "OneTrainer": lambda modules: kohya(modules, "lora_transformer_"),
    "LyCORIS": lambda modules: kohya(modules, "lycoris_"),
    "ai-toolkit": dotted,
    "diffusers": lambda modules: dotted(modules, "transformer."),
    "PEFT": lambda modules: dotted(modules, "base_model.model."),
    "DiffSynth": lambda modules: dotted(modules, "", "default."),
    "bare names": lambda modules: dotted(modules, ""),
    "ComfyUI": comfyui,
}


@pytest.mark.parametrize("tool", SPELLINGS)
def test_every_tools_file_is_read_and_becomes_every_format(modules, tmp_path, tool):
    written = {key: tensor.contiguous() for key, tensor in SPELLINGS[tool](modules).items()}
    save_file(written, tmp_path / "in.safetensors")
    assert_same(convert.load(tmp_path / "in.safetensors", "qwen_image"), modules)
    formats = {"native": dotted, "kohya": kohya, "comfyui": comfyui, "peft": SPELLINGS["diffusers"]}
    for to, spelling in formats.items():
        out = tmp_path / f"{to}.safetensors"
        assert export_command([str(tmp_path / "in.safetensors"), "--to", to, "--out", str(out)]) == 0
        assert load_file(out).keys() == spelling(modules).keys()
        assert_same(convert.load(out, "qwen_image"), modules)


def velocity(model):
    torch.manual_seed(2)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 15, 64),
            encoder_hidden_states=torch.randn(1, 9, 24),
            timestep=torch.tensor([0.6]),
            img_shapes=[[(1, 3, 5)]],
            return_dict=False,
        )[0]


@pytest.mark.parametrize("to", convert.KEY_FORMATS)
def test_diffusers_makes_the_same_model_of_each_format(modules, tmp_path, to):
    """By its own loader and forward pass, against a model with the changes added to its weights."""
    plain = models.qwen_image_denoiser()
    merged = copy.deepcopy(plain)
    apply_loras(merged, [(modules, 1.0)], component="transformer")
    before, expected = velocity(plain), velocity(merged)
    save_file(convert.to_file(modules, to, "qwen_image").tensors, tmp_path / "x.safetensors")
    pipe = QwenImagePipeline(None, models.qwen_image_vae(), None, None, plain)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    assert (expected - before).norm() > 0.1 * before.norm()
    torch.testing.assert_close(velocity(plain), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
