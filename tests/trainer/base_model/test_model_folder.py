"""Damaged files of weights wherever a user may name one: named with what is wrong, and never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.original_names import miniature
from tests.support.damaged_files import DAMAGES
from trainer.base_model import loading, model_folder
from trainer.checkpoints import state_files
from trainer.export import export_command
from trainer.lora_files import convert, inspect
from trainer.sample import sample_command
from trainer.spec.errors import SettingsError
from trainer.spec.family import get_family
from trainer.storage import digests, safetensors_header

FACTS = get_family("flux").FACTS
VAE = "vae/diffusion_pytorch_model.safetensors"
INDEX = f"{VAE}.index.json"
SHARDS = (
    "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(miniature("flux"), tmp_path / "model")
    return tmp_path / "model"


def refusal(folder: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        model_folder.check_folder("MODEL_PATH=x", folder, FACTS.files, FACTS)
    message = str(caught.value)
    assert message.isprintable() and "again" in message  # the fix
    return message


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named_in_a_folder_and_alone(folder: Path, name: str) -> None:
    (folder / VAE).write_bytes(DAMAGES[name][0])
    assert f"{VAE} is " in refusal(folder)
    assert model_folder.damage(folder / VAE)
    with pytest.raises(SettingsError, match="vae cannot be used"):
        get_family("flux").load_vae(folder, device="cpu")


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_lora_is_refused_by_every_tool(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    lora = tmp_path / "x.safetensors"
    lora.write_bytes(DAMAGES[name][0])
    with pytest.raises(ValueError):
        inspect.summarize(safetensors_header.read_header(lora), "flux")
    with pytest.raises(ValueError):
        convert.load(lora, "flux")
    out = str(tmp_path / "out.safetensors")
    assert export_command([str(lora), "--to", "peft", "--out", out]) == 78
    drawing = ["--base", "mini-flux", "--prompt", "a cat", "--out", str(tmp_path / "images")]
    assert sample_command([*drawing, "--lora", str(lora)]) == 78
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_refused(tmp_path: Path, name: str) -> None:
    """Also one whose hash is right."""
    (tmp_path / "state.safetensors").write_bytes(DAMAGES[name][0])
    tree = {"dict": [["a", {"tensor": "0"}]]}
    text = json.dumps({"step": 1, "sha256": digests.sha256(tmp_path / "state.safetensors"), "tree": tree})
    (tmp_path / "state.json").write_text(json.dumps({"sha256": digests.digest(text), "text": text}))
    with pytest.raises(ValueError):
        state_files.read(tmp_path)


# ---- shards


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The VAE in two files with an index."""
    tensors = load_file(folder / VAE)
    names = sorted(tensors)
    for shard, part in zip(SHARDS, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / shard, {"format": "pt"})
    own = {name: SHARDS[i % 2].partition("/")[2] for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": own}))
    (folder / VAE).unlink()
    return folder


def changed_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        found = change(index)
        (folder / INDEX).write_text(json.dumps(index if found is None else found))

    return write


def _doubled(folder: Path) -> None:
    both = load_file(folder / SHARDS[0]) | load_file(folder / SHARDS[1])
    save_file(both, folder / SHARDS[0])


FIRST = SHARDS[0].partition("/")[2]
BAD_INDEXES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard outside": (
        changed_index(lambda i: i["weight_map"].update(x="../x.safetensors")),
        "allowed is a .safe",
    ),
    "an absolute shard": (
        changed_index(lambda i: i["weight_map"].update(x="/etc/x.safetensors")),
        "allowed is a .safe",
    ),
    "a pickle": (changed_index(lambda i: i["weight_map"].update(x="x.bin")), "allowed is a .safetensors"),
    "a number": (changed_index(lambda i: i["weight_map"].update(x=7)), "allowed is a .safetensors"),
    "a missing shard": (
        changed_index(lambda i: i["weight_map"].update(x="no.safetensors")),
        "vae/no.safetensors is missing",
    ),
    "another tensor": (changed_index(lambda i: i["weight_map"].update(x=FIRST)), "which has no such tensor"),
    "no table": (changed_index(lambda i: i.update(weight_map=[])), "no weight_map"),
    "no metadata": (changed_index(lambda i: i.pop("metadata") and None), "no metadata"),
    "empty": (changed_index(lambda i: {}), "no weight_map"),
    "a list": (changed_index(lambda i: []), "no JSON object"),
    "deep": (lambda folder: (folder / INDEX).write_text("[" * 50_000) and None, "not JSON"),
    "not text": (lambda folder: (folder / INDEX).write_bytes(b"\xff{}") and None, "UTF-8"),
    "a tensor in two shards": (_doubled, "is in diffusion_pytorch_model-00001-of-00002.safetensors and in"),
    "a damaged shard": (lambda folder: (folder / SHARDS[1]).write_bytes(b"x") and None, "damaged or cut short"),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_an_index_that_lies_is_named(sharded: Path, name: str) -> None:
    write, words = BAD_INDEXES[name]
    write(sharded)
    assert words in refusal(sharded)
    with pytest.raises(SettingsError):
        get_family("flux").load_vae(sharded, device="cpu")


