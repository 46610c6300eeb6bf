"""Every file layout that users have gives the model that it was written from, read as a job reads it.

The single files are written from the miniatures under their original names (bench/original_names.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from bench.layouts import memory_taken
from bench.original_names import (
    checkpoint,
    facts,
    flux2_dev_files,
    flux2_files,
    flux_files,
    krea2_files,
    miniature,
    original,
    qwen_image_files,
    under,
    vae_original,
    weights,
    z_image_files,
)
from tests.support.miniatures import base as base_of
from tests.support.miniatures import family_of, pipeline
from tests.support.single_files import model_folder
from trainer.base_model import lazy_tensors
from trainer.sample import sample_command
from trainer.spec.errors import SettingsError
from trainer.spec.family import get_family
from trainer.spec.plan import TrainPlan
from trainer.storage.safetensors_header import OUTLINE
from trainer.training.objective import make_objective

FAMILIES = ("flux", "flux2", "flux2_dev", "sdxl", "sd3", "z_image", "qwen_image", "krea2")
LANGUAGE_MODELS = ("qwen2_5_vl", "qwen3_vl")  # of models that also read images, which files hold as a whole


# ---- through the product


def equal(folder: Path, name: str, parts: tuple[str, ...]) -> None:
    for part in parts:
        place = facts(name).parts[part]
        got, want = weights(folder / place), weights(miniature(name) / place)
        assert got.keys() == want.keys(), part
        for key in want:
            if not (part == "clip_l" and key == "text_projection.weight"):  # see test_clip_l_is_not_projected
                assert torch.equal(got[key].float(), want[key].float()), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_flux_as_four_files(tmp_path, dtype):
    folder = model_folder(tmp_path, "flux", **flux_files(tmp_path, dtype))
    equal(folder, "flux", ("vae", "clip_l", "t5"))
    got, want = weights(folder / "transformer"), weights(miniature("flux") / "transformer")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k].to(dtype)) for k in want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_z_image_as_three_files(tmp_path, dtype):
    folder = model_folder(tmp_path, "z_image", **z_image_files(tmp_path, dtype))
    equal(folder, "z_image", ("vae", "qwen3"))
    got, want = weights(folder / "transformer"), weights(miniature("z_image") / "transformer")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k].to(dtype)) for k in want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_flux2_as_three_files(tmp_path, dtype):
    folder = model_folder(tmp_path, "flux2", **flux2_files(tmp_path, dtype))
    equal(folder, "flux2", ("vae", "qwen3"))
    got, want = weights(folder / "transformer"), weights(miniature("flux2") / "transformer")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k].to(dtype)) for k in want)


def test_flux2_dev_as_three_files(tmp_path):
    """Its text encoder as ComfyUI has it: the layers that are read, without the last norm. It gives the same texts."""
    folder = model_folder(tmp_path, "flux2_dev", **flux2_dev_files(tmp_path, torch.bfloat16))
    equal(folder, "flux2_dev", ("vae",))
    got, want = weights(folder / "transformer"), weights(miniature("flux2_dev") / "transformer")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k].bfloat16()) for k in want)
    kind = family_of("flux2_dev")
    read, own = (kind.load_encoders(f, device="cpu", dtype=torch.float32) for f in (folder, miniature("flux2_dev")))
    assert torch.equal(*(kind.encode_text(encoders, ["a red ball"])[0]["tokens"] for encoders in (read, own)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_qwen_image_as_three_files(tmp_path, dtype):
    """The VAE under Wan's names; of the text encoder, the language model alone."""
    folder = model_folder(tmp_path, "qwen_image", **qwen_image_files(tmp_path, dtype))
    equal(folder, "qwen_image", ("vae",))
    got, want = weights(folder / "transformer"), weights(miniature("qwen_image") / "transformer")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k].to(dtype)) for k in want)
    whole = weights(miniature("qwen_image") / "text_encoder")
    texts = {k.removeprefix("model."): v for k, v in whole.items() if k.startswith("model.")}
    read = weights(folder / "text_encoder")
    assert read.keys() == texts.keys() and all(torch.equal(read[k], texts[k]) for k in texts)


