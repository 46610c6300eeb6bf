"""Files with dotted native names: their keys, the other spellings of the same layers, and what diffusers makes of each.

The spellings are written out here: musubi-tuner's, ai-toolkit's and ComfyUI's.
"""

import copy

import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file, save_file

from tests.support import models
from trainer.export import export_command
from trainer.lora_files import convert
from trainer.lora_files.weights import LoraWeights
from trainer.sample import apply_loras

RANK = 3
LAYERS = {  # name → (rows, columns), in the small model
    **{f"attention.{name}": (32, 32) for name in ("to_q", "to_k", "to_v", "to_out.0")},
    "feed_forward.w1": (85, 32),
    "feed_forward.w2": (32, 85),
    "feed_forward.w3": (85, 32),
}


@pytest.fixture
def modules():
    """Random adapters of every target, by diffusers' names, with a scale that is not 1."""
    torch.manual_seed(1)
    made = {}
    for block in range(3):
        for layer, (rows, columns) in LAYERS.items():
            down, up = torch.randn(RANK, columns) / 4, torch.randn(rows, RANK) / 4
            made[f"transformer.layers.{block}.{layer}"] = LoraWeights(down, up, 0.5)
    return made


def deltas(modules):
    return {name: weights.scale * weights.up @ weights.down for name, weights in modules.items()}


def assert_same(found, expected):
    found, expected = deltas(found), deltas(expected)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


def test_the_keys_are_the_native_names_and_nothing_else(modules):
    tensors = convert.to_file(modules, "native", "z_image").tensors
    expected = {
        f"diffusion_model.layers.{block}.{layer}.lora_{side}.weight"
        for block in range(3)
        for layer in LAYERS
        for side in "AB"
    }
    assert tensors.keys() == expected
    delta = deltas(modules)["transformer.layers.1.attention.to_out.0"]
    stem = "diffusion_model.layers.1.attention.to_out.0"
    torch.testing.assert_close(tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"], delta)


# ---- other tools' spellings of the same layers


def musubi(modules):
    tensors = {}
    for name, weights in modules.items():
        stem = f"lora_unet_{name.removeprefix('transformer.').replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = weights.down, weights.up
        tensors[f"{stem}.alpha"] = torch.tensor(weights.scale * RANK)
    return tensors


def ai_toolkit(modules, prefix="diffusion_model."):
    tensors = {}
    for name, weights in modules.items():
        stem = f"{prefix}{name.removeprefix('transformer.')}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = weights.down, weights.scale * weights.up
    return tensors


def comfyui(modules):
    """As ComfyUI's own layers are: q, k and v are one, and the output layer has another name."""
    tensors = {}
    for block in range(3):
        parts = [modules[f"transformer.layers.{block}.attention.to_{x}"] for x in "qkv"]
        stem = f"lora_unet_layers_{block}_attention_qkv"
        tensors[f"{stem}.lora_down.weight"] = torch.cat([part.down for part in parts])
        tensors[f"{stem}.lora_up.weight"] = torch.block_diag(*(part.up for part in parts))
        tensors[f"{stem}.alpha"] = torch.tensor(parts[0].scale * RANK * 3)
        rest = {
            "attention.out": "attention.to_out.0",
            **{f"feed_forward.w{n}": f"feed_forward.w{n}" for n in (1, 2, 3)},
        }
        for theirs, ours in rest.items():
            weights = modules[f"transformer.layers.{block}.{ours}"]
            stem = f"lora_unet_layers_{block}_{theirs.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = weights.down, weights.up
            tensors[f"{stem}.alpha"] = torch.tensor(weights.scale * RANK)
    return tensors


SPELLINGS = {
    "musubi-tuner": musubi,
    "ai-toolkit": ai_toolkit,
    "diffusers": lambda modules: ai_toolkit(modules, "transformer."),
    "bare names": lambda modules: ai_toolkit(modules, ""),
    "ComfyUI": comfyui,
}


@pytest.mark.parametrize("tool", SPELLINGS)
def test_every_tools_file_is_read(modules, tmp_path, tool):
    written = {key: tensor.contiguous() for key, tensor in SPELLINGS[tool](modules).items()}
    save_file(written, tmp_path / "x.safetensors")
    assert_same(convert.load(tmp_path / "x.safetensors", "z_image"), modules)


@pytest.mark.parametrize("tool", SPELLINGS)
def test_the_command_writes_native_names_and_musubis(modules, tmp_path, tool):
    save_file(
        {key: tensor.contiguous() for key, tensor in SPELLINGS[tool](modules).items()}, tmp_path / "in.safetensors"
    )
    for to, spelling in (("native", ai_toolkit), ("kohya", musubi)):
        out = tmp_path / f"{to}.safetensors"
        assert export_command([str(tmp_path / "in.safetensors"), "--to", to, "--out", str(out)]) == 0
        assert load_file(out).keys() == spelling(modules).keys()
        assert_same(convert.load(out, "z_image"), modules)


# ---- diffusers' own loader


def velocity(model):
    torch.manual_seed(2)
    x, text = torch.randn(16, 1, 6, 10), torch.randn(9, 24)
    with torch.no_grad():
        return model([x], torch.tensor([0.4]), [text], return_dict=False)[0][0]


@pytest.mark.parametrize("to", ["native", "kohya", "comfyui", "peft"])
def test_diffusers_makes_the_same_model_of_each_format(modules, tmp_path, to):
    """By its own forward pass, against a model with the changes added to its weights."""
    plain = models.z_image_denoiser()
    merged = copy.deepcopy(plain)
    apply_loras(merged, [(modules, 1.0)], component="transformer")
    before, expected = velocity(plain), velocity(merged)
    save_file(convert.to_file(modules, to, "z_image").tensors, tmp_path / "x.safetensors")
    pipe = ZImagePipeline(None, models.z_image_vae(), None, None, plain)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    assert (expected - before).norm() > 0.1 * before.norm()
    torch.testing.assert_close(velocity(plain), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
