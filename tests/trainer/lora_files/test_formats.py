"""LoRA files of every tool, for every family: conversions are exact, and diffusers' own loader agrees.

test_tools.py runs the loaders of ComfyUI, Forge and sd-scripts.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import load_file, save_file

from trainer.engine import adapters
from trainer.lora_files import contents, convert, key_names, peft_bridge
from trainer.lora_files.weights import LoraWeights
from trainer.spec.family import get_family
from trainer.spec.weight_formats import SAVE_PRECISIONS
from trainer.storage import safetensors_header

FAMILIES = ("flux", "flux2", "sdxl", "sd3", "z_image", "qwen_image", "krea2")
CLIP = "text_encoder.text_model.encoder.layers.0"


def sdxl_of_two_layers():
    """SDXL's UNet with two layers to a level, as published: diffusers derives the original names from that number."""
    return UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 20,
    )


@pytest.fixture
def model(request):
    """`model(name)`: a small model of the real class."""
    return lambda name: sdxl_of_two_layers() if name == "sdxl" else request.getfixturevalue(f"{name}_denoiser")


def weights(model, *, prefix):
    """Every weight of the model that a LoRA may have an adapter for."""
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    return {f"{prefix}.{n}": m.weight for n, m in model.named_modules() if isinstance(m, layers)}


def random_modules(model, name, *, ranks=(1, 2, 3, 4), scales=(0.25, 0.5, 1.0), only=""):
    """An adapter for each layer, with ranks and scales that differ from layer to layer."""
    torch.manual_seed(3)
    found = {}
    for i, (module, w) in enumerate(weights(model, prefix=get_family(name).FACTS.lora_prefix).items()):
        if only in module:
            rank, scale = ranks[i % len(ranks)], scales[i % len(scales)]
            ones = [1] * (w.ndim - 2)
            found[module] = LoraWeights(torch.randn(rank, *w.shape[1:]), torch.randn(w.shape[0], rank, *ones), scale)
    return found


def assert_equal(got, expected, *, tolerance=1e-6):
    """The same modules with the same deltas, compared in float64."""
    assert got.keys() == expected.keys()
    for name in expected:
        a, b = (
            LoraWeights(x.down.double(), x.up.double(), x.scale).delta().flatten() for x in (got[name], expected[name])
        )
        assert (a - b).norm() <= tolerance * b.norm(), name


# ---- our formats


