"""LoRA files against tables written by hand: what sd-scripts, ComfyUI, Forge, ai-toolkit and OneTrainer call a layer.

These tools' loaders run in tests/trainer/test_tools.py, for whoever has their checkouts. Here are the names that they
look for, copied from what they read and write, and the arithmetic of their loaders in numpy: alpha / rank * up @ down,
added to the rows of the original layer. Nothing of Kiln reads a file here that Kiln has written.
"""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import swap_scale_shift
from safetensors import safe_open

from tests.support.variants import VARIANTS, shape
from trainer.lora_files import convert
from trainer.lora_files.weights import LoraWeights
from trainer.lora_files.write import write_lora
from trainer.spec.family import get_family

# diffusers' layers, one above the other, with their rows' share | the original layer, as ComfyUI and OMI write it.
FLUX = """
transformer_blocks.{}.attn.to_q 1 attn.to_k 1 attn.to_v 1 | double_blocks.{}.img_attn.qkv
transformer_blocks.{}.attn.add_q_proj 1 attn.add_k_proj 1 attn.add_v_proj 1 | double_blocks.{}.txt_attn.qkv
transformer_blocks.{}.attn.to_out.0 1 | double_blocks.{}.img_attn.proj
transformer_blocks.{}.attn.to_add_out 1 | double_blocks.{}.txt_attn.proj
transformer_blocks.{}.ff.net.0.proj 4 | double_blocks.{}.img_mlp.0
transformer_blocks.{}.ff.net.2 1 | double_blocks.{}.img_mlp.2
transformer_blocks.{}.ff_context.net.0.proj 4 | double_blocks.{}.txt_mlp.0
transformer_blocks.{}.ff_context.net.2 1 | double_blocks.{}.txt_mlp.2
transformer_blocks.{}.norm1.linear 6 | double_blocks.{}.img_mod.lin
transformer_blocks.{}.norm1_context.linear 6 | double_blocks.{}.txt_mod.lin
single_transformer_blocks.{}.attn.to_q 1 attn.to_k 1 attn.to_v 1 proj_mlp 4 | single_blocks.{}.linear1
single_transformer_blocks.{}.proj_out 1 | single_blocks.{}.linear2
single_transformer_blocks.{}.norm.linear 3 | single_blocks.{}.modulation.lin
"""
FLUX_OUTSIDE = """
x_embedder 1 | img_in
context_embedder 1 | txt_in
time_text_embed.timestep_embedder.linear_1 1 | time_in.in_layer
time_text_embed.timestep_embedder.linear_2 1 | time_in.out_layer
time_text_embed.text_embedder.linear_1 1 | vector_in.in_layer
time_text_embed.text_embedder.linear_2 1 | vector_in.out_layer
time_text_embed.guidance_embedder.linear_1 1 | guidance_in.in_layer
time_text_embed.guidance_embedder.linear_2 1 | guidance_in.out_layer
norm_out.linear 2 | final_layer.adaLN_modulation.1
proj_out 1 | final_layer.linear
"""
SD3 = """
transformer_blocks.{}.attn.to_q 1 attn.to_k 1 attn.to_v 1 | joint_blocks.{}.x_block.attn.qkv
transformer_blocks.{}.attn2.to_q 1 attn2.to_k 1 attn2.to_v 1 | joint_blocks.{}.x_block.attn2.qkv
transformer_blocks.{}.attn.add_q_proj 1 attn.add_k_proj 1 attn.add_v_proj 1 | joint_blocks.{}.context_block.attn.qkv
transformer_blocks.{}.attn.to_out.0 1 | joint_blocks.{}.x_block.attn.proj
transformer_blocks.{}.attn2.to_out.0 1 | joint_blocks.{}.x_block.attn2.proj
transformer_blocks.{}.attn.to_add_out 1 | joint_blocks.{}.context_block.attn.proj
transformer_blocks.{}.ff.net.0.proj 4 | joint_blocks.{}.x_block.mlp.fc1
transformer_blocks.{}.ff.net.2 1 | joint_blocks.{}.x_block.mlp.fc2
transformer_blocks.{}.ff_context.net.0.proj 4 | joint_blocks.{}.context_block.mlp.fc1
transformer_blocks.{}.ff_context.net.2 1 | joint_blocks.{}.context_block.mlp.fc2
transformer_blocks.{}.norm1.linear 6 | joint_blocks.{}.x_block.adaLN_modulation.1
transformer_blocks.{}.norm1_context.linear 6 | joint_blocks.{}.context_block.adaLN_modulation.1
"""
SD3_OUTSIDE = """
context_embedder 1 | context_embedder
time_text_embed.timestep_embedder.linear_1 1 | t_embedder.mlp.0
time_text_embed.timestep_embedder.linear_2 1 | t_embedder.mlp.2
time_text_embed.text_embedder.linear_1 1 | y_embedder.mlp.0
time_text_embed.text_embedder.linear_2 1 | y_embedder.mlp.2
norm_out.linear 2 | final_layer.adaLN_modulation.1
proj_out 1 | final_layer.linear
"""
# diffusers' transformer, its original name, and its number of blocks.
SDXL_TRANSFORMERS = """
down_blocks.1.attentions.0 input_blocks.4.1 2
down_blocks.1.attentions.1 input_blocks.5.1 2
down_blocks.2.attentions.0 input_blocks.7.1 10
down_blocks.2.attentions.1 input_blocks.8.1 10
mid_block.attentions.0 middle_block.1 10
up_blocks.0.attentions.0 output_blocks.0.1 10
up_blocks.0.attentions.1 output_blocks.1.1 10
up_blocks.0.attentions.2 output_blocks.2.1 10
up_blocks.1.attentions.0 output_blocks.3.1 2
up_blocks.1.attentions.1 output_blocks.4.1 2
up_blocks.1.attentions.2 output_blocks.5.1 2
"""
SDXL_LAYERS = (
    "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0 ff.net.0.proj "
    "ff.net.2"
)
SDXL_OUTSIDE = """
conv_in 1 | input_blocks.0.0
down_blocks.0.resnets.0.conv1 1 | input_blocks.1.0.in_layers.2
down_blocks.0.resnets.1.conv2 1 | input_blocks.2.0.out_layers.3
down_blocks.0.downsamplers.0.conv 1 | input_blocks.3.0.op
down_blocks.1.resnets.0.conv_shortcut 1 | input_blocks.4.0.skip_connection
down_blocks.1.resnets.1.time_emb_proj 1 | input_blocks.5.0.emb_layers.1
down_blocks.1.downsamplers.0.conv 1 | input_blocks.6.0.op
down_blocks.2.resnets.0.conv1 1 | input_blocks.7.0.in_layers.2
down_blocks.2.resnets.1.conv1 1 | input_blocks.8.0.in_layers.2
mid_block.resnets.0.conv1 1 | middle_block.0.in_layers.2
mid_block.resnets.1.conv2 1 | middle_block.2.out_layers.3
up_blocks.0.resnets.0.conv1 1 | output_blocks.0.0.in_layers.2
up_blocks.0.resnets.1.conv1 1 | output_blocks.1.0.in_layers.2
up_blocks.0.resnets.2.conv1 1 | output_blocks.2.0.in_layers.2
up_blocks.0.upsamplers.0.conv 1 | output_blocks.2.2.conv
up_blocks.1.resnets.0.conv_shortcut 1 | output_blocks.3.0.skip_connection
up_blocks.1.resnets.1.conv1 1 | output_blocks.4.0.in_layers.2
up_blocks.1.resnets.2.conv1 1 | output_blocks.5.0.in_layers.2
up_blocks.1.upsamplers.0.conv 1 | output_blocks.5.2.conv
up_blocks.2.resnets.0.conv1 1 | output_blocks.6.0.in_layers.2
up_blocks.2.resnets.1.time_emb_proj 1 | output_blocks.7.0.emb_layers.1
up_blocks.2.resnets.2.conv2 1 | output_blocks.8.0.out_layers.3
time_embedding.linear_1 1 | time_embed.0
time_embedding.linear_2 1 | time_embed.2
add_embedding.linear_1 1 | label_emb.0.0
add_embedding.linear_2 1 | label_emb.0.2
conv_out 1 | out.2
"""
BASES = ("flux-dev", "flux-schnell", "sdxl-base", "sd3-medium", "sd3.5-medium", "sd3.5-large")
DEPTHS = {"transformer_blocks": 19, "single_transformer_blocks": 38}
SD3_DEPTHS = {"sd3-medium": 24, "sd3.5-medium": 24, "sd3.5-large": 38}
PREFIX = {"flux": "transformer", "sdxl": "unet", "sd3": "transformer"}
# What each family's files call the encoders: CLIP-L, CLIP-G, T5.
ENCODERS = {
    "flux": {"text_encoder": "lora_te1"},
    "sdxl": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    "sd3": {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
WIDTH, RANK = 6, 2


def lines(table):
    """Each line: [(diffusers' layer, its share of the rows)], the original layer."""
    for line in table.strip().splitlines():
        ours, _, original = line.partition(" | ")
        words = ours.split()
        start = words[0].partition("{}.")[0] + "{}." if "{}" in words[0] else ""
        names = [words[0], *(start + word for word in words[2::2])]
        yield list(zip(names, map(int, words[1::2]), strict=True)), original


def blocks(base):
    """The layers inside the blocks of a published model."""
    family = VARIANTS[base][0]
    found = []
    if family == "sdxl":
        for line in SDXL_TRANSFORMERS.strip().splitlines():
            ours, original, depth = line.split()
            found += [([(f"{ours}.{end}", 1)], f"{original}.{end}") for end in ("proj_in", "proj_out")]
            for i in range(int(depth)):
                for end in SDXL_LAYERS.split():
                    path = f"transformer_blocks.{i}.{end}"
                    found.append(([(f"{ours}.{path}", 1)], f"{original}.{path}"))
        return found
    for names, original in lines(FLUX if family == "flux" else SD3):
        kind = names[0][0].partition(".")[0]
        for i in range(DEPTHS[kind] if family == "flux" else SD3_DEPTHS[base]):
            found.append(([(name.format(i), share) for name, share in names], original.format(i)))
    return found


def has(base, original):
    """Whether a published SD3 has this layer: only the first 13 blocks of 3.5 medium attend twice, and the last block
    of each has no text of its own to go on with."""
    number = re.search(r"joint_blocks\.(\d+)\.", original)
    if not number:
        return True
    if ".attn2." in original:
        return base == "sd3.5-medium" and int(number[1]) < 13
    is_last = int(number[1]) == SD3_DEPTHS[base] - 1
    return not (is_last and (".context_block.mlp." in original or ".context_block.attn.proj" in original))


def made(names, rng, *, shared=False, swapped=False):
    """Modules for the parts of a layer, each with a scale of its own; `shared`: with one down matrix."""
    down = rng.normal(size=(RANK, WIDTH))
    modules = {}
    for number, (name, share) in enumerate(names):
        own = down if shared or not number else rng.normal(size=(RANK, WIDTH))
        up = rng.normal(size=(share * WIDTH, RANK))
        scale = 0.5 if shared or swapped else (0.5, 2.0, 0.25, 1.0)[number]
        modules[name] = LoraWeights(torch.tensor(own).float(), torch.tensor(up).float(), scale)
    return modules


def added(tensors, stem):
    """What a reader of kohya's keys adds to the original layer."""
    down, up = tensors[f"{stem}.lora_down.weight"].numpy(), tensors[f"{stem}.lora_up.weight"].numpy()
    alpha = tensors[f"{stem}.alpha"]
    assert alpha.shape == () and alpha.dtype == torch.float32
    return alpha.item() / down.shape[0] * (up @ down)


def product(weights):
    return weights.scale * (weights.up.double().numpy() @ weights.down.double().numpy())


@pytest.mark.parametrize("base", BASES)
def test_the_tables_have_every_linear_layer_of_the_published_blocks(base):
    model, family = shape(base, {}), VARIANTS[base][0]
    inside = tuple(f"{name}." for name, _ in get_family(family).blocks(model))
    layers = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(inside)}
    table = {name for names, original in blocks(base) if has(base, original) for name, _ in names}
    assert table == layers
    count = {"flux": 304, "sdxl": 722}.get(family)
    assert count is None or len(blocks(base)) == count


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("base", BASES)
def test_a_file_of_a_published_model_is_what_the_tools_look_for(base, shared):
    """kohya's keys (sd-scripts, ComfyUI, Forge, Flux and SDXL in diffusers), and ComfyUI's with dots."""
    family, rng = VARIANTS[base][0], np.random.default_rng(1)
    layers = [(names, original) for names, original in blocks(base) if has(base, original)]
    modules = {}
    for names, _ in layers:
        for name, weights in made(names, rng, shared=shared).items():
            modules[f"{PREFIX[family]}.{name}"] = weights
    kohya = convert.to_file(modules, "kohya", family)
    dotted = convert.to_file(modules, "comfyui", family)
    stems = {original: f"lora_unet_{original.replace('.', '_')}" for _, original in layers}
    ends = ("lora_down.weight", "lora_up.weight", "alpha")
    assert kohya.tensors.keys() == {f"{stem}.{end}" for stem in stems.values() for end in ends}
    assert dotted.tensors.keys() == {f"diffusion_model.{name}.{end}" for name in stems for end in ends}
    assert {tensor.dtype for tensor in kohya.tensors.values()} == {torch.float32}
    for names, original in layers:
        for got in (added(kohya.tensors, stems[original]), added(dotted.tensors, f"diffusion_model.{original}")):
            expected = np.concatenate([product(modules[f"{PREFIX[family]}.{name}"]) for name, _ in names])
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=original)
    rank = kohya.tensors[f"{stems[layers[0][1]]}.lora_down.weight"].shape[0]
    assert rank == (RANK if shared else RANK * len(layers[0][0]))
    # diffusers gives the commonest alpha of an SDXL file to layers that have another.
    assert len({t.item() for k, t in kohya.tensors.items() if k.endswith(".alpha")}) == 1


