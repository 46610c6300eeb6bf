"""Weights that are no numbers are found while they are loaded, with the names of the file and the tensor."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.original_names import flux_files, miniature
from tests.support.single_files import model_folder
from trainer.base_model import weight_check
from trainer.engine.load import load_denoiser
from trainer.spec.errors import SettingsError
from trainer.spec.family import get_family
from trainer.spec.plan import EnginePlan

CPU = EnginePlan(device="cpu", precision="fp32")


def spoil(file: Path, name: str, value: float) -> None:
    state = load_file(file)
    state[name] = state[name].float() if abs(value) > 65504 else state[name]
    state[name].view(-1)[-1] = value
    save_file(state, file)


@pytest.fixture(params=["flux", "sdxl", "sd3"])
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A family's name, and a copy of its miniature."""
    shutil.copytree(miniature(request.param), tmp_path / "model")
    return request.param, tmp_path / "model"


@pytest.mark.parametrize("where", ["first", "last", "middle"])
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("-inf"), "infinite")])
def test_the_denoiser(copy, where, value, word):
    name, folder = copy
    family = get_family(name)
    part = folder / family.FACTS.parts["denoiser"]
    (file,) = part.glob("*.safetensors")
    keys = sorted(key for key, tensor in load_file(file).items() if tensor.is_floating_point())
    key = {"first": keys[0], "last": keys[-1], "middle": keys[len(keys) // 2]}[where]
    if where == "first" and name == "sd3":
        key = "pos_embed.pos_embed"  # which is no parameter
    spoil(file, key, value)
    with pytest.raises(SettingsError) as caught:
        load_denoiser(family, folder, CPU, fused=family.FACTS.fused_targets, targets=family.FACTS.targets)
    assert f"{file}: {key} has " in str(caught.value) and word in str(caught.value)


def test_the_vae_and_the_text_encoders(copy):
    name, folder = copy
    family = get_family(name)
    spoil(folder / "vae" / "diffusion_pytorch_model.safetensors", "decoder.conv_in.bias", float("nan"))
    with pytest.raises(SettingsError, match=r"vae/diffusion_pytorch_model.safetensors: decoder.conv_in.bias has .*NaN"):
        family.load_vae(folder, device="cpu")
    for component in family.LORA_KEYS.encoders:
        file = folder / component / "model.safetensors"
        before = file.read_bytes()
        key = sorted(load_file(file))[0]
        spoil(file, key, float("nan"))
        with pytest.raises(SettingsError) as caught:
            family.load_encoders(folder, device="cpu", dtype=torch.float32)
        assert f"{file}: " in str(caught.value) and key.removeprefix("text_model.") in str(caught.value)
        file.write_bytes(before)


@pytest.mark.parametrize(("variable", "name", "key"), [
    ("MODEL_PATH", "flux_dev", "double_blocks.0.img_attn.proj.bias"),
    ("VAE_PATH", "ae", "decoder.conv_in.bias"),
    ("T5_PATH", "t5xxl_fp16", "shared.weight"),
])  # fmt: skip
def test_a_single_file_is_named_itself_while_it_is_converted(tmp_path, variable, name, key):
    files = flux_files(tmp_path, torch.float16)
    spoil(tmp_path / f"{name}.safetensors", key, float("nan"))
    with pytest.raises(SettingsError) as caught:
        model_folder(tmp_path, "flux", **files)
    assert f"{files[variable]}: " in str(caught.value) and "(NaN)" in str(caught.value)


def test_values_too_large_for_the_precision_are_said_so(tmp_path):
    model = torch.nn.Linear(2, 2).half()
    model.weight.data[0, 0] = torch.tensor(1e6)
    with pytest.raises(SettingsError, match="weight has infinite values, or values too large for float16"):
        weight_check.check_weights(model.named_parameters(), tmp_path)


def test_matrices_that_are_all_zero_are_a_warning(tmp_path, caplog):
    state = {f"{i}.weight": torch.zeros(2, 2) for i in range(5)} | {"bias": torch.zeros(2), "table": torch.arange(3)}
    with caplog.at_level(logging.WARNING):
        weight_check.check_weights(state.items(), None)
    assert caplog.messages == ["The base model: all zero, as if not trained: 0.weight, 1.weight, 2.weight and 2 more."]


def test_every_type_of_weights_shows_a_nan():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        tensor = torch.ones(1000, dtype=dtype)
        weight_check.check_tensor("x", tensor)
        tensor[500] = float("nan")
        with pytest.raises(weight_check.NotFiniteError):
            weight_check.check_tensor("x", tensor)
