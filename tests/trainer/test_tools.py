"""Our files in the tools' own loaders, if KILN_COMFYUI, KILN_FORGE or KILN_SD_SCRIPTS name a checkout of the tool.

Nothing of them is part of Kiln. Their loaders run on their own models without weights, with the published names and
shapes, and narrow where their classes allow it. Their other imports are replaced by empty modules. docs/lora-files.md
has the versions that were run.
"""

import importlib.abc
import importlib.machinery
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import AutoencoderKL  # noqa: F401 (before the replacements below, which it must not see)

from tests.support.variants import VARIANTS, shape
from trainer.lora_files import convert
from trainer.lora_files.weights import LoraWeights
from trainer.spec.family import get_family, trainable_encoders

# What a loader does not need, but imports on its way.
UNUSED = (
    "torchvision",
    "cv2",
    "toml",
    "imagesize",
    "einops",
    "torchsde",
    "gguf",
    "backend.operations_gguf",
    "kornia",
    "av",
    "spandrel",
    "modules",
)
BASES = ("flux-dev", "sdxl-base", "sd3-medium", "sd3.5-medium", "sd3.5-large")
CLIPS = {"te1": (12, 768, 3072), "te2": (32, 1280, 5120)}  # layers, width, width inside


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
    monkeypatch.setattr(sys, "argv", ["tool"])


# ---- files with a module for each layer of a published model

NARROW = {
    "flux-dev": {
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 20,
        "axes_dims_rope": (2, 2, 4),
    },
    "sdxl-base": {
        "block_out_channels": (32, 64, 128), "attention_head_dim": (1, 2, 4), "cross_attention_dim": 24,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


def adapters(base, *, everywhere=False, narrow=True):
    """An adapter for every linear layer in the blocks of a model, or for each layer that has a name in files, and for
    the CLIP encoders; ranks differ."""
    torch.manual_seed(3)
    model, name = shape(base, NARROW.get(base, {}) if narrow else {}), VARIANTS[base][0]
    kind = get_family(name)
    inside = tuple(f"{block}." for block, _ in kind.blocks(model))
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and (everywhere or path.startswith(inside)):
            rank = 1 + len(found) % 2
            rows, *columns = layer.weight.shape
            ones = [1] * (len(columns) - 1)
            down, up = torch.randn(rank, *columns), torch.randn(rows, rank, *ones)
            found[f"{kind.FACTS.lora_prefix}.{path}"] = LoraWeights(down, up, (0.25, 1.0, 2.0)[len(found) % 3])
    for component, short in trainable_encoders(name).items():
        layers, width, wide = CLIPS[short]
        for i in range(layers):
            start = f"{component}.text_model.encoder.layers.{i}"
            for end, rows, columns in (
                *((f"self_attn.{x}_proj", width, width) for x in ("q", "k", "v", "out")),
                ("mlp.fc1", wide, width),
                ("mlp.fc2", width, wide),
            ):
                found[f"{start}.{end}"] = LoraWeights(torch.randn(2, columns), torch.randn(rows, 2), 0.5)
    return found


def examples(modules):
    """The first and the last module of each kind: their deltas are compared, which are large."""
    kinds = {}
    for module in modules:
        kinds.setdefault(re.sub(r"\d+", "{}", module), []).append(module)
    return {module: modules[module] for some in kinds.values() for module in (some[0], some[-1])}


def close(got, adapter, module):
    """To 1e-3 of the delta's size."""
    expected = adapter.delta()
    assert got.shape == expected.shape, module
    assert (got - expected).norm() <= 1e-3 * expected.norm(), module


def clip_names():
    """The state dict of both CLIP encoders as ComfyUI and Forge name it."""
    found = {}
    for end, (layers, width, wide) in zip("lg", CLIPS.values(), strict=True):
        for i in range(layers):
            start = f"clip_{end}.transformer.text_model.encoder.layers.{i}"
            found |= {f"{start}.self_attn.{x}_proj.weight": (width, width) for x in ("q", "k", "v", "out")}
            found |= {f"{start}.mlp.fc1.weight": (wide, width), f"{start}.mlp.fc2.weight": (width, wide)}
    return {name: torch.empty(size, device="meta") for name, size in found.items()}


def place_of(module, table, name):
    """Where the tool keeps a module's weight: its key, its rows (None: all), and what makes diffusers' rows of them."""
    component, _, path = module.partition(".")
    if short := trainable_encoders(name).get(component):
        return f"clip_{'lg'[short == 'te2']}.transformer.{path}.weight", None, None
    place = table[f"{path}.weight"]
    return (place, None, None) if isinstance(place, str) else (*place, None)[:3]


def compare(modules, patches, table, states, apply, name):
    """All patches of the weights in question, put on zeros; then the rows of each module against its delta."""
    by_key = {}
    for where, patch in patches.items():
        key, rows, function = (*where, None)[:3] if isinstance(where, tuple) else (where, None, None)
        by_key.setdefault(key, []).append((1.0, patch, 1.0, rows, function))
    assert by_key.keys() <= states.keys()
    for module, adapter in examples(modules).items():
        key, rows, function = place_of(module, table, name)
        got = apply(by_key[key], torch.zeros(states[key].shape), key)
        got = got.narrow(*rows) if rows else got
        close(function(got) if function else got, adapter, module)


# ---- ComfyUI

FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 20, "context_in_dim": 24, "hidden_size": 16,
    "mlp_ratio": 4.0, "num_heads": 2, "depth": 19, "depth_single_blocks": 38, "axes_dim": [2, 2, 4],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4], "num_head_channels": 32, "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "transformer_depth_middle": 10, "context_dim": 24,
    "use_linear_in_transformer": True, "use_spatial_transformer": True, "num_classes": "sequential",
    "adm_in_channels": 2816,
}  # fmt: skip