def test_shards_are_loaded_and_the_size_that_an_index_declares_does_not_matter(sharded: Path) -> None:
    model_folder.check_folder("MODEL_PATH=x", sharded, FACTS.files, FACTS)
    whole = get_family("flux").load_vae(miniature("flux"), device="cpu").state_dict()
    found = get_family("flux").load_vae(sharded, device="cpu").state_dict()
    assert whole.keys() == found.keys() and all(torch.equal(whole[name], found[name]) for name in whole)


# ---- weights and their config


def test_weights_that_the_config_does_not_describe_are_named_before_they_are_loaded(folder: Path) -> None:
    """transformers would draw what is missing at random, and diffusers would end with a traceback."""
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    for changes, words in (
        ({name: None}, "its weights lack"),
        ({name: torch.zeros(3)}, r"has the shape \[3\] in its weights"),
        ({name: tensors[name].to(torch.int32)}, "is of type I32"),
    ):
        kept = {key: value for key, value in {**tensors, **changes}.items() if value is not None}
        save_file(kept, path, {"format": "pt"})
        with pytest.raises(SettingsError, match=words):
            loading.load_model(FACTS.kinds["text_encoder"], path.parent, device="cpu", dtype=torch.float32)
    save_file(tensors, path, {"format": "pt", safetensors_header.OUTLINE: "not downloaded yet"})
    with pytest.raises(SettingsError, match=r"model.safetensors: it was never downloaded"):
        loading.load_model(FACTS.kinds["text_encoder"], path.parent, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("text_encoder", {"hidden_size": 10**12}),
        ("text_encoder", {"vocab_size": 10**12}),
        ("text_encoder", {"num_hidden_layers": 10**12}),
        ("text_encoder_2", {"num_layers": -1}),
        ("text_encoder_2", {"d_ff": float("nan")}),
        ("transformer", {"num_layers": 10**400}),
        ("transformer", {"axes_dims_rope": [8, 8, 8]}),
        ("vae", {"block_out_channels": [10**9] * 4}),
        ("vae", {"latent_channels": True}),
        ("scheduler", {"num_train_timesteps": 10**12}),
        ("scheduler", {"shift": float("inf")}),
    ],
)
def test_sizes_that_no_model_has_are_named_before_memory_is_taken(folder: Path, part: str, changes: Any) -> None:
    config = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    said = refusal(folder)
    assert f"{part}/{config.name} " in said and (next(iter(changes)) in said)
    with pytest.raises(SettingsError):
        loading.read_config(folder / part, FACTS.kinds[part])


def test_parts_of_different_models_are_named(folder: Path) -> None:
    from trainer.base_model.single_file import convert_single_files
    from trainer.spec.plan import ModelPlan

    shutil.copytree(miniature("sdxl") / "vae", folder / "vae", dirs_exist_ok=True)
    plan = ModelPlan("mini-flux", "flux", str(folder), path=str(folder))
    with pytest.raises(SettingsError, match="transformer in_channels is 64, and 4 \\* vae latent_channels is 16"):
        convert_single_files(plan, folder.parent / "cache")


def test_an_end_of_hundreds_of_digits_is_no_size(tmp_path):
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, %s]}}' % (b"9" * 401)
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "it ends within its header" in (model_folder.damage(tmp_path / "x.safetensors") or "")
