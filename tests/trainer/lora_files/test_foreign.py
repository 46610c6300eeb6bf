"""LoRA files as other trainers write them: literal keys, the arithmetic written out, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from safetensors.torch import save_file

from trainer.lora_files import contents, convert, inspect, numbers
from trainer.storage import safetensors_header

WIDTH = 8


def pair(stem: str, *, down: str = ".lora_down.weight", up: str = ".lora_up.weight", rows: int = WIDTH):
    """Random matrices of rank 2 under `stem`."""
    torch.manual_seed(len(stem))
    return {stem + down: torch.randn(2, WIDTH), stem + up: torch.randn(rows, 2)}


def read_both(tensors, family, path, metadata=None):
    """The modules as the tools read them, and the summary of the planner."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return convert.load(path, family), inspect.summarize(safetensors_header.read_header(path), family)


PEFT = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
LINEAR = {"down": ".lora_linear_layer.down.weight", "up": ".lora_linear_layer.up.weight"}
T5 = "text_encoder_2.encoder.block.3.layer.0.SelfAttention.q"
SINGLE = "transformer.single_transformer_blocks"
TO_Q = "transformer.transformer_blocks.0.attn.to_q"
CLIP_FC1 = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
UNET_TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("family", "stem", "module", "endings"),
    [
        # OneTrainer: Flux' T5 is its second encoder; OMI names number q, k and v
        ("flux", "lora_te2_encoder_block_3_layer_0_SelfAttention_q", T5, {}),
        ("sd3", "lora_te3_encoder_block_3_layer_0_SelfAttention_q", T5.replace("_2", "_3"), {}),
        ("flux", "lora_transformer_transformer_blocks_0_attn_to_q", TO_Q, {}),
        ("flux", "transformer.double_blocks.0.img_attn.qkv.0", TO_Q, {}),
        ("flux", "transformer.double_blocks.0.txt_attn.qkv.2", TO_Q.replace("to_q", "add_v_proj"), {}),
        ("flux", "transformer.single_blocks.7.linear1.1", f"{SINGLE}.7.attn.to_k", {}),
        ("flux", "transformer.single_blocks.7.modulation.lin", f"{SINGLE}.7.norm.linear", {}),
        ("flux", "transformer.img_in.proj", "transformer.x_embedder", {}),
        ("flux", "clip_l.text_model.encoder.layers.1.mlp.fc1", CLIP_FC1, {}),
        ("flux", "t5.encoder.block.3.layer.0.SelfAttention.q", T5, {}),
        ("sd3", "transformer.joint_blocks.0.x_block.attn2.qkv.0", TO_Q.replace("attn.", "attn2."), {}),
        ("sd3", "clip_g.text_model.encoder.layers.1.mlp.fc1", CLIP_FC1.replace("encoder", "encoder_2", 1), {}),
        ("sdxl", "unet.input_blocks.4.1.transformer_blocks.0.attn1.to_q", UNET_TO_Q, {}),
        # the projections after the pooled output
        ("sdxl", "lora_te2_text_projection", "text_encoder_2.text_projection", {}),
        ("sdxl", "clip_g.text_projection", "text_encoder_2.text_projection", {}),
        ("sdxl", "text_encoder_2.text_projection", "text_encoder_2.text_projection", PEFT),
        # PEFT's own saves
        ("flux", "base_model.model.transformer_blocks.0.attn.to_q", TO_Q, PEFT),
        ("flux", "base_model.model.transformer.transformer_blocks.0.attn.to_q", TO_Q, PEFT),
        ("flux", "transformer.base_model.model.transformer_blocks.0.attn.to_q", TO_Q, PEFT),
        ("sdxl", "unet.base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", UNET_TO_Q, PEFT),
        ("sdxl", "text_encoder.base_model.model.text_model.encoder.layers.1.mlp.fc1", CLIP_FC1, PEFT),
        ("flux", "transformer_blocks.0.attn.to_q", TO_Q, {"down": ".lora_A.x.weight", "up": ".lora_B.x.weight"}),
        # ai-toolkit, SimpleTuner, musubi-tuner, the Civitai trainer
        ("flux", f"{SINGLE}.0.proj_mlp", f"{SINGLE}.0.proj_mlp", PEFT),
        ("flux", "lora_unet_single_blocks_0_linear2", f"{SINGLE}.0.proj_out", {}),
        ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", UNET_TO_Q, {}),
        ("flux", "diffusion_model.double_blocks.0.img_attn.proj", TO_Q.replace("to_q", "to_out.0"), PEFT),
        ("flux", "model.diffusion_model.double_blocks.0.img_attn.proj", TO_Q.replace("to_q", "to_out.0"), PEFT),
        # diffusers before PEFT
        ("sdxl", "text_encoder.text_model.encoder.layers.1.mlp.fc1", CLIP_FC1, LINEAR),
        (
            "sdxl",
            "text_encoder.text_model.encoder.layers.1.self_attn.to_q",
            CLIP_FC1.replace("mlp.fc1", "self_attn.q_proj"),
            {"down": "_lora.down.weight", "up": "_lora.up.weight"},
        ),
    ],
)  # fmt: skip
def test_a_layer_of_another_trainer_is_read_with_its_alpha(tmp_path, family, stem, module, endings):
    tensors = pair(stem, **endings)
    down, up = tensors.values()
    modules, summary = read_both(tensors | {f"{stem}.alpha": torch.tensor(3.0)}, family, tmp_path / "x.safetensors")
    assert list(modules) == list(summary.modules) == [module]
    torch.testing.assert_close(modules[module].delta(), 1.5 * up @ down)
    assert summary.alphas == (3.0,) and summary.rank(()) == 2