def sd3(base):
    config = VARIANTS[base][1]
    width = config["caption_projection_dim"]
    linear = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": width}}
    return {
        "input_size": None, "adm_in_channels": 2048, "patch_size": 2, "in_channels": 16, "depth": config["num_layers"],
        "pos_embed_max_size": config["pos_embed_max_size"], "qk_norm": "rms" if "qk_norm" in config else None,
        "num_patches": config["pos_embed_max_size"] ** 2, "context_embedder_config": linear,
        "x_block_self_attn_layers": list(config.get("dual_attention_layers", ())),
    }  # fmt: skip


def comfy_model(base):
    """ComfyUI's own model on the device "meta", in its own wrapper's place, and its own table of diffusers' names."""
    import comfy.model_base
    import comfy.ops
    import comfy.utils
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    name = VARIANTS[base][0]
    make, config, kind, table = {
        "flux": lambda: (Flux, {"image_model": "flux", **FLUX}, comfy.model_base.Flux, comfy.utils.flux_to_diffusers),
        "sd3": lambda: (MMDiT, sd3(base), comfy.model_base.SD3, comfy.utils.mmdit_to_diffusers),
        "sdxl": lambda: (UNetModel, SDXL, comfy.model_base.SDXL, comfy.utils.unet_to_diffusers),
    }[name]()
    model = make(**config, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    states = {f"diffusion_model.{k}": v for k, v in model.state_dict().items()}
    wrapper = kind.__new__(kind)
    torch.nn.Module.__init__(wrapper)
    wrapper.state_dict = lambda: states
    wrapper.model_config = types.SimpleNamespace(unet_config=config)
    names = {k: f"diffusion_model.{v}" for k, v in table(config).items()} if name == "sdxl" else None
    return wrapper, states, names or table(config, output_prefix="diffusion_model.")


COMFYUI = [(base, to) for base in BASES for to in convert.KEY_FORMATS if (base, to) != ("sdxl-base", "peft")]


@pytest.mark.parametrize(("base", "to"), COMFYUI)
def test_comfyui_reads_every_key_and_adds_what_was_trained(monkeypatch, base, to):
    checkout(monkeypatch, "KILN_COMFYUI")
    import comfy.cli_args

    monkeypatch.setattr(comfy.cli_args.args, "cpu", True)
    import comfy.lora
    import comfy.lora_convert

    name = VARIANTS[base][0]
    wrapper, states, table = comfy_model(base)
    modules = adapters(base, everywhere=to != "peft")
    clip = types.SimpleNamespace(state_dict=clip_names)
    known = comfy.lora.model_lora_keys_clip(clip, comfy.lora.model_lora_keys_unet(wrapper, {}))
    tensors = comfy.lora_convert.convert_lora(convert.to_file(modules, to, name).tensors)
    said = []
    monkeypatch.setattr(comfy.lora.logging, "warning", lambda *words: said.append(words))
    patches = comfy.lora.load_lora(tensors, known)
    assert said == []
    compare(modules, patches, table, states | clip_names(), comfy.lora.calculate_weight, name)


def test_comfyui_does_not_read_peft_names_of_sdxl(monkeypatch):
    """Why a job for SDXL leaves kohya's names."""
    checkout(monkeypatch, "KILN_COMFYUI")
    import comfy.lora

    wrapper, *_ = comfy_model("sdxl-base")
    said = []
    monkeypatch.setattr(comfy.lora.logging, "warning", lambda *words: said.append(words))
    tensors = convert.to_file(adapters("sdxl-base"), "peft", "sdxl").tensors
    comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(wrapper, {}))
    assert len(said) > 1000


# ---- Forge


