"""What the tools' own loaders make of our files, where a checkout of them is given: KILN_COMFYUI, KILN_SD_SCRIPTS.

Nothing of them is part of Kiln. Only their loaders run, on small models; what these import besides is replaced by
empty modules.
"""

import importlib.abc
import importlib.machinery
import logging
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers  # noqa: F401 (before the replacements below, which it must not see)
from diffusers import AutoencoderKL  # noqa: F401

from tests.contract.test_formats import random_modules, sdxl_of_two_layers, weights
from trainer import formats
from trainer.families import family

UNUSED = ("torchvision", "cv2", "toml", "imagesize", "einops", "torchsde", "comfy.model_base")


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules in which every name is an empty class."""

    def find_spec(self, name, path=None, target=None):
        wanted = any(name == n or name.startswith(f"{n}.") for n in UNUSED)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec):
        module, known = types.ModuleType(spec.name), {}

        def attribute(name):
            if name.startswith("__"):
                raise AttributeError(name)
            return known.setdefault(name, type(name, (), {}))

        module.__getattr__ = attribute
        return module

    def exec_module(self, module):
        pass


def checkout(monkeypatch, variable):
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} names no checkout: this tool's loader was NOT run")
    assert Path(folder).is_dir(), f"{variable}={folder}"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "meta_path", [Empty(), *sys.meta_path])


# ---- ComfyUI

DEPTH = {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 2], "transformer_depth": [0, 0, 1, 1, 2, 2],
         "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": 2}  # fmt: skip


@pytest.fixture
def comfy(monkeypatch):
    checkout(monkeypatch, "KILN_COMFYUI")
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.lora
    import comfy.model_base

    return comfy


def comfy_map(comfy, name, model):
    """ComfyUI's own table: diffusers' weight → its weight, or (weight, (0, first row, rows), [function])."""
    if name == "flux":
        config = {"depth": 2, "depth_single_blocks": 2, "hidden_size": 32}
        return config, comfy.utils.flux_to_diffusers(config, output_prefix="diffusion_model.")
    if name == "sd3":
        config = {"depth": 3, "num_blocks": 3}
        # It counts the widths by the depth, 64 columns a layer: this model is half as wide.
        table = comfy.utils.mmdit_to_diffusers(config, output_prefix="diffusion_model.")
        return config, {k: halved(v) for k, v in table.items()}
    table = comfy.utils.unet_to_diffusers(DEPTH)
    return DEPTH, {k: f"diffusion_model.{v}" for k, v in table.items()}


def halved(place):
    if isinstance(place, str) or place[1] is None:
        return place
    return place[0], tuple(x * 32 // (3 * 64) for x in place[1]), *place[2:]


@pytest.mark.parametrize("to", ["kohya", "comfyui", "peft"])
@pytest.mark.parametrize("name", ["flux", "sdxl", "sd3"])
def test_comfyui_reads_every_key_and_adds_what_was_trained(request, comfy, caplog, name, to):
    if (name, to) == ("sdxl", "peft"):
        pytest.skip("ComfyUI does not read these names of attention layers (LORA_FORMATS 2.2)")
    model = sdxl_of_two_layers() if name == "sdxl" else request.getfixturevalue(f"{name}_denoiser")
    config, table = comfy_map(comfy, name, model)
    prefix = family(name).FACTS.lora_prefix
    theirs = {}
    for module, w in weights(model, prefix=prefix).items():
        place = table.get(f"{module.partition('.')[2]}.weight")
        if place is not None:
            key = place if isinstance(place, str) else place[0]
            rows = len(w) if isinstance(place, str) or place[1] is None else place[1][1] + place[1][2]
            theirs[key] = torch.zeros(max(rows, len(theirs.get(key, ()))), *w.shape[1:])
    modules = {m: a for m, a in random_modules(model, name).items() if f"{m.partition('.')[2]}.weight" in table}
    assert len(modules) > 40

    kind = {"flux": "Flux", "sd3": "SD3", "sdxl": "SDXL"}[name]
    loaded = types.SimpleNamespace(state_dict=lambda: theirs, model_config=types.SimpleNamespace(unet_config=config))
    loaded = type("Loaded", (getattr(comfy.model_base, kind),), vars(loaded))()
    loaded.state_dict = lambda: theirs
    names = comfy.lora.model_lora_keys_unet(loaded, {})
    if name == "sd3":
        names = {k: halved(v) for k, v in names.items()}
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(formats.write(modules, to, name).tensors, names)
    assert [r.getMessage() for r in caplog.records if "not loaded" in r.getMessage()] == []
    for place, patch in patches.items():
        key, offset, function = (*place, None)[:3] if isinstance(place, tuple) else (place, None, None)
        comfy.lora.calculate_weight([(1.0, patch, 1.0, offset, function)], theirs[key], key)
    for module, adapter in modules.items():
        place = table[f"{module.partition('.')[2]}.weight"]
        got = theirs[place if isinstance(place, str) else place[0]]
        if not isinstance(place, str):
            got = got.narrow(*place[1]) if place[1] else got
            got = place[2](got) if len(place) > 2 else got
        torch.testing.assert_close(got, adapter.delta(), rtol=1e-4, atol=1e-4, msg=module)


# ---- sd-scripts

# Original layer → the diffusers layers that it is made of, written down once more and by hand.
FLUX = {
    "double_blocks_{}_img_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "double_blocks_{}_txt_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "double_blocks_{}_img_attn_proj": "attn.to_out.0",
    "double_blocks_{}_txt_attn_proj": "attn.to_add_out",
    "double_blocks_{}_img_mlp_0": "ff.net.0.proj",
    "double_blocks_{}_img_mlp_2": "ff.net.2",
    "double_blocks_{}_txt_mlp_0": "ff_context.net.0.proj",
    "double_blocks_{}_txt_mlp_2": "ff_context.net.2",
    "double_blocks_{}_img_mod_lin": "norm1.linear",
    "double_blocks_{}_txt_mod_lin": "norm1_context.linear",
    "single_blocks_{}_linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "single_blocks_{}_linear2": "proj_out",
    "single_blocks_{}_modulation_lin": "norm.linear",
}
SD3 = {
    "x_block_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block_attn2_qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "context_block_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "x_block_attn_proj": "attn.to_out.0",
    "x_block_attn2_proj": "attn2.to_out.0",
    "context_block_attn_proj": "attn.to_add_out",
    "x_block_mlp_fc1": "ff.net.0.proj",
    "x_block_mlp_fc2": "ff.net.2",
    "context_block_mlp_fc1": "ff_context.net.0.proj",
    "context_block_mlp_fc2": "ff_context.net.2",
    "x_block_adaLN_modulation_1": "norm1.linear",
    "context_block_adaLN_modulation_1": "norm1_context.linear",
}


def assert_sd_scripts_agrees(network, tensors, expected):
    """`expected`: its layer → the delta."""
    found = network.load_state_dict(tensors, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    got = {m.lora_name: m.get_weight() for m in network.unet_loras}
    assert got.keys() == {f"lora_unet_{n}" for n in expected}
    for name, delta in expected.items():
        torch.testing.assert_close(got[f"lora_unet_{name}"], delta, rtol=1e-4, atol=1e-4, msg=name)


def by_block(modules, table, *, start, block):
    """The table filled in for one block."""
    found = {}
    for theirs, ours in table.items():
        names = [f"transformer.{start}.{block}.{end}" for end in ours.split()]
        if all(n in modules for n in names):
            found[theirs.replace("{}", str(block))] = torch.cat([modules[n].delta() for n in names])
    return found


def test_sd_scripts_reads_flux(monkeypatch, flux_denoiser):
    checkout(monkeypatch, "KILN_SD_SCRIPTS")
    from library import flux_models
    from networks import lora_flux

    modules = random_modules(flux_denoiser, "flux", only="transformer_blocks.")
    tensors = formats.write(modules, "kohya", "flux").tensors
    params = flux_models.FluxParams(64, 20, 24, 32, 4.0, 2, 2, 2, [4, 6, 6], 10_000, True, True)
    model = flux_models.Flux(params)
    network, _ = lora_flux.create_network_from_weights(
        1.0, None, None, [], model, weights_sd=tensors, for_inference=True
    )
    network.apply_to([], model, False, True)
    double = {k: v for k, v in FLUX.items() if k.startswith("double")}
    single = {k: v for k, v in FLUX.items() if k.startswith("single")}
    expected = {}
    for block in (0, 1):
        expected |= by_block(modules, double, start="transformer_blocks", block=block)
        expected |= by_block(modules, single, start="single_transformer_blocks", block=block)
    assert_sd_scripts_agrees(network, tensors, expected)


def test_sd_scripts_reads_sd3(monkeypatch, sd3_denoiser):
    checkout(monkeypatch, "KILN_SD_SCRIPTS")
    from library import sd3_models
    from networks import lora_sd3

    modules = random_modules(sd3_denoiser, "sd3", only="transformer_blocks.")
    tensors = formats.write(modules, "kohya", "sd3").tensors
    # Its width is 64 for each layer: only names, ranks and strengths can be compared at this one's 32.
    params = sd3_models.SD3Params(2, 3, 64, 8, 20, "rms", [0], 24, 192, "sd3m")
    model = sd3_models.create_sd3_mmdit(params)
    network, _ = lora_sd3.create_network_from_weights(
        1.0, None, None, [], model, weights_sd=tensors, for_inference=True
    )
    network.apply_to([], model, False, True)
    theirs = {m.lora_name: m for m in network.unet_loras}
    assert theirs.keys() == {k.split(".")[0] for k in tensors}
    expected = {}
    for block in (0, 1, 2):
        table = {f"joint_blocks_{{}}_{k}": v for k, v in SD3.items()}
        expected |= by_block(modules, table, start="transformer_blocks", block=block)
    assert {f"lora_unet_{n}" for n in expected} == theirs.keys()
    last = "joint_blocks_2_context_block_adaLN_modulation_1"
    expected[last] = torch.cat(expected[last].chunk(2)[::-1])
    for name, delta in expected.items():
        down, up = (tensors[f"lora_unet_{name}.lora_{end}.weight"] for end in ("down", "up"))
        torch.testing.assert_close(theirs[f"lora_unet_{name}"].scale * up @ down, delta, rtol=1e-4, atol=1e-4)


def test_sd_scripts_reads_sdxl(monkeypatch):
    checkout(monkeypatch, "KILN_SD_SCRIPTS")
    from library import sdxl_original_unet
    from networks import lora

    small = sdxl_of_two_layers()
    modules = random_modules(small, "sdxl", only="attentions")
    tensors = formats.write(modules, "kohya", "sdxl").tensors
    with torch.device("meta"):
        model = sdxl_original_unet.SdxlUNet2DConditionModel()
    network, _ = lora.create_network_from_weights(1.0, None, None, [], model, weights_sd=tensors, for_inference=True)
    network.apply_to([], model, False, True)
    theirs = {m.lora_name: m for m in network.unet_loras}
    assert theirs.keys() == {k.split(".")[0] for k in tensors}
    for name, module in theirs.items():
        assert module.scale == pytest.approx(
            tensors[f"{name}.alpha"].item() / len(tensors[f"{name}.lora_down.weight"]), rel=1e-6
        )