def test_xlabs_files_are_read_as_diffusers_reads_them(tmp_path):
    tensors = {}
    for stem, rows, columns in (
        ("double_blocks.0.processor.qkv_lora1", 24, 8),
        ("double_blocks.0.processor.qkv_lora2", 24, 8),
        ("double_blocks.0.processor.proj_lora1", 8, 8),
        ("double_blocks.11.processor.proj_lora2", 8, 8),
        ("single_blocks.3.processor.qkv_lora", 24, 8),
        ("single_blocks.3.processor.proj_lora", 8, 40),
    ):
        tensors[f"{stem}.down.weight"] = torch.randn(2, columns)
        tensors[f"{stem}.up.weight"] = torch.randn(rows, 2)
    modules, summary = read_both(tensors, "flux", tmp_path / "x.safetensors")
    expected = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    assert {f"{name}.lora_A.weight" for name in modules} == {key for key in expected if "lora_A" in key}
    assert summary.modules.keys() == modules.keys() and len(modules) == 12
    for name, weights in modules.items():
        delta = expected[f"{name}.lora_B.weight"] @ expected[f"{name}.lora_A.weight"]
        torch.testing.assert_close(weights.delta(), delta)


def test_a_locon_whose_rank_is_factorised_is_read(tmp_path):
    """W[o, i] = alpha / r * sum over a, b of up[o, a] mid[a, b] down[b, i], for each place of the kernel."""
    stem = "lora_unet_input_blocks_1_0_in_layers_2"
    up, mid, down = torch.randn(6, 3, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(3, 5, 1, 1)
    tensors = {
        f"{stem}.lora_up.weight": up,
        f"{stem}.lora_mid.weight": mid,
        f"{stem}.lora_down.weight": down,
        f"{stem}.alpha": torch.tensor(1.0),
    }
    modules, summary = read_both(tensors, "sdxl", tmp_path / "x.safetensors")
    expected = torch.zeros(6, 5, 3, 3)
    for a in range(3):
        for b in range(3):
            expected += torch.outer(up[:, a].flatten(), down[b].flatten())[:, :, None, None] * mid[a, b]
    torch.testing.assert_close(modules["unet.down_blocks.0.resnets.0.conv1"].delta(), expected / 3)
    assert summary.sides["unet.down_blocks.0.resnets.0.conv1"] == (6, 5, 3, 3)


def test_a_linear_layer_that_is_stored_as_a_convolution_is_the_same(tmp_path):
    from trainer.sample import apply_loras

    stem = "lora_unet_input_blocks_4_1_proj_in"
    down, up = torch.randn(2, 8, 1, 1), torch.randn(8, 2, 1, 1)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    modules, _ = read_both(tensors, "sdxl", tmp_path / "x.safetensors")
    linear = torch.nn.Linear(8, 8)
    before = linear.weight.detach().clone()
    apply_loras(
        torch.nn.ModuleDict({"layer": linear}), [({"unet.layer": next(iter(modules.values()))}, 1.0)], component="unet"
    )
    torch.testing.assert_close(linear.weight.detach(), before + up.flatten(1) @ down.flatten(1))


def test_the_alpha_of_a_peft_save_is_in_the_file_beside_it(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "use_rslora": False}))
    tensors = pair("base_model.model.transformer_blocks.0.attn.to_q", **PEFT)
    modules, _ = read_both(tensors, "flux", path)
    assert modules[TO_Q].scale == 3.0