def test_a_file_of_which_only_the_header_came_is_never_read_as_zeros(tmp_path):
    files = flux_files(tmp_path, torch.float16)
    save_file(load_file(files["VAE_PATH"]), files["VAE_PATH"], {OUTLINE: "not downloaded yet"})
    with pytest.raises(SettingsError, match=r"ae.safetensors.*it was never downloaded"):
        model_folder(tmp_path, "flux", **files)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_krea_2_as_three_files(tmp_path, dtype):
    """The denoiser under its own names, six modulations as one vector; of the text encoder, the language model."""
    folder = model_folder(tmp_path, "krea2", **krea2_files(tmp_path, dtype))
    equal(folder, "krea2", ("vae",))
    got, want = weights(folder / "transformer"), weights(miniature("krea2") / "transformer")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k].to(dtype)) for k in want)
    whole = weights(miniature("krea2") / "text_encoder")
    texts = {k.removeprefix("language_model."): v for k, v in whole.items() if k.startswith("language_model.")}
    read = weights(folder / "text_encoder")
    assert read.keys() == texts.keys() and all(torch.equal(read[k], texts[k]) for k in texts)


def test_krea_2s_scaled_fp8_files_and_text_encoders_that_are_not_its_own(tmp_path):
    """ComfyUI's newer names: a scale for each layer, and what the layer is quantised as, in JSON."""
    files = krea2_files(tmp_path, torch.bfloat16)
    scales = {}
    for variable in ("MODEL_PATH", "TEXT_ENCODER_PATH"):
        state = load_file(files[variable])
        small = {}
        for key, tensor in state.items():
            is_layer = key.endswith(("wq.weight", "wk.weight", "mlp.up.weight", "proj.weight")) and tensor.ndim == 2
            if not is_layer or "visual" in key:
                small[key] = tensor
                continue
            factor = tensor.float().abs().max() / 448
            small[key] = (tensor.float() / factor).to(torch.float8_e4m3fn)
            layer = key.removesuffix(".weight")
            kind = torch.tensor([*b'{"format": "float8_e4m3fn"}'], dtype=torch.uint8)
            small |= {f"{layer}.weight_scale": factor, f"{layer}.comfy_quant": kind}
            scales[key.removeprefix("model.")] = small[key].float() * factor
        save_file(small, files[variable])
    folder = model_folder(tmp_path, "krea2", **files)
    read = weights(folder / "text_encoder")
    ours = {"wq": "to_q", "wk": "to_k", "mlp.up": "ff.up", "txtfusion": "text_fusion"}
    for name, tensor in weights(folder / "transformer").items():
        theirs = name.replace("transformer_blocks.", "blocks.")
        for original_name, name_here in ours.items():
            theirs = theirs.replace(name_here, original_name)
        read[theirs] = tensor
    assert len(scales) > 200
    for key, expected in scales.items():
        assert torch.equal(read[key], expected.bfloat16()), key

    (tmp_path / "z").mkdir()
    others = z_image_files(tmp_path / "z", torch.float16)
    asked = {"BASE_MODEL": "krea2", "TEXT_ENCODER_PATH": others["TEXT_ENCODER_PATH"]}
    with pytest.raises(SettingsError, match=r"is Qwen3, not Qwen3-VL\. Fix: the file of Qwen3-VL"):
        model_folder(tmp_path, "krea2", **asked)
    with pytest.raises(SettingsError, match=r"is Qwen3-VL, not Qwen3\. Fix: the file of Qwen3"):
        model_folder(tmp_path, "z_image", BASE_MODEL="z-image", TEXT_ENCODER_PATH=files["TEXT_ENCODER_PATH"])
    wide = {k: torch.zeros(4096, 4096, dtype=torch.float16) for k in ("model.embed_tokens.weight",)}
    wide |= {"model.layers.0.self_attn.q_norm.weight": torch.ones(128)}
    wide |= {"model.visual.deepstack_merger_list.0.norm.weight": torch.ones(8)}
    save_file(wide, tmp_path / "wide.safetensors")
    with pytest.raises(SettingsError, match=r"is Qwen3-VL-8B, of width 4096; this base model reads by Qwen3-VL-4B"):
        model_folder(tmp_path, "krea2", BASE_MODEL="krea2", TEXT_ENCODER_PATH=str(tmp_path / "wide.safetensors"))