@pytest.mark.parametrize("base", BASES)
def test_diffusers_names_have_the_scale_in_the_second_matrix_and_no_alpha(base):
    family, rng = VARIANTS[base][0], np.random.default_rng(2)
    modules = {}
    for names, original in blocks(base):
        if has(base, original):
            modules |= {f"{PREFIX[family]}.{name}": weights for name, weights in made(names, rng).items()}
    tensors = convert.to_file(modules, "peft", family).tensors
    assert tensors.keys() == {f"{name}.lora_{x}.weight" for name in modules for x in "AB"}
    for name, weights in modules.items():
        got = tensors[f"{name}.lora_B.weight"].numpy() @ tensors[f"{name}.lora_A.weight"].numpy()
        np.testing.assert_allclose(got, product(weights), rtol=1e-4, atol=1e-5)


WRITERS = {  # who writes it → how a denoiser's layer begins, how its matrices end
    "sd-scripts": ("lora_unet_{original_}", ".lora_down.weight", ".lora_up.weight"),
    "ComfyUI": ("diffusion_model.{original}", ".lora_down.weight", ".lora_up.weight"),
    "ai-toolkit": ("{prefix}.{name}", ".lora_A.weight", ".lora_B.weight"),
    "OneTrainer": ("lora_{prefix}_{name_}", ".lora_down.weight", ".lora_up.weight"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("base", ["flux-dev", "sdxl-base", "sd3.5-medium"])
def test_what_a_tool_writes_has_the_matrices_of_its_layers(base, writer):
    """A file by hand, with an alpha for each layer: every layer gets alpha / rank * up @ down, in its rows."""
    family, rng = VARIANTS[base][0], np.random.default_rng(3)
    start, down_end, up_end = WRITERS[writer]
    tensors, expected = {}, {}
    for number, (names, original) in enumerate(blocks(base)):
        if not has(base, original):
            continue
        whole = "original" in start
        for group in [names] if whole else [[pair] for pair in names]:
            name, rows = group[0][0], WIDTH * sum(share for _, share in group)
            if family == "sdxl" and writer == "OneTrainer":
                start = "lora_unet_{name_}"
            stem = start.format(
                original=original, original_=original.replace(".", "_"), prefix=PREFIX[family], name=name,
                name_=name.replace(".", "_"),
            )  # fmt: skip
            alpha = (1.0, 0.5, 3.0)[number % 3]
            down, up = rng.normal(size=(RANK, WIDTH)), rng.normal(size=(rows, RANK))
            tensors |= {f"{stem}{down_end}": down, f"{stem}{up_end}": up, f"{stem}.alpha": np.array(alpha)}
            top = 0
            for part, share in group:
                bottom = top + share * WIDTH
                expected[f"{PREFIX[family]}.{part}"] = alpha / RANK * up[top:bottom] @ down
                top = bottom
    modules = convert.from_tensors({k: torch.tensor(v).float() for k, v in tensors.items()}, {}, family)
    assert modules.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(modules[name].delta().numpy(), delta, rtol=1e-4, atol=1e-5, err_msg=name)


OUTSIDE = [(family, *line) for family, table in (("flux", FLUX_OUTSIDE), ("sd3", SD3_OUTSIDE), ("sdxl", SDXL_OUTSIDE))
           for line in lines(table)]  # fmt: skip


@pytest.mark.parametrize(("family", "names", "original"), OUTSIDE, ids=[o[2] for o in OUTSIDE])
def test_layers_outside_the_blocks_and_convolutions_have_their_names(family, names, original):
    [(name, share)] = names
    rng = np.random.default_rng(4)
    is_conv = family == "sdxl" and ("conv" in name)
    kernel = (1, 1) if "conv_shortcut" in name else (3, 3)
    down = rng.normal(size=(RANK, WIDTH, *kernel) if is_conv else (RANK, WIDTH))
    up = rng.normal(size=(share * WIDTH, RANK, 1, 1) if is_conv else (share * WIDTH, RANK))
    weights = LoraWeights(torch.tensor(down).float(), torch.tensor(up).float(), 0.5)
    tensors = convert.to_file({f"{PREFIX[family]}.{name}": weights}, "kohya", family).tensors
    stem = f"lora_unet_{original.replace('.', '_')}"
    assert tensors.keys() == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    assert tensors[f"{stem}.lora_down.weight"].shape == down.shape
    assert tensors[f"{stem}.lora_up.weight"].shape == up.shape
    got = 0.5 * torch.einsum(
        "or,ri->oi", tensors[f"{stem}.lora_up.weight"].flatten(1), tensors[f"{stem}.lora_down.weight"].flatten(1)
    )
    expected = weights.delta().flatten(1)
    if original == "final_layer.adaLN_modulation.1":
        # diffusers' own: from the original's order, shift then scale, to scale then shift.
        got = swap_scale_shift(got, dim=None)
        assert not torch.allclose(swap_scale_shift(got, dim=None), expected)
    torch.testing.assert_close(got, expected)
    assert tensors[f"{stem}.alpha"].item() == 0.5 * RANK


@pytest.mark.parametrize("block", [0, 23])
def test_only_the_last_block_of_sd3_has_its_scale_and_shift_swapped(block):
    """The others have six parts, in the same order."""
    rng, parts = np.random.default_rng(5), 2 if block == 23 else 6
    name, original = f"transformer_blocks.{block}.norm1_context.linear", f"joint_blocks_{block}_context_block"
    modules = {f"transformer.{k}": v for k, v in made([(name, parts)], rng, swapped=True).items()}
    got = torch.tensor(
        added(convert.to_file(modules, "kohya", "sd3").tensors, f"lora_unet_{original}_adaLN_modulation_1")
    )
    expected = torch.tensor(product(modules[f"transformer.{name}"])).float()
    torch.testing.assert_close(swap_scale_shift(got, dim=None) if parts == 2 else got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "component"), [(f, c) for f, found in ENCODERS.items() for c in found])
def test_each_encoder_has_the_number_that_tools_give_it(family, component):
    """te1 is CLIP-L, te2 CLIP-G; the level text_model is always there, as ComfyUI needs it."""
    rng, start = np.random.default_rng(6), ENCODERS[family][component]
    ends = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
    for written in ("text_model.encoder.layers", "encoder.layers"):
        names = [(f"{component}.{written}.{i}.{end}", 1) for i in (0, 11) for end in ends]
        modules = {}
        for pair in names:
            modules |= made([pair], rng)
        tensors = convert.to_file(modules, "kohya", family).tensors
        stems = [f"{start}_text_model_encoder_layers_{i}_{end.replace('.', '_')}" for i in (0, 11) for end in ends]
        assert {key.partition(".")[0] for key in tensors} == set(stems)
        for (name, _), stem in zip(names, stems, strict=True):
            np.testing.assert_allclose(added(tensors, stem), product(modules[name]), rtol=1e-4, atol=1e-5)


READ = {  # a stem that a tool writes for an encoder → the module, by family
    "flux": {
        "lora_te1_text_model_encoder_layers_3_mlp_fc1": "text_encoder.text_model.encoder.layers.3.mlp.fc1",
        "lora_te2_encoder_block_5_layer_0_SelfAttention_q": "text_encoder_2.encoder.block.5.layer.0.SelfAttention.q",
        "lora_te3_encoder_block_5_layer_1_DenseReluDense_wo":
            "text_encoder_2.encoder.block.5.layer.1.DenseReluDense.wo",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj":
            "text_encoder.text_model.encoder.layers.1.self_attn.q_proj",
    },
    "sdxl": {
        "lora_te1_text_model_encoder_layers_3_mlp_fc1": "text_encoder.text_model.encoder.layers.3.mlp.fc1",
        "lora_te2_text_model_encoder_layers_31_self_attn_out_proj":
            "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc2":
            "text_encoder_2.text_model.encoder.layers.1.mlp.fc2",
    },
    "sd3": {
        "lora_te2_text_model_encoder_layers_31_mlp_fc1": "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
        "lora_te3_encoder_block_2_layer_0_SelfAttention_v": "text_encoder_3.encoder.block.2.layer.0.SelfAttention.v",
    },
}  # fmt: skip


@pytest.mark.parametrize(("family", "stem"), [(f, s) for f, stems in READ.items() for s in stems])
def test_a_stem_of_an_encoder_is_that_encoders(family, stem):
    down, up = torch.randn(RANK, WIDTH), torch.randn(WIDTH, RANK)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(3.0)}
    modules = convert.from_tensors(tensors, {}, family)
    assert list(modules) == [READ[family][stem]]
    torch.testing.assert_close(modules[READ[family][stem]].delta(), 3.0 / RANK * up @ down)