# ---- what is refused

LORA = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.mark.parametrize(
    ("family", "keys", "what"),
    [
        ("sdxl", ["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"], "a LoHa of LyCORIS"),
        ("flux", ["lycoris_transformer_blocks_0_attn_to_q.lokr_w1"], "a LoKr of LyCORIS"),
        ("flux", ["diffusion_model.double_blocks.0.img_attn.proj.lokr_w2_a"], "a LoKr of LyCORIS"),
        ("sdxl", ["lora_unet_mid_block_attentions_0_proj_in.on_input"], "an (IA)³"),
        ("sdxl", ["lora_unet_mid_block_attentions_0_proj_in.oft_blocks"], "an OFT"),
        ("flux", ["transformer.transformer_blocks.0.attn.to_q.oft_R.weight"], "an OFT"),
        ("sdxl", ["lora_unet_mid_block_attentions_0_proj_in.a1.weight"], "a GLoRA"),
        ("sdxl", ["lora_unet_mid_block_attentions_0_proj_in.diff"], "whole differences"),
        ("flux", ["double_blocks.0.img_attn.qkv.lora_A.weight", "double_blocks.0.img_attn.qkv.lora_B.bias"], "biases"),
        ("flux", [f"{LORA}.lora_down.weight", "bundle_emb.zot.clip_l"], "--without-embeddings"),
        ("sdxl", ["lora_controlnet", "input_blocks.1.0.in_layers.2.up"], "a ControlNet-LoRA"),
        ("sdxl", ["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight"], "a ControlNet-LLLite"),
        ("sdxl", ["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        ("flux", ["controlnet_x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"], "a ControlNet"),
        ("sdxl", ["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"], "an IP-Adapter"),
        ("sdxl", ["clip_g", "clip_l"], "an embedding"),
        ("flux", ["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.bias"], "MODEL_PATH"),
        (
            "sdxl",
            ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"],
            "a VAE",
        ),
        ("flux", ["lora_unet_blocks_0_self_attn_q.lora_down.weight"], "a LoRA for Wan"),
        (
            "flux",
            ["transformer.transformer_blocks.0.img_mlp.net.0.proj.lora_A.weight"],
            "it looks like a LoRA for qwen_image, and flux is needed",
        ),
        (
            "flux",
            ["lora_unet_blocks_0_attn_wq.lora_down.weight"],
            "it looks like a LoRA for krea2, and flux is needed",
        ),
        (
            "flux",
            ["diffusion_model.layers.0.attention.to_q.lora_A.weight"],
            "it looks like a LoRA for z_image, and flux is needed",
        ),
        (
            "flux",
            ["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight"],
            "it looks like a LoRA for flux2, and flux is needed",
        ),
        ("flux", ["lora_unet_distilled_guidance_layer_in_proj.lora_down.weight"], "a LoRA for Chroma"),
        ("flux", ["lora_unet_nothing.lora_down.weight"], "1 of its 1 tensors belong to no layer of flux"),
        ("flux", [f"{LORA}.lora_down.weight", "something else"], "belong to no layer of flux: something else"),
        ("sdxl", [f"{LORA}.lora_down.weight"], "it looks like a LoRA for flux, and sdxl is needed"),
    ],
)
def test_what_is_no_lora_of_this_family_is_named(tmp_path, family, keys, what):
    with pytest.raises(ValueError, match=what.replace("(", r"\(").replace(")", r"\)")) as caught:
        read_both({key: torch.ones(2, 2) for key in keys}, family, tmp_path / "x.safetensors")
    assert "Fix:" in str(caught.value) or "belong to no layer" in what


@pytest.mark.parametrize(
    ("width", "name"),
    [(768, "Stable Diffusion 1.5"), (1024, "Stable Diffusion 2")],
)
@pytest.mark.parametrize("block", ["lora_unet_down_blocks_0_attentions_0", "unet.down_blocks.0.attentions.0"])
def test_a_lora_of_an_older_unet_is_named_by_the_width_of_its_text(tmp_path, width, name, block):
    dot = "." if "." in block else "_"
    stem = dot.join([block, "transformer_blocks", "0", "attn2", "to_k"])
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, width), f"{stem}.lora_up.weight": torch.ones(320, 2)}
    with pytest.raises(ValueError, match=f"it is a LoRA for {name}, and sdxl is needed"):
        read_both(tensors, "sdxl", tmp_path / "x.safetensors")


