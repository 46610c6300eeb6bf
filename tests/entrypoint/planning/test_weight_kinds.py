"""Files that cannot be the base model or a part of it are refused in the plan, by what they are, with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.layouts import write_zeros
from bench.original_names import checkpoint, miniature, original, under, vae_original
from tests.support import full_size_files
from tests.support.single_files import planned
from trainer.base_model import model_folder, without_weights
from trainer.spec.errors import SettingsError
from trainer.spec.family import base_models, get_family

F16 = torch.zeros(1).half()


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """What the plan says to variables."""
    (tmp_path / "images").mkdir()

    def plan(base: str, **variables: str) -> str:
        common = {"BASE_MODEL": base, "DATASET_NAME": str(tmp_path / "images"), "BACKEND": "cpu"}
        with pytest.raises(SettingsError) as caught:
            planned(common | variables)
        assert caught.value.exit_code == 78
        return str(caught.value)

    return plan


def zeros(path: Path, state: Mapping[str, torch.Tensor]) -> str:
    write_zeros(path, dict(state))
    return str(path)


UNET = {"input_blocks.0.0.weight": meta(320, 4, 3, 3)}
ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
OTHERS = {
    "lora": ({"lora_unet_x.lora_down.weight": F16}, "is a LoRA, not a base model. Fix: PARAMS_RESUME_FROM"),
    "peft": ({"transformer.x.lora_A.weight": F16}, "is a LoRA"),
    "lokr": ({"lycoris_x.lokr_w1": F16}, "is a LoRA"),
    "controlnet": ({"control_model.input_blocks.0.0.weight": F16}, "is a ControlNet"),
    "controlnet of diffusers": ({"controlnet_cond_embedding.conv_in.weight": F16}, "is a ControlNet"),
    "ip-adapter": ({"ip_adapter.1.to_k_ip.weight": F16}, "is an IP-Adapter"),
    "sd 1": (under("model.diffusion_model.", {**UNET, ATTENTION: meta(320, 768)}), "is Stable Diffusion 1.x"),
    "sd 2": (under("model.diffusion_model.", {**UNET, ATTENTION: meta(320, 1024)}), "is Stable Diffusion 2.x"),
    "refiner": (
        under("model.diffusion_model.", {"input_blocks.0.0.weight": meta(384, 4, 3, 3)}),
        "is the refiner of Stable Diffusion XL, which is not trained here",
    ),
    "inpainting": ({"input_blocks.0.0.weight": meta(320, 9, 3, 3)}, "is a model that paints into images"),
    "fill": ({"img_in.weight": meta(3072, 384)}, "is Flux.1 Fill"),
    "chroma": ({"distilled_guidance_layer.in_proj.weight": F16}, "is Chroma"),
    "flux 2": (
        {"double_stream_modulation_img.lin.weight": F16, "double_blocks.0.img_attn.qkv.weight": F16},
        "is of another family: holds no denoiser for BASE_MODEL=flux-dev. Fix: BASE_MODEL=flux2-klein-4b",
    ),
    "wan": ({"blocks.0.self_attn.q.weight": F16}, "is Wan"),
    "qwen": (
        under("model.diffusion_model.", {"txt_in.text_norm.weight": F16}),
        "is Qwen-Image 2.1, another architecture",
    ),
    "nf4": (
        {"double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": F16},
        "is quantised by bitsandbytes (nf4), which is not read",
    ),
    "svdquant": ({"transformer_blocks.0.qkv_proj.wscales": F16}, "is quantised by nunchaku (SVDQuant)"),
    "quanto": ({"x.weight._data": F16}, "is quantised by quanto"),
    "torchao": ({"x._weight_qdata": F16}, "is quantised by torchao"),
    "nvfp4": ({"x.weight_scale_2": F16}, "is quantised by nvfp4"),
    "int8": ({"x.weight": meta(512, 512, dtype=torch.int8)}, "is quantised by a tool that stores I8"),
    "rows": (
        {"x.weight": meta(4, 4), "x.weight_scale": meta(4, 1)},
        "is quantised by a tool with a scale for each row",
    ),
    "nothing": ({"weight": F16}, "holds no denoiser for BASE_MODEL=flux-dev. Fix: a file of flux-dev"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_is_no_base_model_is_said_to_be_what_it_is(refusal, tmp_path, name, monkeypatch):
    state, expected = OTHERS[name]
    from trainer.base_model import lazy_tensors

    monkeypatch.setitem(lazy_tensors.DTYPE_NAMES, torch.int8, "I8")
    said = refusal("flux-dev", MODEL_PATH=zeros(tmp_path / "file.safetensors", state))
    assert expected in said and "MODEL_PATH=" in said and "Fix: " in said


@pytest.mark.parametrize("original", [True, False], ids=["original names", "diffusers' names"])
@pytest.mark.parametrize(
    ("asked", "given"),
    [
        *(("flux2-klein-4b", "flux2-dev"), ("flux2-klein-9b", "flux2-dev")),
        *(("flux2-dev", "flux2-klein-4b"), ("flux2-dev", "flux2-klein-9b"), ("flux2-klein-9b", "flux2-klein-4b")),
    ],
)
def test_a_file_of_another_size_of_flux2_names_that_one(refusal, tmp_path, asked, given, original):
    state = full_size_files.denoiser(given) if original else full_size_files.parts(given)["denoiser"]
    said = refusal(asked, MODEL_PATH=zeros(tmp_path / "file.safetensors", state))
    assert f"is of another base model. Fix: BASE_MODEL={given}." in said


@pytest.mark.parametrize(
    ("asked", "actual", "fix"),
    [
        ("flux-schnell", "flux-dev", "BASE_MODEL=flux"),
        ("flux-dev", "flux-schnell", "BASE_MODEL=flux-schnell"),
        ("sd3", "sd3.5-large", "BASE_MODEL=sd3.5-large"),
        ("sd3.5-medium", "sd3", "BASE_MODEL=sd3"),
        ("flux-dev", "sdxl", "BASE_MODEL=sdxl"),
        ("sdxl", "flux-dev", "BASE_MODEL=flux"),
        ("flux-dev", "flux2-klein-9b", "BASE_MODEL=flux2-klein-9b"),
        ("flux2-klein-4b", "flux-dev", "BASE_MODEL=flux"),
        ("flux2-klein-4b", "flux2-klein-9b", "BASE_MODEL=flux2-klein-9b"),
        ("flux2-klein-9b", "flux2-klein-4b", "BASE_MODEL=flux2-klein-4b"),
        ("flux-dev", "flux2-dev", "BASE_MODEL=flux2-dev"),
        ("flux2-dev", "flux-dev", "BASE_MODEL=flux"),
        ("flux-dev", "krea2", "BASE_MODEL=krea2"),
        ("krea2", "flux-dev", "BASE_MODEL=flux"),
    ],
)
def test_a_file_of_another_base_model_names_that_one(refusal, tmp_path, asked, actual, fix):
    said = refusal(asked, MODEL_PATH=zeros(tmp_path / "file.safetensors", full_size_files.denoiser(actual)))
    assert "is of another" in said and f"Fix: {fix}." in said


def test_a_part_given_as_the_model_names_the_variable_that_takes_it(refusal, tmp_path):
    parts = full_size_files.parts("flux-dev")
    for part, variable in (("vae", "VAE_PATH"), ("clip_l", "CLIP_L_PATH"), ("t5", "T5_PATH")):
        said = refusal("flux-dev", MODEL_PATH=zeros(tmp_path / f"{part}.safetensors", parts[part]))
        assert f"Fix: {variable}=this file" in said


@pytest.mark.parametrize(
    ("variable", "part", "base", "expected"),
    [
        ("T5_PATH", "clip_l", "flux-dev", "is CLIP-L, not T5. Fix: CLIP_L_PATH=this file"),
        ("CLIP_L_PATH", "t5", "flux-dev", "is T5, not CLIP-L. Fix: T5_PATH=this file"),
        ("CLIP_L_PATH", "clip_g", "sd3", "is CLIP-G, not CLIP-L. Fix: CLIP_G_PATH=this file"),
        ("CLIP_G_PATH", "clip_l", "sd3", "is CLIP-L, not CLIP-G. Fix: CLIP_L_PATH=this file"),
        ("VAE_PATH", "clip_l", "flux-dev", "is CLIP-L, not a VAE. Fix: CLIP_L_PATH=this file"),
        ("VAE_PATH", "vae", "sdxl", "is a VAE of 4 channels; this base model's has 16"),
        ("T5_PATH", "lora", "flux-dev", "is a LoRA, not T5"),
        ("T5_PATH", "umt5", "flux-dev", "is another T5, of 256384 tokens and width 4096. Fix: T5 v1.1 XXL"),
        ("CLIP_L_PATH", "long", "flux-dev", "is a CLIP for 248 tokens"),
        ("CLIP_L_PATH", "vision", "flux-dev", "is CLIP's image encoder"),
        ("VAE_PATH", "decoder", "flux-dev", "is a decoder alone. Fix: a VAE with its encoder"),
        ("T5_PATH", "nf4", "flux-dev", "is quantised by bitsandbytes (nf4)"),
    ],
)
def test_a_part_that_is_another_is_said(refusal, tmp_path, variable, part, base, expected):
    layer = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    block = "encoder.block.0.layer.0.SelfAttention.q.weight"
    made = {
        "lora": {"lora_te1_x.lora_down.weight": F16},
        "umt5": {"shared.weight": meta(256384, 4096), block: meta(4096, 4096)},
        "long": {
            "text_model.embeddings.token_embedding.weight": meta(49408, 768),
            "text_model.embeddings.position_embedding.weight": meta(248, 768),
            layer: meta(768, 768),
        },
        "vision": {"vision_model.encoder.layers.0.self_attn.q_proj.weight": F16},
        "decoder": {"decoder.conv_in.weight": meta(512, 16, 3, 3)},
        "nf4": {"shared.weight": F16, f"{block}.quant_state.bitsandbytes__nf4": F16},
    }
    state = made[part] if part in made else full_size_files.parts(base)[part]
    asked = "sd3" if part == "vae" else base
    said = refusal(asked, **{variable: zeros(tmp_path / "file.safetensors", state)})
    assert f"{variable}=" in said and expected in said


@pytest.mark.parametrize(
    ("asked", "given", "expected"),
    [
        ("flux2-klein-9b", "flux2-klein-4b", "is Qwen3-4B, of width 2560; this base model reads by Qwen3-8B"),
        ("flux2-klein-4b", "flux2-klein-9b", "is Qwen3-8B, of width 4096; this base model reads by Qwen3-4B"),
        ("flux2-dev", "flux2-klein-9b", "is Qwen3, not the text encoder of FLUX.2-dev. Fix: the file of"),
        ("flux2-klein-9b", "flux2-dev", "is the text encoder of FLUX.2-dev, not Qwen3. Fix: the file of Qwen3"),
    ],
)
def test_a_text_encoder_of_another_size_is_named(refusal, tmp_path, asked, given, expected):
    found = full_size_files.parts(given)
    state = found["qwen3"] if "qwen3" in found else found["mistral3"]
    said = refusal(asked, TEXT_ENCODER_PATH=zeros(tmp_path / "file.safetensors", state))
    assert "TEXT_ENCODER_PATH=" in said and expected in said


OTHER_LANGUAGE_MODEL = "is not the text encoder of FLUX.2-dev, but a language model that no base model reads"


@pytest.mark.parametrize(
    ("tokens", "width", "mlp", "expected"),
    [
        (32768, 4096, 14336, OTHER_LANGUAGE_MODEL),
        (131072, 4096, 12288, "is Ministral 8B, of width 4096; this base model reads by the text encoder of FLUX.2"),
        (
            131072,
            5120,
            14336,
            "has 14336 numbers in an MLP, and the text encoder of FLUX.2-dev as this base model reads by it 32768",
        ),
        (128256, 4096, 14336, OTHER_LANGUAGE_MODEL),
        (256000, 2304, 9216, OTHER_LANGUAGE_MODEL),
    ],
    ids=["Mistral 7B", "Ministral 8B", "Mistral Nemo", "Llama 3.1 8B", "Gemma 2 2B"],
)
def test_another_mistral_is_not_flux2_devs(refusal, tmp_path, tokens, width, mlp, expected):
    state = {
        "model.embed_tokens.weight": meta(tokens, width),
        "model.layers.0.self_attn.q_proj.weight": meta(4096, width),
        "model.layers.0.mlp.gate_proj.weight": meta(mlp, width),
    }
    said = refusal("flux2-dev", TEXT_ENCODER_PATH=zeros(tmp_path / "file.safetensors", state))
    assert "TEXT_ENCODER_PATH=" in said and expected in said


def test_flux2_dev_as_comfyui_has_it_needs_no_repository(tmp_path, monkeypatch):
    """Its text encoder without the last ten layers and the last norm, and with the vocabulary beside the weights."""
    from trainer.base_model import lazy_tensors

    monkeypatch.setitem(lazy_tensors.DTYPE_NAMES, torch.uint8, "U8")
    (tmp_path / "images").mkdir()
    found = full_size_files.parts("flux2-dev")
    texts = {name: tensor for name, tensor in found["mistral3"].items() if name != "norm.weight"}
    texts = under("model.", texts) | {"tekken_model": meta(14_801_223, dtype=torch.uint8)}
    files = {
        "MODEL_PATH": zeros(tmp_path / "flux2_dev.safetensors", full_size_files.denoiser("flux2-dev")),
        "VAE_PATH": zeros(tmp_path / "vae.safetensors", vae_original(found["vae"])),
        "TEXT_ENCODER_PATH": zeros(tmp_path / "mistral_3_small_flux2_bf16.safetensors", texts),
    }
    common = {"BASE_MODEL": "flux2-dev", "DATASET_NAME": str(tmp_path / "images"), "BACKEND": "cpu"}
    plan = planned({**common, **files})
    assert set(plan.parts) == {"denoiser", "vae", "mistral3"}
    assert without_weights.published(plan) is base_models()["flux2-dev"][1].published


def test_flux2_klein_of_the_width_of_flux1_passes(tmp_path):
    (tmp_path / "images").mkdir()
    common = {"DATASET_NAME": str(tmp_path / "images"), "BACKEND": "cpu"}
    found = full_size_files.parts("flux2-klein-4b")
    files = {
        "MODEL_PATH": zeros(tmp_path / "klein.safetensors", full_size_files.denoiser("flux2-klein-4b")),
        "VAE_PATH": zeros(tmp_path / "vae.safetensors", found["vae"]),
        "TEXT_ENCODER_PATH": zeros(tmp_path / "qwen.safetensors", found["qwen3"]),
    }
    assert set(planned({"BASE_MODEL": "flux2-klein-4b", **common, **files}).parts) == {"denoiser", "vae", "qwen3"}


def test_the_vae_of_flux1_is_not_this_ones(refusal, tmp_path):
    state = full_size_files.parts("flux-dev")["vae"]
    said = refusal("flux2-klein-4b", VAE_PATH=zeros(tmp_path / "ae.safetensors", state))
    assert "is a VAE of 16 channels; this base model's has 32" in said


def test_the_files_that_are_right_pass(tmp_path):
    (tmp_path / "images").mkdir()
    common = {"DATASET_NAME": str(tmp_path / "images"), "BACKEND": "cpu"}
    full = full_size_files.parts("flux-dev")["t5"] | {"decoder.block.0.layer.0.SelfAttention.q.weight": meta(8, 8)}
    files = full_size_files.four_files(tmp_path) | {"T5_PATH": zeros(tmp_path / "full_t5.safetensors", full)}
    assert set(planned({"BASE_MODEL": "flux-krea", **common, **files}).parts) == {"denoiser", "vae", "clip_l", "t5"}
    scaled = {f"{name}_scale": meta() for name in ("double_blocks.0.img_mlp.0.weight",)}
    files["MODEL_PATH"] = zeros(tmp_path / "scaled.safetensors", full_size_files.denoiser("flux-dev") | scaled)
    assert planned({"BASE_MODEL": "flux-dev", **common, **files}).parts["denoiser"].endswith("scaled.safetensors")


# ---- what is no safetensors file at all


CONTENTS: dict[str, tuple[bytes, str]] = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "is a Git LFS pointer"),
    "page": (b"<!DOCTYPE html><html><title>Sign in</title>" + bytes(600), "is a web page and not weights"),
    "refusal": (b'{"error": "Access to model is restricted"}', "is a message and not weights"),
    "words": (b"Access to model black-forest-labs is restricted.", "is a message and not weights"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(600), "is a GGUF file"),
    "zip": (b"PK\x03\x04" + bytes(600), "is a pickle with the name of a safetensors file"),
    "pickle": (b"\x80\x02}q\x00." + bytes(600), "is a pickle with the name of a safetensors file"),
    "empty": (b"", "it is empty"),
    "noise": (bytes(range(256)) * 4, "is damaged or cut short"),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("variable", ["MODEL_PATH", "T5_PATH"])
def test_content_that_is_no_weights_is_named(refusal, tmp_path, name, variable):
    content, expected = CONTENTS[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    assert expected in refusal("mini-flux", **{variable: str(tmp_path / "x.safetensors")})


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_a_download_that_was_cut_off_says_how_much_is_there(refusal, tmp_path, share):
    save_file(under("", original("flux")), tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: int(len(content) * share)])
    said = refusal("mini-flux", MODEL_PATH=str(tmp_path / "cut.safetensors"))
    assert ("ends within its header" if share < 0.01 else "MiB of ") in said


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flux1-dev-Q8_0.gguf", "is a GGUF file, which is quantised in a way that is not read"),
        ("model.onnx", "is an ONNX file, which cannot be trained"),
        ("flax_model.msgpack", "Flax or TensorFlow"),
        ("model.ckpt", "convert it to .safetensors where you trust it"),
    ],
)
@pytest.mark.parametrize("variable", ["MODEL_PATH", "T5_PATH"])
def test_other_formats_are_named(refusal, tmp_path, name, expected, variable):
    (tmp_path / name).write_bytes(b"anything")
    assert expected in refusal("flux-dev", **{variable: str(tmp_path / name)})


# ---- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder of the miniature."""
    shutil.copytree(miniature("flux"), tmp_path / "model")
    return tmp_path / "model"