def test_scaled_fp8_of_the_denoiser_and_of_the_language_model(tmp_path):
    """As ComfyUI's fp8_scaled files have it: a scale for each layer, a mark, and for some a scale of the input."""
    files = qwen_image_files(tmp_path, torch.bfloat16)
    scales = {}
    for variable in ("MODEL_PATH", "TEXT_ENCODER_PATH"):
        state = load_file(files[variable])
        small = {}
        for key, tensor in state.items():
            if not key.endswith("proj.weight") or "visual" in key:
                small[key] = tensor
                continue
            factor = tensor.float().abs().max() / 448
            small[key] = (tensor.float() / factor).to(torch.float8_e4m3fn)
            layer = key.removesuffix(".weight")
            small |= {f"{layer}.scale_weight": factor.reshape(1), f"{layer}.scale_input": torch.ones(1)}
            scales[key.removeprefix("model.")] = small[key].float() * factor
        save_file(small | {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, files[variable])
    folder = model_folder(tmp_path, "qwen_image", **files)
    read = weights(folder / "transformer") | weights(folder / "text_encoder")
    assert len(scales) > 30
    for key, expected in scales.items():
        assert torch.equal(read[key], expected.bfloat16()), key


def test_parts_of_other_models_are_named(tmp_path):
    """By the family they are of, before anything is converted."""
    (tmp_path / "z").mkdir()
    files = qwen_image_files(tmp_path, torch.float16)
    others = z_image_files(tmp_path / "z", torch.float16)
    refused = {
        ("VAE_PATH", others["VAE_PATH"]): r"is a VAE of images; this base model's is one of videos",
        ("TEXT_ENCODER_PATH", others["TEXT_ENCODER_PATH"]): r"is Qwen3, not Qwen2\.5-VL",
        ("TEXT_ENCODER_PATH", files["VAE_PATH"]): r"is a VAE, not Qwen2\.5-VL\. Fix: VAE_PATH=this file",
        ("MODEL_PATH", others["MODEL_PATH"]): r"is of another family.*Fix: BASE_MODEL=",
    }
    for (variable, path), words in refused.items():
        with pytest.raises(SettingsError, match=words):
            model_folder(tmp_path, "qwen_image", BASE_MODEL="qwen-image", **{variable: path})
    with pytest.raises(SettingsError, match=r"is a VAE of videos; this base model's is one of images"):
        model_folder(tmp_path, "z_image", BASE_MODEL="z-image", VAE_PATH=files["VAE_PATH"])
    narrow = {k: v[..., :32].contiguous() for k, v in load_file(files["TEXT_ENCODER_PATH"]).items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(SettingsError, match=r"is another Qwen2\.5-VL, of width 32; this base model's has 3584"):
        model_folder(
            tmp_path, "qwen_image", BASE_MODEL="qwen-image", TEXT_ENCODER_PATH=str(tmp_path / "narrow.safetensors")
        )


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        ("__index_timestep_zero__", "Qwen-Image-Edit-2511"),
        ("time_text_embed.addition_t_embedding.weight", "Qwen-Image-Layered"),
    ],
)
def test_models_that_only_look_like_qwen_image_are_named(tmp_path, tensor, what):
    save_file(original("qwen_image") | {tensor: torch.zeros(2, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(SettingsError, match=rf"is {what}.*, which is not trained here"):
        model_folder(tmp_path, "qwen_image", MODEL_PATH=str(tmp_path / "x.safetensors"))


def test_what_is_no_language_model_or_another_one_is_refused(tmp_path):
    files = z_image_files(tmp_path, torch.float16)
    with pytest.raises(SettingsError, match=r"TEXT_ENCODER_PATH=.* is a VAE, not Qwen3\. Fix: VAE_PATH=this file"):
        model_folder(tmp_path, "z_image", TEXT_ENCODER_PATH=files["VAE_PATH"])
    with pytest.raises(SettingsError, match=r"VAE_PATH=.* is Qwen3, not a VAE\. Fix: TEXT_ENCODER_PATH=this file"):
        model_folder(tmp_path, "z_image", VAE_PATH=files["TEXT_ENCODER_PATH"])
    narrow = {k: v[..., :32].contiguous() for k, v in load_file(files["TEXT_ENCODER_PATH"]).items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    with pytest.raises(SettingsError, match=r"narrow\.safetensors cannot be the qwen3 .* has the shape"):
        model_folder(tmp_path, "z_image", TEXT_ENCODER_PATH=str(tmp_path / "narrow.safetensors"))


def test_fp8_becomes_bf16_with_its_scales(tmp_path):
    state = original("flux")
    scaled = "double_blocks.0.img_mlp.0"
    small = {k: v.to(torch.float8_e4m3fn) for k, v in state.items()}
    small[f"{scaled}.weight"] = (state[f"{scaled}.weight"].float() / 0.25).to(torch.float8_e4m3fn)
    marks = {f"{scaled}.scale_weight": torch.tensor(0.25), "scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    save_file(under("model.diffusion_model.", {**small, **marks}), tmp_path / "fp8.safetensors")
    got = weights(model_folder(tmp_path, "flux", MODEL_PATH=str(tmp_path / "fp8.safetensors")) / "transformer")
    want = weights(miniature("flux") / "transformer")
    assert got.keys() == want.keys() and {t.dtype for t in got.values()} == {torch.bfloat16}
    for key, tensor in want.items():
        factor = 0.25 if key == "transformer_blocks.0.ff.net.0.proj.weight" else 1.0
        assert torch.equal(got[key].float(), (tensor.float() / factor).to(torch.float8_e4m3fn).float() * factor), key


@pytest.mark.parametrize("name", ["sdxl", "sd3", "z_image", "flux2", "flux2_dev", "qwen_image", "krea2"])
def test_a_whole_checkpoint_as_one_file(tmp_path, name):
    save_file(checkpoint(name), tmp_path / "all.safetensors")
    bare = tmp_path / "bare"  # what remains is small: nothing but the file has weights
    shutil.copytree(miniature(name), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    folder = model_folder(tmp_path, name, MODEL_PATH=str(tmp_path / "all.safetensors"), MODEL_CONFIG_PATH=str(bare))
    # Of models that also read images, the language model is taken: below, it gives the same texts.
    equal(folder, name, tuple(part for part in facts(name).parts if part not in LANGUAGE_MODELS))
    kind = family_of(name)
    same = [kind.load_denoiser(f, device="cpu", dtype=torch.float32) for f in (folder, miniature(name))]
    pairs = zip(same[0].named_parameters(), same[1].named_parameters(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    encoders = kind.load_encoders(folder, device="cpu", dtype=torch.float32)
    own = kind.load_encoders(miniature(name), device="cpu", dtype=torch.float32)
    (a,), (b,) = (kind.encode_text(e, ["a red ball"]) for e in (encoders, own))
    assert torch.equal(a["tokens"], b["tokens"])
    kind.load_vae(folder, device="cpu")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sample_command_draws_with_one_file(tmp_path, name):
    """The same images as with the folder that the file was made from; what the file lacks is the base model's."""
    if name == "flux":
        save_file(under("model.diffusion_model.", original(name)), tmp_path / "all.safetensors")
    else:
        save_file(checkpoint(name), tmp_path / "all.safetensors")
    (tmp_path / "prompts.txt").write_text("a red circle --w 128 --h 128 --s 2\n")
    common = ["--prompts", str(tmp_path / "prompts.txt"), "--cache", str(tmp_path / "cache")]
    drawn = []
    for base in ([str(tmp_path / "all.safetensors"), "--config", base_of(name)], [base_of(name)]):
        assert sample_command(["--base", *base, *common, "--out", str(tmp_path / base[0][-4:])]) == 0
        drawn.append((tmp_path / base[0][-4:] / "step-00000000-00.png").read_bytes())
    if name != "sd3":  # whose CLIP-L is not projected from a file
        assert drawn[0] == drawn[1]
    wrong = ["--base", str(tmp_path / "all.safetensors"), "--config", "no-such-model", *common]
    assert sample_command([*wrong, "--out", str(tmp_path / "x")]) == 78


@pytest.mark.parametrize(("marks", "zero_snr"), [(["v_pred"], False), (["v_pred", "ztsnr"], True)])
def test_a_file_marked_as_v_prediction_is_trained_with_it(tmp_path, marks, zero_snr):
    save_file(checkpoint("sdxl") | {name: torch.zeros(1) for name in marks}, tmp_path / "all.safetensors")
    asked = {"MODEL_PATH": str(tmp_path / "all.safetensors"), "MODEL_CONFIG_PATH": str(miniature("sdxl"))}
    for _ in range(2):  # made, and found again
        scheduler = model_folder(tmp_path, "sdxl", **asked) / "scheduler"
        objective = make_objective(get_family("sdxl").FACTS, TrainPlan(), scheduler=scheduler, device="cpu")
        assert objective.prediction == "v_prediction" and (objective.signal_T[-1].item() == 0) is zero_snr
    own = json.loads((miniature("sdxl") / "scheduler" / "scheduler_config.json").read_text())
    assert own["prediction_type"] == "epsilon"  # what was linked to is as it was


SAYS = [  # tensors, metadata, what is in the scheduler of the base model → prediction, zero terminal SNR
    ([], {"modelspec.prediction_type": "v"}, {}, "v_prediction", False),
    (["ztsnr"], {"modelspec.prediction_type": "v_prediction"}, {}, "v_prediction", True),
    (["v_pred"], {"modelspec.prediction_type": "epsilon"}, {}, "v_prediction", False),
    ([], {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}, "epsilon", False),
    (["ztsnr"], {}, {}, "epsilon", False),
    ([], {"modelspec.prediction_type": "rectified"}, {}, "epsilon", False),
    ([], {}, {"prediction_type": "v_prediction"}, "v_prediction", False),
]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("tensors", "metadata", "scheduler", "prediction", "zero_snr"), SAYS)
def test_a_file_is_trained_with_the_prediction_that_it_names(
    tmp_path, tensors, metadata, scheduler, prediction, zero_snr, prefix
):
    """Also a file with the denoiser alone, where the marks stand beside the weights."""
    base = tmp_path / "base"
    shutil.copytree(miniature("sdxl"), base)
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | scheduler))
    state = under(prefix, original("sdxl")) if not prefix else checkpoint("sdxl")
    save_file(state | {name: torch.zeros(1) for name in tensors}, tmp_path / "x.safetensors", metadata)
    asked = {"MODEL_PATH": str(tmp_path / "x.safetensors"), "MODEL_CONFIG_PATH": str(base)}
    folder = model_folder(tmp_path, "sdxl", **asked)
    objective = make_objective(get_family("sdxl").FACTS, TrainPlan(), scheduler=folder / "scheduler", device="cpu")
    assert (objective.prediction, objective.signal_T[-1].item() == 0) == (prediction, zero_snr)


def test_noise_levels_that_are_not_trained_are_refused(tmp_path):
    save_file(checkpoint("sdxl") | {"edm_vpred.sigma_max": torch.ones(1)}, tmp_path / "all.safetensors")
    with pytest.raises(SettingsError, match="EDM"):
        model_folder(
            tmp_path, "sdxl", MODEL_PATH=str(tmp_path / "all.safetensors"), MODEL_CONFIG_PATH=str(miniature("sdxl"))
        )


def test_clip_l_is_not_projected_in_a_file_of_sd3(tmp_path):
    """As every tool reads it: diffusers' own loader of single files puts the identity there too."""
    save_file(checkpoint("sd3"), tmp_path / "all.safetensors")
    folder = model_folder(tmp_path, "sd3", MODEL_PATH=str(tmp_path / "all.safetensors"))
    projection = weights(folder / "text_encoder")["text_projection.weight"]
    assert torch.equal(projection.float(), torch.eye(len(projection)))


def test_a_part_of_a_folder_is_replaced_by_a_file_or_a_folder(tmp_path):
    other = {k: v + 1 for k, v in weights(miniature("sdxl") / "vae").items()}
    save_file(under("", vae_original(other)), tmp_path / "vae.safetensors")
    save = model_folder(tmp_path, "sdxl", VAE_PATH=str(tmp_path / "vae.safetensors"))
    assert all(torch.equal(t, other[k]) for k, t in weights(save / "vae").items())
    equal(save, "sdxl", ("denoiser", "clip_l", "clip_g"))
    again = model_folder(tmp_path, "sdxl", VAE_PATH=str(save / "vae"))
    assert all(torch.equal(t, other[k]) for k, t in weights(again / "vae").items())


def test_t5_is_left_out_where_it_may_be(tmp_path):
    save_file(checkpoint("sd3", t5=False), tmp_path / "no_t5.safetensors")
    folder = model_folder(tmp_path, "sd3", MODEL_PATH=str(tmp_path / "no_t5.safetensors"), T5_PATH="none")
    assert not (folder / "text_encoder_3").exists()
    encoders = get_family("sd3").load_encoders(folder, device="cpu", dtype=torch.float32)
    assert encoders.text_encoder_3 is None and get_family("sd3").encode_text(encoders, ["a ball"])[0]["tokens"].any()
    with pytest.raises(SettingsError, match="T5_PATH='none' leaves out"):
        model_folder(tmp_path, "flux", T5_PATH="none")


@pytest.mark.parametrize("name", FAMILIES)
def test_shards_with_an_index_and_fp16_beside_the_full_weights(tmp_path, name):
    folder, kind = tmp_path / "model", family_of(name)
    shutil.copytree(miniature(name), folder)
    part = folder / kind.FACTS.parts["denoiser"]
    model = kind.load_denoiser(miniature(name), device="cpu", dtype=torch.float32)
    for file in part.glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(part, max_shard_size="400KB")
    assert len(list(part.glob("*-of-*.safetensors"))) > 1
    model.half().save_pretrained(part, variant="fp16", max_shard_size="10GB")
    got = kind.load_denoiser(model_folder(tmp_path, name, MODEL_PATH=str(folder)), device="cpu", dtype=torch.float32)
    want = weights(miniature(name) / kind.FACTS.parts["denoiser"])
    assert all(torch.equal(t, want[k].float()) for k, t in got.state_dict().items())


@pytest.mark.parametrize("shards", ["10GB", "400KB"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_with_fp16_variants_only(tmp_path, name, shards):
    folder, kind = tmp_path / "model", family_of(name)
    shutil.copytree(miniature(name), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = pipeline(name)  # of some encoders, a family loads only the layers that it reads
    denoiser = kind.load_denoiser(miniature(name), device="cpu", dtype=torch.float16)
    models = {kind.FACTS.parts["denoiser"]: denoiser, "vae": kind.load_vae(miniature(name), device="cpu").half()}
    models |= {component: getattr(whole, component).half() for component in kind.LORA_KEYS.encoders}
    for part, model in models.items():
        model.save_pretrained(folder / part, variant="fp16", max_shard_size=shards)
    if shards == "400KB":  # as both libraries, and older ones, name the shards of a variant
        assert list(folder.rglob("*fp16*-of-*.safetensors")) or list(folder.rglob("*-of-*.fp16.safetensors"))
    assert not [p for p in folder.rglob("*.safetensors") if ".fp16" not in p.name]
    found = model_folder(tmp_path, name, MODEL_PATH=str(folder))
    got = kind.load_denoiser(found, device="cpu", dtype=torch.float32)
    want = denoiser.float().state_dict()
    assert all(torch.equal(t, want[k]) for k, t in got.state_dict().items())
    (a,), (b,) = (kind.encode_text(e, ["a red ball"]) for e in (
        kind.load_encoders(found, device="cpu", dtype=torch.float32),
        kind.load_encoders(miniature(name), device="cpu", dtype=torch.float32),
    ))  # fmt: skip
    torch.testing.assert_close(a["tokens"], b["tokens"], rtol=2e-2, atol=2e-2)
    kind.load_vae(found, device="cpu")


# ---- what is refused, and how


@pytest.mark.parametrize("end", ["ckpt", "bin", "pt", "pth"])
@pytest.mark.parametrize("variable", ["MODEL_PATH", "VAE_PATH"])
def test_pickles_are_refused_with_the_reason(tmp_path, end, variable):
    (tmp_path / f"model.{end}").write_bytes(b"anything")
    with pytest.raises(SettingsError) as caught:
        model_folder(tmp_path, "flux", **{variable: str(tmp_path / f"model.{end}")})
    assert caught.value.exit_code == 78
    assert variable in str(caught.value) and "is a pickle, which can run code when it is loaded" in str(caught.value)


def test_a_file_of_another_model_is_refused(tmp_path):
    save_file(under("model.diffusion_model.", original("sd3")), tmp_path / "sd3.safetensors")
    with pytest.raises(SettingsError, match="is of another family: holds no denoiser for BASE_MODEL=mini-flux"):
        model_folder(tmp_path, "flux", MODEL_PATH=str(tmp_path / "sd3.safetensors"))
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(SettingsError, match="is a LoRA, not a base model"):
        model_folder(tmp_path, "flux", MODEL_PATH=str(tmp_path / "lora.safetensors"))
    state = original("flux")
    save_file(under("", {"shared": state["img_in.bias"]}), tmp_path / "none.safetensors")
    with pytest.raises(SettingsError, match="holds no denoiser for BASE_MODEL=mini-flux"):
        model_folder(tmp_path, "flux", MODEL_PATH=str(tmp_path / "none.safetensors"))
    del state["img_in.bias"]
    save_file(under("", state), tmp_path / "less.safetensors")
    with pytest.raises(SettingsError, match=r"x_embedder\.bias is missing"):
        model_folder(tmp_path, "flux", MODEL_PATH=str(tmp_path / "less.safetensors"))


def test_a_damaged_file_is_refused(tmp_path):
    save_file(under("", original("flux")), tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-9])
    with pytest.raises(SettingsError, match="damaged or cut short"):
        model_folder(tmp_path, "flux", MODEL_PATH=str(tmp_path / "cut.safetensors"))


# ---- once, and in little memory


def test_a_file_is_converted_once(tmp_path):
    save_file(under("", original("flux")), tmp_path / "flux.safetensors")
    first = model_folder(tmp_path, "flux", MODEL_PATH=str(tmp_path / "flux.safetensors"))
    file = (first / "transformer" / "diffusion_pytorch_model.safetensors").resolve()
    before = file.stat().st_mtime_ns
    assert model_folder(tmp_path, "flux", MODEL_PATH=str(tmp_path / "flux.safetensors")) == first
    assert file.stat().st_mtime_ns == before


def test_a_gigabyte_is_converted_in_the_memory_of_a_few_tensors(tmp_path):
    """64 tensors of 16 MiB, each cut in three and put together in another order."""
    file = tmp_path / "big.safetensors"
    lazy_tensors.write_file(file, dict.fromkeys((f"layer.{i}" for i in range(64)), torch.ones(3 * 1024, 2731).half()))
    with memory_taken() as most:
        made = {name: torch.cat(tensor.chunk(3)[::-1]) for name, tensor in lazy_tensors.load_file(file, "").items()}
        lazy_tensors.write_file(tmp_path / "out.safetensors", made)
    assert (tmp_path / "out.safetensors").stat().st_size > 1e9
    assert most[0] < 100e6


def test_loading_never_holds_the_denoiser_twice(tmp_path):
    """Not even in another format than the file's."""
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=8, guidance_embeds=True)
    model.bfloat16().save_pretrained(tmp_path / "transformer")
    size = 4 * sum(p.numel() for p in model.parameters())
    del model
    with memory_taken() as most:
        there = get_family("flux").load_denoiser(tmp_path, device="cpu", dtype=torch.float32)
    assert size > 200e6 and {p.dtype for p in there.parameters()} == {torch.float32}
    assert most[0] < 1.3 * size