def broken(key, change):
    """A small file of one layer, with one tensor changed; None: left out."""
    tensors = {
        f"{LORA}.lora_down.weight": torch.randn(2, 8),
        f"{LORA}.lora_up.weight": torch.randn(8, 2),
        f"{LORA}.alpha": torch.tensor(2.0),
    }
    name = f"{LORA}.{key}"
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    return tensors


def with_value(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.flatten()[-1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("lora_up.weight", with_value(float("nan")), "img_attn_proj.lora_up.weight first"),
        ("lora_up.weight", with_value(float("-inf")), "1 of its 3 tensors are not finite"),
        ("lora_down.weight", lambda t: with_value(float("nan"))(t).bfloat16(), "img_attn_proj.lora_down.weight first"),
        ("lora_down.weight", lambda t: with_value(float("inf"))(t).half(), "not finite"),
        ("lora_down.weight", lambda t: with_value(float("nan"))(t).to(torch.float8_e4m3fn), "not finite"),
        ("lora_down.weight", lambda t: with_value(float("inf"))(t).to(torch.float8_e5m2), "not finite"),
        ("lora_down.weight", lambda t: with_value(1e300)(t.double()), "not finite"),
        ("alpha", lambda t: t * 0, r"img_attn_proj.alpha: alpha is 0"),
        ("alpha", lambda t: (t * 0).bfloat16(), "alpha is 0"),
        ("alpha", lambda _: torch.tensor(0), "alpha is 0"),
        ("alpha", lambda t: t * float("nan"), "img_attn_proj.alpha first"),
        ("alpha", lambda _: torch.ones(2), "alpha has the shape .2., and an alpha is one number"),
        ("alpha", lambda _: torch.zeros(0), "alpha is empty"),
        ("lora_up.weight", None, "img_attn_proj has no up matrix"),
        ("lora_down.weight", None, "img_attn_proj has no down matrix"),
        ("lora_up.weight", lambda _: torch.ones(8, 3), "down .2, 8. and up .8, 3. do not match"),
        ("lora_up.weight", lambda _: torch.ones(8), "do not match"),
        ("lora_up.weight", lambda _: torch.ones(0, 2), "lora_up.weight is empty"),
        ("lora_down.weight", lambda _: torch.ones(0, 8), "lora_down.weight is empty"),
        ("lora_down.weight", lambda t: t.to(torch.int8), "lora_down.weight is of type I8"),
        ("lora_down.weight", lambda t: t > 0, "lora_down.weight is of type BOOL"),
        ("dora_scale", lambda _: torch.ones(1, 8), "dora_scale has DoRA magnitudes of columns"),
        ("dora_scale", lambda _: torch.ones(3, 1), "dora_scale has DoRA magnitudes of shape .3, 1."),
    ],
)
def test_the_planner_and_the_tools_refuse_the_same_values_with_the_same_words(tmp_path, key, change, words):
    path = tmp_path / "x.safetensors"
    save_file(broken(key, change), path)
    with pytest.raises(ValueError, match=words) as by_planner:
        inspect.summarize(safetensors_header.read_header(path), "flux")
    with pytest.raises(ValueError, match=words) as by_tools:
        convert.load(path, "flux")
    assert str(by_planner.value) == str(by_tools.value)


@pytest.mark.parametrize(
    ("key", "change", "scale"),
    [
        ("alpha", lambda t: -t, -1.0),  # as every tool reads it
        ("alpha", None, 1.0),
        ("alpha", lambda t: t.view(1, 1), 1.0),
        ("alpha", lambda _: torch.tensor(4), 2.0),
        ("alpha", lambda _: torch.tensor(4, dtype=torch.uint8), 2.0),
        ("alpha", lambda t: t.to(torch.float8_e4m3fn), 1.0),
        ("lora_down.weight", lambda t: t.double(), 1.0),
        ("lora_down.weight", lambda t: t.bfloat16(), 1.0),
        ("lora_down.weight", lambda t: t.to(torch.float8_e4m3fn), 1.0),
        ("lora_up.weight", lambda t: t.to(torch.float8_e5m2), 1.0),
    ],
)
def test_other_types_and_alphas_are_read(tmp_path, key, change, scale):
    tensors = broken(key, change)
    modules, summary = read_both(tensors, "flux", tmp_path / "x.safetensors")
    down, up = (tensors[f"{LORA}.lora_{side}.weight"].float() for side in ("down", "up"))
    torch.testing.assert_close(modules["transformer.transformer_blocks.0.attn.to_out.0"].delta(), scale * up @ down)
    assert summary.alphas == (() if change is None else (scale * 2,))


