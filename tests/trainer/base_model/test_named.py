"""`trainer.sample --base`: files, parts and folders, with and without a network, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import save_file

from bench.layouts import write_zeros
from bench.original_names import checkpoint, flux_files, miniature
from tests.support import full_size_files
from tests.support.hub import Hub
from tests.support.published import OPEN, small_model, vocabularies
from trainer.base_model.named import Asked, find_base
from trainer.sample import read_prompts, sample_command
from trainer.spec.errors import SettingsError
from trainer.spec.family import base_models, get_family

ROOT = Path(__file__).parents[3]
FAMILIES = ["flux", "sdxl", "sd3"]
NOWHERE = "http://127.0.0.1:9"  # refuses every connection
# In a process of its own: huggingface_hub reads its variables when it is imported.
PROGRAM = """
import sys
from tests.support.published import small_model
from trainer.sample import sample_command
from trainer.spec.family import get_family

family, *arguments = sys.argv[1:]
get_family(family).FACTS.models["small"] = small_model(family)
sys.exit(sample_command(arguments))
"""


def files(place: Path, name: str) -> list[str]:
    """Options that name every part of the miniature as local files."""
    if name != "flux":
        save_file(checkpoint(name), place / "all.safetensors")
        return ["--base", str(place / "all.safetensors")]
    variables = flux_files(place, torch.float16)
    options = {"MODEL_PATH": "--base", "VAE_PATH": "--vae", "CLIP_L_PATH": "--clip-l", "T5_PATH": "--t5"}
    return [text for variable, option in options.items() for text in (option, variables[variable])]


class Machine:
    """Runs the command with a cache of its own, and without a token."""

    def __init__(self, place: Path, endpoint: str) -> None:
        self.place = place
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self.environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(place / "hf")}

    def sample(self, family: str, *arguments: str, **variables: str) -> tuple[int, str]:
        out = ["--out", str(self.place / "out"), "--cache", str(self.place / "cache")]
        prompt = ["--prompt", "a red circle --w 128 --h 128 --s 2"]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, family, *arguments, *prompt, *out],
            cwd=ROOT,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    return Machine(tmp_path, hub.endpoint)


def test_local_files_ask_no_gated_repository_and_then_no_network(hub, machine, tmp_path):
    name = "flux"
    for repository, content in vocabularies(name).items():
        hub.add("model", repository, content)
    code, log = machine.sample(name, *files(tmp_path, name))
    assert code == 0, log
    asked = hub.asked() + hub.asked(method="HEAD")
    assert asked and all(OPEN in request.path for request in asked)
    assert not any(request.authorized for request in asked)
    before = len(hub.log)
    drawn = (tmp_path / "out" / "step-00000000-00.png").read_bytes()
    code, log = machine.sample(name, *files(tmp_path, name), HF_HUB_OFFLINE="1")
    assert code == 0 and len(hub.log) == before, log
    assert (tmp_path / "out" / "step-00000000-00.png").read_bytes() == drawn


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}], ids=["asked", "no route"])
def test_a_tokenizer_that_is_missing_is_named_with_its_address(machine, tmp_path, offline):
    code, log = machine.sample("flux", *files(tmp_path, "flux"), **offline)
    endpoint = offline.get("HF_ENDPOINT", machine.environment["HF_ENDPOINT"])
    assert code == 75 and "Traceback" not in log
    assert "Not on this machine: the tokenizer of words of tokenizer" in log
    assert f"{endpoint}/{OPEN}-tokenizer_2/resolve/main/tokenizer.json to FOLDER/tokenizer_2" in log
    assert "add --config FOLDER" in log


def test_parts_that_no_file_holds_are_named_as_options(machine, tmp_path):
    base, vae = files(tmp_path, "flux")[1:4:2]
    code, log = machine.sample("flux", "--base", base, "--vae", vae, HF_HUB_OFFLINE="1")
    assert code == 75 and "--config small is not downloaded yet" in log
    assert "add --clip-l, --t5." in log


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_tokenizers_is_the_way_out(tmp_path, monkeypatch, name):
    monkeypatch.setitem(get_family(name).FACTS.models, "small", small_model(name))
    for repository, content in vocabularies(name).items():
        place = tmp_path / "words" / repository.removeprefix(f"{OPEN}-")
        place.mkdir(parents=True)
        (place / "tokenizer.json").write_bytes(content["tokenizer.json"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    common = ["--prompt", "a red circle --w 128 --h 128 --s 2", "--cache", str(tmp_path / "cache")]
    asked = {"a": [*files(tmp_path, name), "--config", str(tmp_path / "words")]}
    asked["b"] = [*files(tmp_path, name), "--config", str(miniature(name))]  # a whole model, for its configs
    images = []
    for out, arguments in asked.items():
        assert sample_command([*arguments, *common, "--out", str(tmp_path / out)]) == 0
        images.append(Image.open(tmp_path / out / "step-00000000-00.png"))
    assert ImageChops.difference(*images).getbbox() is None


@pytest.mark.parametrize(
    ("base", "distilled", "expected"),
    [("flux2", True, (4, 1.0)), ("flux2", False, (50, 4.0)), ("krea2", True, (8, 1.0)), ("krea2", False, (28, 5.5))],
)
def test_a_distilled_folder_is_drawn_in_few_steps_without_cfg(tmp_path, base, distilled, expected):
    place = tmp_path / "model"
    shutil.copytree(miniature(base), place)
    index = json.loads((place / "model_index.json").read_text())
    (place / "model_index.json").write_text(json.dumps({**index, "is_distilled": distilled}))
    found = find_base(asked(place))
    [prompt] = read_prompts(None, get_family(base).FACTS, found.model, texts=["a fox"])
    assert (prompt.steps, prompt.cfg) == expected


def asked(base: Path, config: str | None = None) -> Asked:
    return Asked(str(base), config, family=None, parts={}, lora_family=lambda: None, cache=base.parent / "cache")


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("z_image_turbo_bf16", "z-image-turbo"),
        ("zImageTurbo_v10", "z-image-turbo"),
        ("z_image_bf16", "z-image"),
        ("krea2_turbo_fp8_scaled", "krea2-turbo"),
        ("krea2_raw_bf16", "krea2"),
        ("Z-Image-De-Turbo", "z-image z-image-turbo"),
        ("mix of turbo and zimage", "z-image z-image-turbo"),
        ("model", "z-image z-image-turbo"),
    ],
)
def test_a_file_that_fits_two_models_is_the_one_of_its_name_or_asked_about(tmp_path, caplog, file, model):
    """By full-size headers: the tensors of both models are the same."""
    caplog.set_level(logging.INFO)
    path = tmp_path / f"{file}.safetensors"
    write_zeros(path, full_size_files.denoiser(model.partition(" ")[0]))
    if " " in model:
        with pytest.raises(SettingsError, match=f"tell which: {model.replace(' ', ', ')}. Fix: --config"):
            find_base(asked(path))
        for config in model.split():
            assert find_base(asked(path, config)).model is base_models()[config][1]
    else:
        assert find_base(asked(path)).model is base_models()[model][1]
        assert f"is taken for {model}, by its name" in caplog.text


def test_a_part_of_its_own_takes_the_place_of_the_models(tmp_path):
    """Also beside a value of BASE_MODEL, and beside a folder."""
    vae = files(tmp_path, "flux")[3]
    common = ["--prompt", "a red circle --w 64 --h 64 --s 1", "--cache", str(tmp_path / "cache")]
    for base in ("mini-flux", str(miniature("flux"))):
        assert sample_command(["--base", base, "--vae", vae, *common, "--out", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "cache" / "models").glob("*/vae/diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base", "mini-flux", "--config", "mini-flux"], "it goes with a --base that is a file"),
        (["--base", "mini-flux", "--family", "sdxl"], "--base mini-flux is for flux"),
        (["--base", "mini-flux", "--clip-g", "{vae}"], "--clip-g {vae} is not used: flux has no such part"),
        (["--base", "mini-flux", "--vae", "none"], "--vae none leaves out a part that the base model needs"),
        (["--base", "mini-flux", "--vae", "{tmp}/no.safetensors"], "no.safetensors is not there"),
        (["--base", "mini-flux", "--vae", "{tmp}"], "has no config.json"),
        (["--base", "mini-flux", "--vae", "{t5}"], "is T5, not a VAE. Fix: --t5 this file"),
        (
            ["--base", "{vae}"],
            "has no denoiser of flux, flux2, krea2, qwen_image, sd3, sdxl, z_image. It is a VAE: --vae {vae}",
        ),
        (["--base", "{base}", "--config", "{tmp}/none"], "is neither a folder nor one of "),
        (["--base", "{base}", "--config", "sdxl"], "is neither a folder nor one of "),
        (["--base", "{tmp}/x.gguf"], "is a GGUF file"),
        (["--base", "{tmp}/cut.safetensors"], "is damaged or cut short"),
        (["--base", "{tmp}/nf4.safetensors"], "is quantised by bitsandbytes (nf4)"),
        (["--base", "{tmp}/lora.safetensors"], "is a LoRA, not a base model"),
    ],
)
def test_what_cannot_be_a_base_is_named(tmp_path, caplog, arguments, words):
    caplog.set_level(logging.INFO)
    base, vae, _, t5 = files(tmp_path, "flux")[1::2]
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "cut.safetensors").write_bytes(Path(base).read_bytes()[:-100])
    quantised = {
        "double_blocks.0.img_attn.qkv.weight": torch.zeros(1),
        "a.quant_state.bitsandbytes__nf4": torch.ones(1),
    }
    save_file(quantised, tmp_path / "nf4.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    names = {"tmp": str(tmp_path), "base": base, "vae": vae, "t5": t5}
    arguments = [argument.format(**names) for argument in arguments]
    assert sample_command([*arguments, "--prompt", "a", "--out", str(tmp_path / "out")]) == 78
    assert words.format(**names) in caplog.text, caplog.text