def forge_model(base):
    """Forge's own model on the device "meta", as its loader of LoRAs sees it, and its own table of diffusers' names."""
    from backend.nn.flux import IntegratedFluxTransformer2DModel
    from backend.nn.mmditx import MMDiTX
    from backend.nn.unet import IntegratedUNet2DConditionModel
    from packages_3rdparty.comfyui_lora_collection import utils

    name = VARIANTS[base][0]
    flux = {k: v for k, v in FLUX.items() if k not in ("patch_size", "out_channels")}
    make, config, repo, table = {
        "flux": (IntegratedFluxTransformer2DModel, flux, "black-forest-labs/FLUX.1-dev", utils.flux_to_diffusers),
        "sd3": (
            MMDiTX,
            sd3(base) if name == "sd3" else {},
            "stabilityai/stable-diffusion-3-medium",
            utils.mmdit_to_diffusers,
        ),
        "sdxl": (
            IntegratedUNet2DConditionModel,
            {k: v for k, v in SDXL.items() if k != "image_size"},
            "stabilityai/stable-diffusion-xl-base-1.0",
            utils.unet_to_diffusers,
        ),
    }[name]
    with torch.device("meta"):
        states = {f"diffusion_model.{k}": v for k, v in make(**config).state_dict().items()}
    model = types.SimpleNamespace(
        state_dict=lambda: states,
        diffusion_model=types.SimpleNamespace(config=config),
        config=types.SimpleNamespace(huggingface_repo=repo),
    )
    if name == "sdxl":
        return model, states, {k: f"diffusion_model.{v}" for k, v in table(config).items()}
    names = table(config, output_prefix="diffusion_model.")
    for block in VARIANTS[base][1].get("dual_attention_layers", ()):  # which its table lacks, and its model has
        ours, own = f"transformer_blocks.{block}.attn2", f"diffusion_model.joint_blocks.{block}.x_block.attn2"
        width = VARIANTS[base][1]["caption_projection_dim"]
        for i, x in enumerate("qkv"):
            names[f"{ours}.to_{x}.weight"] = f"{own}.qkv.weight", (0, i * width, width)
        names[f"{ours}.to_out.0.weight"] = f"{own}.proj.weight"
    return model, states, names


FORGE = [(base, to) for base in BASES for to in ("kohya", "comfyui")] + [("flux-dev", "peft")]


@pytest.mark.parametrize(("base", "to"), FORGE)
def test_forge_reads_every_key_and_adds_what_was_trained(monkeypatch, base, to):
    checkout(monkeypatch, "KILN_FORGE")
    sys.argv.append("--always-cpu")
    from backend.patcher import lora as theirs

    name = VARIANTS[base][0]
    model, states, table = forge_model(base)
    modules = adapters(base, everywhere=to != "peft")
    rest = convert.to_file(modules, to, name).tensors
    in_model, rest = theirs.load_lora(rest, theirs.model_lora_keys_unet(model, {}))
    clip = types.SimpleNamespace(state_dict=clip_names)
    in_clip, rest = theirs.load_lora(rest, theirs.model_lora_keys_clip(clip, {}))
    assert list(rest) == []
    compare(modules, in_model | in_clip, table, states | clip_names(), theirs.merge_lora_to_weight, name)


# ---- sd-scripts

# Original layer → the diffusers layers that it is made of, written down once more and by hand.
DOUBLE = {
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
}
SINGLE = {
    "single_blocks_{}_linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "single_blocks_{}_linear2": "proj_out",
    "single_blocks_{}_modulation_lin": "norm.linear",
}
JOINT = {
    "joint_blocks_{}_x_block_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "joint_blocks_{}_x_block_attn2_qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "joint_blocks_{}_context_block_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "joint_blocks_{}_x_block_attn_proj": "attn.to_out.0",
    "joint_blocks_{}_x_block_attn2_proj": "attn2.to_out.0",
    "joint_blocks_{}_context_block_attn_proj": "attn.to_add_out",
    "joint_blocks_{}_x_block_mlp_fc1": "ff.net.0.proj",
    "joint_blocks_{}_x_block_mlp_fc2": "ff.net.2",
    "joint_blocks_{}_context_block_mlp_fc1": "ff_context.net.0.proj",
    "joint_blocks_{}_context_block_mlp_fc2": "ff_context.net.2",
    "joint_blocks_{}_x_block_adaLN_modulation_1": "norm1.linear",
    "joint_blocks_{}_context_block_adaLN_modulation_1": "norm1_context.linear",
}
PLACES = {  # of SDXL's transformers
    "down_blocks_1_attentions_0": "input_blocks_4_1", "down_blocks_1_attentions_1": "input_blocks_5_1",
    "down_blocks_2_attentions_0": "input_blocks_7_1", "down_blocks_2_attentions_1": "input_blocks_8_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_0_attentions_0": "output_blocks_0_1", "up_blocks_0_attentions_1": "output_blocks_1_1",
    "up_blocks_0_attentions_2": "output_blocks_2_1", "up_blocks_1_attentions_0": "output_blocks_3_1",
    "up_blocks_1_attentions_1": "output_blocks_4_1", "up_blocks_1_attentions_2": "output_blocks_5_1",
}  # fmt: skip