def test_a_layer_of_another_width_is_named(tmp_path):
    """FLUX.2 has layers of the same names: its linear1 has nine parts, not seven."""
    tensors = pair("lora_unet_single_blocks_0_linear1", rows=9 * WIDTH)
    with pytest.raises(ValueError, match="it looks like a LoRA for flux2, and flux is needed"):
        read_both(tensors, "flux", tmp_path / "x.safetensors")
    tensors = pair("lora_unet_double_blocks_0_img_attn_qkv", rows=3 * WIDTH + 3)
    with pytest.raises(ValueError, match=r"double_blocks_0_img_attn_qkv changes a weight of \[27, 8\]"):
        read_both(tensors, "flux", tmp_path / "x.safetensors")


def raw_file(path: Path, entries, data: bytes) -> Path:
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def f32(shape, begin, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("entries", "size", "words"),
    [
        ({"a": f32([2], 0, 8)}, 15, "7 bytes after its last tensor"),
        ({"a": f32([2], 0, 8), "b": f32([2], 4, 12)}, 12, "tensors a and b overlap"),
        ({"a": f32([2], 0, 8), "b": f32([2], 0, 8)}, 8, "overlap"),
        ({"a": f32([2], 0, 8), "b": f32([2], 12, 20)}, 20, "4 bytes before its tensor b"),
        ({"a": f32([3], 0, 8)}, 8, r"a has 8 bytes, and \[3\] of F32 take 12"),
        ({"a": {**f32([2], 0, 8), "dtype": "F99"}}, 8, "a is of the unknown type F99"),
        ({"a": f32([2], 0, 8)}, 4, "cut off"),
        ({"a": f32([2], 8, 0)}, 8, "a has no place in the file"),
        ({"a": {**f32([2], 0, 8), "dtype": 7}}, 8, "header is damaged"),
        ({"__metadata__": {"x": 1}, "a": f32([2], 0, 8)}, 8, "header is damaged"),
        ({"__metadata__": [], "a": f32([2], 0, 8)}, 8, "header is damaged"),
    ],
)
def test_a_file_whose_tensors_do_not_fill_it_is_refused_with_the_tensor(tmp_path, entries, size, words):
    path = raw_file(tmp_path / "x.safetensors", entries, bytes(size))
    with pytest.raises(ValueError, match=words):
        safetensors_header.check_layout(safetensors_header.read_header(path))
    with pytest.raises(ValueError, match=words):
        convert.load(path, "flux")


@pytest.mark.parametrize(
    "settings",
    [
        *("[]", "{", '{"lora_alpha": "x"}', '{"lora_alpha": 0}', '{"lora_alpha": NaN}'),
        *('{"alpha_pattern": [1]}', '{"alpha_pattern": {"(": 1}}'),
    ],
)
def test_damaged_settings_in_the_header_are_refused(tmp_path, settings):
    path = tmp_path / "x.safetensors"
    save_file(pair(TO_Q, **PEFT), path, {"lora_adapter_metadata": settings})
    for read in (convert.load, lambda file, family: inspect.summarize(safetensors_header.read_header(file), family)):
        with pytest.raises(ValueError, match="lora_adapter_metadata"):
            read(path, "flux")


@pytest.mark.parametrize("byte", range(256))
def test_8_bit_floats_are_decoded_as_torch_does(byte, tmp_path):
    raw = torch.tensor([byte], dtype=torch.uint8)
    for name, dtype in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        expected = raw.view(dtype).float()
        bits = np.array([byte], np.uint8)
        assert numbers.is_finite(bits, name) == bool(torch.isfinite(expected).all())
        assert bool(numbers.nonzero(bits)[0]) == bool(expected.any()) or not torch.isfinite(expected).all()
        if torch.isfinite(expected).all():
            save_file({"x": raw.view(dtype)}, tmp_path / "x.safetensors")
            header = safetensors_header.read_header(tmp_path / "x.safetensors")
            assert numbers.scalar(header, header.entries["x"]) == expected.item()


def test_two_adapters_in_one_file_are_refused():
    tensors = pair("transformer.transformer_blocks.0.attn.to_q", **PEFT)
    tensors |= pair(
        "transformer.transformer_blocks.0.attn.to_q", down=".lora_A.second.weight", up=".lora_B.second.weight"
    )
    with pytest.raises(ValueError, match="twice"):
        contents.assemble({key: tuple(tensor.shape) for key, tensor in tensors.items()}, "flux", {})