def test_the_magnitudes_of_dora_are_in_the_rows_order_and_shape(tmp_path):
    """ComfyUI's `dora_scale` is a column, above which lie the rows of q, k, v and the MLP; peft's is a row."""
    rng = np.random.default_rng(7)
    names = [(f"single_transformer_blocks.4.{end}", share) for end, share in
             (("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4))]  # fmt: skip
    modules = {}
    for number, (name, weights) in enumerate(made(names, rng, shared=True).items()):
        rows = weights.up.shape[0]
        modules[f"transformer.{name}"] = LoraWeights(weights.down, weights.up, 0.5, torch.arange(rows) + 100.0 * number)
    tensors = convert.to_file(modules, "kohya", "flux").tensors
    magnitudes = tensors["lora_unet_single_blocks_4_linear1.dora_scale"]
    assert magnitudes.shape == (7 * WIDTH, 1)
    expected = [*range(6), *range(100, 106), *range(200, 206), *range(300, 324)]
    assert magnitudes.flatten().tolist() == expected
    peft = convert.to_file(modules, "peft", "flux").tensors
    assert peft["transformer.single_transformer_blocks.4.attn.to_k.lora_magnitude_vector"].tolist() == expected[6:12]


def test_the_bytes_of_a_file_are_those_of_the_format(tmp_path):
    """Its header by hand: sizes in little-endian, offsets in order; and the library reads the same."""
    modules = {
        f"transformer.{k}": v for k, v in made([("transformer_blocks.0.ff.net.2", 1)], np.random.default_rng(8)).items()
    }
    written = convert.to_file(modules, "kohya", "flux")
    path = tmp_path / "x.safetensors"
    write_lora(path, written.tensors, {"ss_network_dim": "2", "ss_network_alpha": "1.0"})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    digest = hashlib.sha256(data[8 + size :]).hexdigest()
    asked = {"ss_network_dim": "2", "ss_network_alpha": "1.0"}
    about = header.pop("__metadata__")
    assert about == {**asked, "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    end = 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        assert first == end and entry["dtype"] == "F32"
        end = last
        values = np.frombuffer(data[8 + size + first : 8 + size + last], "<f4").reshape(entry["shape"])
        np.testing.assert_array_equal(values, written.tensors[key].numpy())
    assert len(data) == 8 + size + end
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(written.tensors)
