"""Krea 2's LoRA files: the spellings of every tool, written out here, and what diffusers makes of our formats."""

import copy

import pytest
import torch
from diffusers import Krea2Pipeline
from safetensors.torch import load_file, save_file

from tests.support import models
from trainer.export import export_command
from trainer.lora_files import convert
from trainer.lora_files.weights import LoraWeights
from trainer.sample import apply_loras

RANK = 3
# krea-ai/krea-2's name → diffusers' name, and (rows, columns) in the small model
IN_A_BLOCK = {
    "attn.wq": ("attn.to_q", (32, 32)),
    "attn.wk": ("attn.to_k", (8, 32)),
    "attn.wv": ("attn.to_v", (8, 32)),
    "attn.gate": ("attn.to_gate", (32, 32)),
    "attn.wo": ("attn.to_out.0", (32, 32)),
    "mlp.gate": ("ff.gate", (80, 32)),
    "mlp.up": ("ff.up", (80, 32)),
    "mlp.down": ("ff.down", (32, 80)),
}
IN_A_FUSING_BLOCK = {
    name: (ours, (24 if rows in (8, 32) else 40, 24 if columns == 32 else 40))
    for name, (ours, (rows, columns)) in IN_A_BLOCK.items()
}
LAYERS = {
    "first": ("img_in", (32, 64)),
    "last.linear": ("final_layer.linear", (64, 32)),
    "tmlp.0": ("time_embed.linear_1", (32, 16)),
    "tmlp.2": ("time_embed.linear_2", (32, 32)),
    "tproj.1": ("time_mod_proj", (192, 32)),
    "txtmlp.1": ("txt_in.linear_1", (32, 24)),
    "txtmlp.3": ("txt_in.linear_2", (32, 32)),
    "txtfusion.projector": ("text_fusion.projector", (1, 12)),
}
for path, ours, layers in (
    *((f"blocks.{i}", f"transformer_blocks.{i}", IN_A_BLOCK) for i in range(3)),
    *((f"txtfusion.layerwise_blocks.{i}", f"text_fusion.layerwise_blocks.{i}", IN_A_FUSING_BLOCK) for i in range(2)),
    ("txtfusion.refiner_blocks.0", "text_fusion.refiner_blocks.0", IN_A_FUSING_BLOCK),
):
    for layer, (our_layer, shape) in layers.items():
        LAYERS[f"{path}.{layer}"] = (f"{ours}.{our_layer}", shape)


@pytest.fixture
def modules():
    """Random adapters of every linear layer, by diffusers' names, with a scale that is not 1."""
    torch.manual_seed(1)
    made = {}
    for ours, (rows, columns) in LAYERS.values():
        down, up = torch.randn(RANK, columns) / 4, torch.randn(rows, RANK) / 4
        made[f"transformer.{ours}"] = LoraWeights(down, up, 0.5)
    return made


def deltas(modules):
    return {name: weights.scale * weights.up @ weights.down for name, weights in modules.items()}


def assert_same(found, expected):
    found, expected = deltas(found), deltas(expected)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


def named(modules, of_diffusers):
    """The path of each layer, by krea-ai's names or by diffusers'."""
    for theirs, (ours, _) in LAYERS.items():
        yield ours if of_diffusers else theirs, modules[f"transformer.{ours}"]


def kohya(modules, prefix="lora_unet_", of_diffusers=False):
    tensors = {}
    for path, weights in named(modules, of_diffusers):
        stem = f"{prefix}{path.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = weights.down, weights.up
        tensors[f"{stem}.alpha"] = torch.tensor(weights.scale * RANK)
    return tensors


def dotted(modules, prefix="diffusion_model.", of_diffusers=False):
    tensors = {}
    for path, weights in named(modules, of_diffusers):
        tensors[f"{prefix}{path}.lora_A.weight"] = weights.down
        tensors[f"{prefix}{path}.lora_B.weight"] = weights.scale * weights.up
    return tensors


def comfyui(modules):
    tensors = {}
    for path, weights in named(modules, False):
        stem = f"diffusion_model.{path}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = weights.down, weights.up
        tensors[f"{stem}.alpha"] = torch.tensor(weights.scale * RANK)
    return tensors


SPELLINGS = {
    "musubi-tuner": kohya,
    "krea-ai, ai-toolkit": dotted,
    "ai-toolkit before": lambda modules: dotted(modules, "base_model.model."),
    "diffusers": lambda modules: dotted(modules, "transformer.", True),
    "PEFT": lambda modules: dotted(modules, "base_model.model.", True),
    "OneTrainer": lambda modules: kohya(modules, "lora_transformer_", True),
    "LyCORIS": lambda modules: kohya(modules, "lycoris_", True),
    "SimpleTuner": lambda modules: kohya(modules, "lycoris_"),
    "bare names": lambda modules: dotted(modules, ""),
    "ComfyUI": comfyui,
}


@pytest.mark.parametrize("tool", SPELLINGS)
def test_every_tools_file_is_read_and_becomes_every_format(modules, tmp_path, tool):
    written = {key: tensor.contiguous() for key, tensor in SPELLINGS[tool](modules).items()}
    save_file(written, tmp_path / "in.safetensors")
    assert_same(convert.load(tmp_path / "in.safetensors", "krea2"), modules)
    formats = {"native": dotted, "kohya": kohya, "comfyui": comfyui, "peft": SPELLINGS["diffusers"]}
    for to, spelling in formats.items():
        out = tmp_path / f"{to}.safetensors"
        assert export_command([str(tmp_path / "in.safetensors"), "--to", to, "--out", str(out)]) == 0
        assert load_file(out).keys() == spelling(modules).keys()
        assert_same(convert.load(out, "krea2"), modules)


def velocity(model):
    torch.manual_seed(2)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 15, 64),
            encoder_hidden_states=torch.randn(1, 9, 12, 24),
            timestep=torch.tensor([0.6]),
            position_ids=Krea2Pipeline.prepare_position_ids(9, 3, 5, torch.device("cpu")),
            return_dict=False,
        )[0]


@pytest.mark.parametrize("to", ["native", "peft"])
def test_diffusers_makes_the_same_model_of_the_formats_it_reads(modules, tmp_path, to):
    """By its own loader and forward pass, against a model with the changes added to its weights."""
    plain = models.krea2_denoiser()
    merged = copy.deepcopy(plain)
    apply_loras(merged, [(modules, 1.0)], component="transformer")
    before, expected = velocity(plain), velocity(merged)
    save_file(convert.to_file(modules, to, "krea2").tensors, tmp_path / "x.safetensors")
    pipe = Krea2Pipeline(None, models.krea2_vae(), None, None, plain)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    assert (expected - before).norm() > 0.1 * before.norm()
    torch.testing.assert_close(velocity(plain), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