@pytest.mark.parametrize("to", convert.KEY_FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_of_every_family_survives_every_format(model, tmp_path, name, to):
    modules = random_modules(model(name), name)
    if name not in ("flux2", "z_image", "qwen_image", "krea2"):  # which have no CLIP
        modules[f"{CLIP}.mlp.fc1"] = LoraWeights(torch.randn(2, 8), torch.randn(12, 2), 0.5)
    assert len(modules) > 35
    save_file(convert.to_file(modules, to, name).tensors, tmp_path / "x.safetensors")
    assert_equal(convert.load(tmp_path / "x.safetensors", name), modules)


@pytest.mark.parametrize("name", FAMILIES)
def test_converting_through_all_formats_and_back_is_exact(model, name):
    start = modules = random_modules(model(name), name)
    for to in ("kohya", "peft", "comfyui", "kohya"):
        modules = convert.from_tensors(convert.to_file(modules, to, name).tensors, {}, name)
    assert_equal(modules, start)
    assert {n: a.rank for n, a in modules.items()} == {n: a.rank for n, a in start.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_kohya_files_have_one_alpha_and_the_right_names(model, name):
    written = convert.to_file(random_modules(model(name), name), "kohya", name)
    alphas = {k: v for k, v in written.tensors.items() if k.endswith(".alpha")}
    assert len(alphas) * 3 == len(written.tensors)
    assert {v.item() for v in alphas.values()} == {written.alpha} and {v.dtype for v in alphas.values()} == {
        torch.float32
    }
    assert all(k.startswith("lora_unet_") and "." not in key_names.split_key(k)[0] for k in written.tensors)


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_files_have_no_alpha_at_all(model, name):
    written = convert.to_file(random_modules(model(name), name), "peft", name)
    assert all(k.endswith((".lora_A.weight", ".lora_B.weight")) for k in written.tensors)
    assert written.alpha == written.rank


def test_full_size_flux_has_304_modules_and_sdxl_722():
    flux = [n for n in get_family("flux").LORA_KEYS.layers if "{}" in n.name]
    assert sum(19 if n.name.startswith("double") else 38 for n in flux) == 304
    deep = ("input_blocks.7", "input_blocks.8", "middle", "output_blocks.0", "output_blocks.1", "output_blocks.2")
    sdxl = [n.name for n in get_family("sdxl").LORA_KEYS.layers if "attentions" in n.diffusers_names[0]]
    assert sum((10 if n.startswith(deep) else 2) if "{}" in n else 1 for n in sdxl) == 722


def trained(denoiser, name, *, split, rank=3, alpha=2.0):
    """A model with adapters as a job has them, not zero; and its modules."""
    kind = get_family(name)
    fused = {} if split else kind.FACTS.fused_targets
    adapters.fuse_projections(kind.blocks(denoiser), fused=fused, targets=kind.FACTS.targets)
    blocks = kind.blocks(denoiser)
    params = adapters.add_adapters(
        denoiser, blocks, targets=kind.FACTS.targets, fused=fused, rank=rank, alpha=alpha, seed=7
    )
    torch.manual_seed(3)
    for p in params:
        torch.nn.init.normal_(p, std=0.3)
    facts = kind.FACTS
    return peft_bridge.from_peft_state(
        adapters.state(denoiser), prefix=facts.lora_prefix, fused=facts.fused_targets, scale=alpha / rank
    )


def test_one_adapter_for_q_k_and_v_is_kohyas_fused_layer_at_the_same_rank(flux_denoiser):
    written = convert.to_file(trained(flux_denoiser, "flux", split=False), "kohya", "flux")
    assert written.tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape[0] == 3
    assert written.tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape[0] == 3 + 3  # and the MLP's
    assert (written.rank, written.alpha) == (3, 2.0)
    live = adapters.state(flux_denoiser)["transformer_blocks.0.attn.to_qkv.lora_B.weight"]
    assert torch.equal(written.tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"], live)


def test_separate_adapters_of_fused_layers_are_stacked_block_by_block(flux_denoiser):
    written = convert.to_file(trained(flux_denoiser, "flux", split=True), "kohya", "flux")
    up = written.tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    assert up.shape == (7 * 32, 4 * 3)
    assert (up[:32, 3:] == 0).all() and (up[3 * 32 :, :9] == 0).all() and (up[:32, :3] != 0).any()


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("to", convert.KEY_FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_starts_from_every_format(model, name, to, split):
    denoiser = model(name)
    modules = trained(denoiser, name, split=split)
    back = convert.from_tensors(convert.to_file(modules, to, name).tensors, {}, name)
    state, facts = adapters.state(denoiser), get_family(name).FACTS
    before = {k: v.clone() for k, v in state.items()}
    adapters.load(denoiser, {k: v if ".lora_A." in k else torch.zeros_like(v) for k, v in before.items()})
    where = {"prefix": facts.lora_prefix, "fused": facts.fused_targets, "scale": 2.0 / 3}
    adapters.load(denoiser, peft_bridge.to_peft_state(back, adapters.state(denoiser), **where))
    assert_equal(peft_bridge.from_peft_state(adapters.state(denoiser), **where), modules)


def test_a_smaller_rank_is_padded_and_a_missing_layer_starts_at_zero(flux_denoiser):
    modules = trained(flux_denoiser, "flux", split=False)
    some = {n: LoraWeights(a.down[:2], a.up[:, :2], 0.7) for n, a in modules.items() if "ff" in n}
    start = {k: v if ".lora_A." in k else torch.zeros_like(v) for k, v in adapters.state(flux_denoiser).items()}
    fused = get_family("flux").FACTS.fused_targets
    filled = peft_bridge.to_peft_state(some, start, prefix="transformer", fused=fused, scale=2.0 / 3)
    got = peft_bridge.from_peft_state(filled, prefix="transformer", fused=fused, scale=2.0 / 3)
    assert_equal({n: a for n, a in got.items() if "ff" in n}, some)
    assert all(a.delta().norm() == 0 for n, a in got.items() if "ff" not in n)


def test_a_layer_that_is_not_trained_is_refused_by_name(flux_denoiser):
    modules = {"transformer.x_embedder": LoraWeights(torch.randn(2, 64), torch.randn(32, 2), 1.0)}
    trained(flux_denoiser, "flux", split=False)
    with pytest.raises(ValueError, match=r"transformer\.x_embedder"):
        peft_bridge.to_peft_state(modules, adapters.state(flux_denoiser), prefix="transformer", fused={}, scale=1.0)


def test_merging_sums_the_weighted_deltas(flux_denoiser):
    a = random_modules(flux_denoiser, "flux")
    b = {n: LoraWeights(x.down + 1, x.up, 2.0) for n, x in a.items() if "attn" in n}
    got = convert.merge([(a, 0.6), (b, -0.4)])
    for name in a:
        expected = 0.6 * a[name].delta() - (0.4 * b[name].delta() if name in b else 0)
        torch.testing.assert_close(got[name].delta(), expected, rtol=1e-5, atol=1e-5)
    assert_equal(convert.from_tensors(convert.to_file(got, "kohya", "flux").tensors, {}, "flux"), got)


# ---- other tools' spellings


def respell(tensors, change):
    return {change(k): v for k, v in tensors.items()}


SPELLINGS = {
    "lora_down and lora_up": lambda k: k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "with the name of the adapter": lambda k: k.replace(".weight", ".default.weight"),
    "base_model.model": lambda k: k.replace("transformer.", "base_model.model.", 1).replace(
        "unet.", "base_model.model.", 1
    ),
    "bare": lambda k: k.replace("transformer.", "", 1).replace("unet.", "", 1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_other_spellings_of_diffusers_names_are_read(model, name, spelling):
    modules = random_modules(model(name), name)
    tensors = respell(convert.to_file(modules, "peft", name).tensors, SPELLINGS[spelling])
    assert_equal(convert.from_tensors(tensors, {}, name), modules)


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lycoris_", "lora_unet_"])
@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_names_with_underscores_are_read(model, name, prefix):
    modules = random_modules(model(name), name)
    tensors = {}
    for module, a in modules.items():
        stem = prefix + module.partition(".")[2].replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": a.down, f"{stem}.lora_up.weight": a.up}
        tensors[f"{stem}.alpha"] = torch.tensor(a.scale * a.rank)
    assert_equal(convert.from_tensors(tensors, {}, name), modules)


@pytest.mark.parametrize("name", FAMILIES)
def test_original_names_with_dots_and_peft_matrices_are_read(model, name):
    modules = random_modules(model(name), name, scales=(1.0,))
    made = convert.to_file(modules, "comfyui", name)
    factor = {k.removesuffix(".alpha"): v.item() for k, v in made.tensors.items() if k.endswith(".alpha")}
    tensors = {}
    for stem, alpha in factor.items():
        down = made.tensors[f"{stem}.lora_down.weight"]
        tensors[f"{stem}.lora_A.weight"] = down
        tensors[f"{stem}.lora_B.weight"] = made.tensors[f"{stem}.lora_up.weight"] * alpha / len(down)
    assert_equal(convert.from_tensors(tensors, {}, name), modules)


def test_old_attention_processors_are_read(model):
    modules = random_modules(model("sdxl"), "sdxl", scales=(1.0,), only="attentions")

    def old(key):
        module, _, matrix = (
            key.replace("lora_A", "down").replace("lora_B", "up").removesuffix(".weight").rpartition(".")
        )
        if ".attn" in module:
            block, _, layer = module.replace(".to_out.0", ".to_out").rpartition(".")
            return f"{block}.processor.{layer}_lora.{matrix}.weight"
        return f"{module}.lora.{matrix}.weight"

    tensors = respell(convert.to_file(modules, "peft", "sdxl").tensors, old)
    assert sum(".processor." in k for k in tensors) > 50
    assert_equal(convert.from_tensors(tensors, {}, "sdxl"), modules)


@pytest.mark.parametrize("how", ["alpha keys", "metadata", "alpha_pattern", "rslora"])
def test_the_scale_is_read_from_alpha_keys_and_from_peft_metadata(flux_denoiser, how):
    modules = random_modules(flux_denoiser, "flux", ranks=(4,), scales=(1.0,), only="attn")
    tensors = convert.to_file(modules, "peft", "flux").tensors
    metadata = {}
    expected = {n: LoraWeights(a.down, a.up, 2.0) for n, a in modules.items()}
    if how == "alpha keys":
        tensors |= {f"{n}.alpha": torch.tensor(8.0) for n in modules}
    elif how == "alpha_pattern":
        metadata = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {r"attn\..*": 8}}
    else:
        rslora = how == "rslora"
        metadata = {"transformer.lora_alpha": 4 if rslora else 8, "transformer.use_rslora": rslora}
    assert_equal(convert.from_tensors(tensors, {"lora_adapter_metadata": json.dumps(metadata)}, "flux"), expected)


def test_text_encoders_are_read_with_and_without_the_level_text_model():
    layer = {"lora_A.weight": torch.randn(2, 8), "lora_B.weight": torch.randn(8, 2)}
    for start in (
        CLIP,
        CLIP.replace(".text_model", ""),
        CLIP.replace("text_encoder.", "text_encoders.clip_l.transformer."),
    ):
        found = convert.from_tensors({f"{start}.self_attn.q_proj.{k}": v for k, v in layer.items()}, {}, "flux")
        assert list(found) == [f"{CLIP}.self_attn.q_proj"]
    kohya = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    assert set(convert.to_file(found, "kohya", "flux").tensors) == {
        f"{kohya}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t | {"lora_unet_nothing.lora_down.weight": torch.ones(2, 2)}, "lora_unet_nothing"),
        (lambda t: {k: v for k, v in t.items() if "img_attn_proj.lora_up" not in k}, "img_attn_proj has no up matrix"),
        (lambda t: {k: v * float("nan") if "img_attn_proj.lora_up" in k else v for k, v in t.items()}, "not finite"),
        (lambda t: {k: v * 0 if "img_attn_proj.alpha" in k else v for k, v in t.items()}, "alpha is 0"),
        (lambda t: {k: v[:-1] if "img_attn_qkv.lora_up" in k else v for k, v in t.items()}, "rows"),
        (lambda t: {k: v[:-1] if "img_attn_proj.lora_down" in k else v for k, v in t.items()}, "shapes"),
        (lambda _: {}, "empty"),
    ],
)
def test_broken_files_are_refused_with_the_key_or_the_reason(flux_denoiser, change, word):
    modules = random_modules(flux_denoiser, "flux", ranks=(2,), only="transformer_blocks.0.attn")
    tensors = change(convert.to_file(modules, "kohya", "flux").tensors)
    with pytest.raises(ValueError, match=word):
        convert.from_tensors(tensors, {}, "flux")


@pytest.mark.parametrize("to", convert.KEY_FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_of_a_file_is_found_from_its_keys(model, name, to):
    tensors = convert.to_file(random_modules(model(name), name), to, name).tensors
    assert contents.likely_family({key: tuple(tensor.shape) for key, tensor in tensors.items()}, {}) == name


# ---- diffusers' own loader


# Rounding of both matrices; and of one of them once more, where diffusers multiplies it by alpha / rank.
TOLERANCE = {name: max(1e-6, 1.5 * form.bound) for name, form in SAVE_PRECISIONS.items()}


def weights_in_diffusers(pipe, denoiser, path, *, prefix):
    pipe.load_lora_weights(path, adapter_name="x")
    layers = ((n, m) for n, m in denoiser.named_modules() if hasattr(m, "lora_A") and "x" in m.lora_A)
    return {f"{prefix}.{n}": LoraWeights(m.lora_A["x"].weight, m.lora_B["x"].weight, m.scaling["x"]) for n, m in layers}


@pytest.mark.parametrize("save_precision", SAVE_PRECISIONS)
@pytest.mark.parametrize("to", ["kohya", "peft"])
def test_diffusers_reads_sdxl(sdxl_vae, tmp_path, to, save_precision):
    unet = sdxl_of_two_layers()
    modules = random_modules(unet, "sdxl")
    pipe = StableDiffusionXLPipeline(sdxl_vae, None, None, None, None, unet=unet, scheduler=None, add_watermarker=False)
    file = convert.to_file(modules, to, "sdxl", save_precision)
    save_file(file.tensors, tmp_path / "x.safetensors", file.header)
    got = weights_in_diffusers(pipe, unet, tmp_path / "x.safetensors", prefix="unet")
    assert_equal(got, modules, tolerance=TOLERANCE[save_precision])


@pytest.mark.parametrize("save_precision", SAVE_PRECISIONS)
def test_diffusers_reads_sd3(sd3_denoiser, sd3_vae, tmp_path, save_precision):
    modules = random_modules(sd3_denoiser, "sd3")
    pipe = StableDiffusion3Pipeline(sd3_denoiser, None, sd3_vae, None, None, None, None, None, None)
    file = convert.to_file(modules, "peft", "sd3", save_precision)
    save_file(file.tensors, tmp_path / "x.safetensors", file.header)
    got = weights_in_diffusers(pipe, sd3_denoiser, tmp_path / "x.safetensors", prefix="transformer")
    assert_equal(got, modules, tolerance=SAVE_PRECISIONS[save_precision].bound)


@pytest.mark.parametrize("save_precision", SAVE_PRECISIONS)
@pytest.mark.parametrize("shared", [True, False])
def test_diffusers_converts_flux_at_its_real_width(shared, save_precision):
    """Its converter works only at Flux's real width, so: LoRAs of that width, one block of each class, no model."""
    h, modules = 3072, {}
    common = torch.randn(2, h)

    def add(name, rows, columns=h):
        down = common if shared and ".to_" in name and "out" not in name else torch.randn(2, columns)
        modules[f"transformer.{name}"] = LoraWeights(down, torch.randn(rows, 2), 0.5)

    for x in "qkv":
        add(f"transformer_blocks.0.attn.to_{x}", h)
        add(f"transformer_blocks.0.attn.add_{x}_proj", h)
        add(f"single_transformer_blocks.0.attn.to_{x}", h)
    for end in ("attn.to_out.0", "attn.to_add_out"):
        add(f"transformer_blocks.0.{end}", h)
    for ff in ("ff", "ff_context"):
        add(f"transformer_blocks.0.{ff}.net.0.proj", 4 * h)
        add(f"transformer_blocks.0.{ff}.net.2", h, 4 * h)
    for norm in ("norm1", "norm1_context"):
        add(f"transformer_blocks.0.{norm}.linear", 6 * h)
    add("single_transformer_blocks.0.proj_mlp", 4 * h)
    add("single_transformer_blocks.0.proj_out", h, 5 * h)
    add("single_transformer_blocks.0.norm.linear", 3 * h)

    tensors = convert.to_file(modules, "kohya", "flux", save_precision).tensors
    got = _convert_kohya_flux_lora_to_diffusers(tensors)
    assert {k.rpartition(".lora_")[0] for k in got} == modules.keys()
    for name, a in modules.items():
        down, up = got[f"{name}.lora_A.weight"].double(), got[f"{name}.lora_B.weight"].double()
        wide = LoraWeights(a.down.double(), a.up.double(), a.scale).folded()
        off = product_norm(torch.cat([up, -wide.up], dim=1), torch.cat([down, wide.down]))
        assert off <= TOLERANCE[save_precision] * product_norm(wide.up, wide.down)


def product_norm(up, down):
    """‖up @ down‖, without a product of the size of the layer."""
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


# ---- the commands


def test_the_commands_convert_and_merge(flux_denoiser, tmp_path):
    from trainer.export import export_command

    modules = random_modules(flux_denoiser, "flux", only="attn")
    first, second, third = (tmp_path / f"{n}.safetensors" for n in "abc")
    save_file(convert.to_file(modules, "peft", "flux").tensors, first, {"lora_adapter_metadata": "{}", "ss_steps": "7"})
    assert export_command([str(first), "--to", "comfyui", "--out", str(second)]) == 0
    assert all(k.startswith("diffusion_model.") for k in load_file(second))
    assert_equal(convert.load(second, "flux"), modules)
    assert safetensors_header.read_header(second).metadata["ss_steps"] == "7"
    assert export_command(["--merge", f"{first}:0.75", f"{second}:0.25", "--out", str(third)]) == 0
    assert_equal(convert.load(third, "flux"), modules, tolerance=1e-5)
    assert export_command(["--merge", str(first), str(tmp_path / "no"), "--out", str(third)]) == 78


def test_several_files_with_strengths_are_merged_into_the_model(flux_denoiser, text):
    """`trainer.sample`: the same file twice at half strength is the trained model."""
    import copy

    from trainer.families import flux
    from trainer.sample import apply_loras

    def output(denoiser):
        torch.manual_seed(4)
        return flux.predict(denoiser, torch.randn(2, 16, 4, 6), torch.tensor([0.3, 0.8]), text=text, guidance=1.0)

    plain = copy.deepcopy(flux_denoiser)
    modules = trained(flux_denoiser, "flux", split=False)
    apply_loras(plain, [(modules, 0.5), (modules, 0.5)], component="transformer")
    torch.testing.assert_close(output(plain), output(flux_denoiser), atol=1e-4, rtol=1e-4)


def test_the_sample_command_draws_with_a_lora_and_without(tmp_path, capsys):
    from PIL import Image, ImageChops

    from trainer.families import flux
    from trainer.sample import sample_command

    folder = flux.FACTS.models["mini-flux"].source
    denoiser = flux.load_denoiser(Path(folder), device="cpu", dtype=torch.float32)
    modules = random_modules(denoiser, "flux", scales=(0.05,), only="attn")
    save_file(convert.to_file(modules, "kohya", "flux").tensors, tmp_path / "x.safetensors")
    (tmp_path / "prompts.txt").write_text("# comment\na spot --w 64 --h 64 --s 2 --d 7\n")
    common = ["--prompts", str(tmp_path / "prompts.txt")]

    def drawn(name, *arguments):
        assert sample_command([*arguments, *common, "--out", str(tmp_path / name)]) == 0
        return Image.open(tmp_path / name / "step-00000000-00.png")

    without = drawn("a", "--base", "mini-flux")
    nothing = drawn("b", "--base", folder, "--lora", f"{tmp_path / 'x.safetensors'}:0")
    changed = drawn("c", "--base", folder, "--lora", f"{tmp_path / 'x.safetensors'}:0.5")
    assert without.size == (64, 64) and ImageChops.difference(without, nothing).getbbox() is None
    assert ImageChops.difference(without, changed).getbbox() is not None
    assert sample_command(["--base", "nothing", *common, "--out", str(tmp_path)]) == 78


def prompt_lines(tmp_path, text, name="flux"):
    from trainer.sample import read_prompts
    from trainer.spec.family import get_family

    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8")
    facts = get_family(name).FACTS
    return read_prompts(tmp_path / "prompts.txt", facts, facts.models[f"mini-{name}"])


def test_the_sample_command_reads_prompt_lines_as_a_job_does(tmp_path):
    spot, dog = prompt_lines(tmp_path, "\ufeff # comment\na spot --W 96 --h 70 --l 2 --n dark\n\na dog\n")
    assert (spot.text, spot.width, spot.height, spot.cfg, spot.negative) == ("a spot", 96, 64, 2.0, "dark")
    assert (dog.text, dog.width, dog.height, dog.seed, spot.seed) == ("a dog", 128, 128, 43, 42)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --x 1", "--x is not a flag"),
        ("a cat --s 0", "--s: 0 is not a whole number, 1 to 1000"),
        ("a cat --l nan", "--l: 'nan' is not a number, 0 to 100"),
        ("a cat --w 64 --w 96", "--w is given twice"),
        ("--w 64", "there is no prompt before the flags"),
        ("a cat --w 16", "the width is too small. Allowed: 32 or more"),
    ],
)
def test_the_sample_command_names_every_bad_prompt_line(tmp_path, line, message):
    from trainer.spec.errors import SettingsError

    with pytest.raises(SettingsError) as caught:
        prompt_lines(tmp_path, f"a dog\n{line}\na bird --d x\n", name="sdxl")
    assert f"line 2: {message}" in str(caught.value) and "line 3: --d" in str(caught.value)