class Named(torch.nn.Module):
    """A CLIP encoder whose layers have the names that sd-scripts' version of transformers gives them."""

    def __init__(self, short):
        super().__init__()
        layers, width, wide = CLIPS[short]
        config = transformers.CLIPTextConfig(
            hidden_size=width, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=width // 64
        )
        with torch.device("meta"):
            model = transformers.CLIPTextModel(config)
        self.text_model = getattr(model, "text_model", model)


def sd_scripts_names(base, modules):
    """Its name → the modules of diffusers, in the order of the rows, and whether the halves of these are swapped."""
    name, found = VARIANTS[base][0], {}
    for component, short in trainable_encoders(name).items():
        for module in (m for m in modules if m.startswith(f"{component}.")):
            found[f"lora_{short}_{module.partition('.')[2].replace('.', '_')}"] = ([module], False)
    if name == "sdxl":
        for module in (m for m in modules if m.startswith("unet.")):
            flat = module.removeprefix("unet.").replace(".", "_")
            start = next(p for p in PLACES if flat.startswith(f"{p}_"))
            found[f"lora_unet_{PLACES[start]}{flat.removeprefix(start)}"] = ([module], False)
        return found
    config = VARIANTS[base][1]
    tables = [(JOINT, "transformer_blocks", config["num_layers"])]
    if name == "flux":
        tables = [(DOUBLE, "transformer_blocks", 19), (SINGLE, "single_transformer_blocks", 38)]
    for table, start, count in tables:
        for block in range(count):
            for theirs, ours in table.items():
                names = [f"transformer.{start}.{block}.{end}" for end in ours.split()]
                swapped = theirs.endswith("context_block_adaLN_modulation_1") and block == count - 1
                if any(n in modules for n in names):
                    found[f"lora_unet_{theirs.replace('{}', str(block))}"] = (names, swapped)
    return found


def sd_scripts_network(base, tensors):
    """Its network of a file, on its own model on the device "meta"."""
    from library import flux_models, sd3_models, sdxl_original_unet
    from networks import lora, lora_flux, lora_sd3

    name, config = VARIANTS[base]
    clips = [Named(short) for short in trainable_encoders(name).values()]
    with torch.device("meta"):
        if name == "flux":
            theirs = lora_flux
            model = flux_models.Flux(
                flux_models.FluxParams(64, 20, 24, 16, 4.0, 2, 19, 38, [2, 2, 4], 10_000, True, True)
            )
            clips.append(None)
        elif name == "sd3":
            theirs, size = lora_sd3, config["pos_embed_max_size"]
            dual, norm = list(config.get("dual_attention_layers", ())), "rms" if "qk_norm" in config else None
            width = config["caption_projection_dim"]
            model = sd3_models.create_sd3_mmdit(
                sd3_models.SD3Params(2, config["num_layers"], size**2, size, 2048, norm, dual, 4096, width, base)
            )
            clips.append(None)
        else:
            theirs, model = lora, sdxl_original_unet.SdxlUNet2DConditionModel()
    network, _ = theirs.create_network_from_weights(
        1.0, None, None, clips, model, weights_sd=tensors, for_inference=True
    )
    network.apply_to(clips, model, True, True)
    return network


@pytest.mark.parametrize("base", BASES)
def test_sd_scripts_reads_every_key_and_adds_what_was_trained(monkeypatch, base):
    checkout(monkeypatch, "KILN_SD_SCRIPTS")
    modules = adapters(base, narrow=base == "flux-dev")  # its SDXL has one width
    tensors = convert.to_file(modules, "kohya", VARIANTS[base][0]).tensors
    network = sd_scripts_network(base, tensors)
    found = network.load_state_dict(tensors, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    theirs, ours = {m.lora_name: m for m in network.unet_loras + network.text_encoder_loras}, examples(modules)
    names = sd_scripts_names(base, modules)
    assert theirs.keys() == names.keys()
    compared = set()
    for name, (parts, swapped) in names.items():
        if not ours.keys() & set(parts):
            continue
        got = theirs[name].get_weight()
        if swapped:
            got = torch.cat(got.chunk(2)[::-1])
        for part, rows in zip(parts, got.split([len(modules[p].up) for p in parts]), strict=True):
            close(rows, modules[part], part)
        compared |= set(parts)
    assert ours.keys() <= compared