def check(folder: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        facts = get_family("flux").FACTS
        model_folder.check_folder("MODEL_PATH=x", folder, facts.files, facts)
    return str(caught.value)


def write_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_a_folder_that_was_quantised_is_refused(folder, part):
    write_config(
        folder / part,
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    )
    assert f"{part}/config.json is quantised by bitsandbytes (nf4), which is not read" in check(folder)


def test_quantised_weights_without_a_word_in_the_config_are_refused(folder):
    file = next((folder / "transformer").glob("*.safetensors"))
    save_file(load_file(file) | {"x.weight.absmax": torch.zeros(1)}, file)
    assert "is quantised by bitsandbytes, which is not read" in check(folder)


def test_one_part_alone_a_lora_and_gguf_files_are_said(tmp_path, folder):
    assert "one part of a model alone" in check(folder / "transformer")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert "it is a LoRA and not a base model; PARAMS_RESUME_FROM" in check(tmp_path / "lora")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "flux1-dev-Q4_0.gguf").write_bytes(b"")
    assert "it holds GGUF files" in check(tmp_path / "gguf")


def test_a_part_with_the_weights_of_another_framework_says_which(folder):
    (folder / "text_encoder" / "model.safetensors").rename(folder / "text_encoder" / "flax_model.msgpack")
    assert "text_encoder/flax_model.msgpack has the weights for Flax" in check(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"in_channels": 384}, "not trained here: transformer/config.json says in_channels=384, and not 64"),
        ({"_class_name": "NunchakuFluxTransformer2dModel"}, "transformer/ has a NunchakuFluxTransformer2dModel"),
    ],
)
def test_a_folder_of_another_model_is_refused(folder, changes, expected):
    from entrypoint.fetch.fetch import fetch_model
    from trainer.spec.plan import ModelPlan

    published = get_family("flux").FACTS.models["flux-dev"].published
    (folder / "transformer" / "config.json").write_text(
        json.dumps(published.configs["transformer/config.json"] | changes)
    )
    with pytest.raises(SettingsError, match=expected):
        fetch_model(ModelPlan("flux-dev", "flux", str(folder)), patterns=get_family("flux").FACTS.files, token=None)


@pytest.mark.parametrize(
    ("asked", "actual", "fix"),
    [
        *(("flux-dev", "sdxl", "sdxl"), ("sdxl", "flux-schnell", "flux"), ("sd3", "sdxl", "sdxl")),
        *(("flux2-klein-4b", "flux2-dev", "flux2-dev"), ("flux2-dev", "flux2-klein-9b", "flux2-klein-9b")),
    ],
)
def test_a_folder_of_another_base_model_names_it(tmp_path, asked, actual, fix):
    from entrypoint.fetch.fetch import fetch_model
    from trainer.spec.family import base_models
    from trainer.spec.plan import ModelPlan

    for name, config in base_models()[actual][1].published.configs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(SettingsError, match=rf"is of another base model than {asked}: .* Fix: BASE_MODEL={fix}"):
        fetch_model(ModelPlan(asked, base_models()[asked][0], str(tmp_path)), patterns=(), token=None)


def test_a_revision_of_a_repository_that_nothing_is_taken_from_is_refused(refusal, tmp_path):
    said = refusal("sdxl", MODEL_REVISION="v1", **full_size_files.one_file(tmp_path, "sdxl"))
    assert "MODEL_REVISION='v1': all weights are local files" in said and "Fix: remove it" in said


def test_a_part_in_a_folder_is_checked_too(refusal, tmp_path):
    shutil.copytree(miniature("flux") / "text_encoder_2", tmp_path / "t5")
    write_config(tmp_path / "t5", quantization_config={"quant_method": "quanto"})
    assert "is quantised by quanto" in refusal("mini-flux", T5_PATH=str(tmp_path / "t5"))
    (tmp_path / "t5" / "model.safetensors").write_bytes(b"<html>")
    assert "model.safetensors is a web page" in refusal("mini-flux", T5_PATH=str(tmp_path / "t5"))


def test_every_miniature_and_its_parts_pass(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("flux", "sdxl", "sd3"):
        save_file(checkpoint(name), tmp_path / f"{name}.safetensors")
        vae = vae_original(load_file(miniature(name) / "vae" / "diffusion_pytorch_model.safetensors"))
        save_file(under("", vae), tmp_path / f"{name}-vae.safetensors")
        planned(
            {
                "BASE_MODEL": f"mini-{name}",
                "DATASET_NAME": str(tmp_path / "images"),
                "MODEL_PATH": str(tmp_path / f"{name}.safetensors"),
                "VAE_PATH": str(tmp_path / f"{name}-vae.safetensors"),
            }
        )
