"""Local weight files: what is asked of the Hub for them, and what a machine without a network says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from bench.original_names import miniature
from tests.support import full_size_files
from tests.support.hub import Hub
from tests.support.single_files import planned
from trainer.base_model import without_weights
from trainer.spec.family import BaseModel, base_models, get_family

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"  # refuses every connection
CLIP, T5, QWEN = "openai/clip-vit-large-patch14", "google-t5/t5-large", "Qwen/Qwen3-4B"
QWEN_VL, QWEN3_VL = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-4B-Instruct"
MISTRAL = "unsloth/Mistral-Small-3.1-24B-Instruct-2503"


def vocabularies() -> dict[str, dict[str, bytes]]:
    """The files of the open repositories, with the miniature's words."""
    model = json.loads((miniature("flux") / "tokenizer" / "tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {
        CLIP: {
            "vocab.json": json.dumps(model["vocab"]).encode(),
            "merges.txt": "\n".join(["#version: 0.2", *merges]).encode(),
            "model.safetensors": b"1.7 GB",
        },
        T5: {"tokenizer.json": (miniature("flux") / "tokenizer_2" / "tokenizer.json").read_bytes()},
        QWEN: {"tokenizer.json": (miniature("z_image") / "tokenizer" / "tokenizer.json").read_bytes()},
        QWEN_VL: {"tokenizer.json": (miniature("qwen_image") / "tokenizer" / "tokenizer.json").read_bytes()},
        QWEN3_VL: {"tokenizer.json": (miniature("krea2") / "tokenizer" / "tokenizer.json").read_bytes()},
        MISTRAL: {"tokenizer.json": (miniature("flux2_dev") / "tokenizer" / "tokenizer.json").read_bytes()},
    }


def repository(family: str, model: BaseModel) -> dict[str, bytes]:
    """The names of the files of a published model."""
    assert model.published is not None
    weights = {f"{folder}/model.safetensors": b"" for folder in get_family(family).FACTS.parts.values()}
    tokenizers = {f"{folder}/vocab.json": b"" for folder in model.published.tokenizers}
    return dict.fromkeys(model.published.configs, b"{}") | weights | tokenizers


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def hub(server: Hub) -> Iterator[Hub]:
    for name, files in vocabularies().items():
        server.add("model", name, files)
    for family, model in base_models().values():
        if not model.is_miniature:
            server.add("model", model.source, repository(family, model), gated=True)
    yield server
    server.reset()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Variables by BASE_MODEL."""
    place = tmp_path_factory.mktemp("weights")
    found = {"flux-dev": full_size_files.four_files(place)}
    for base in ("sdxl", "sd3.5-large"):
        found[base] = full_size_files.one_file(place, base)
    found["sd3"] = full_size_files.one_file(place, "sd3", without=("t5",)) | {"T5_PATH": "none"}
    return found


class Machine:
    """Runs the program with places of its own, and without a token."""

    def __init__(self, place: Path, endpoint: str) -> None:
        self.place = place
        (place / "photos").mkdir()
        Image.new("RGB", (64, 64)).save(place / "photos" / "1.png")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "PYTHONPATH": str(ROOT / "tests" / "support" / "roomy"),  # nothing of full size is written
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(place / "hf"),
            "BACKEND": "cpu",
            "DATASET_NAME": str(place / "photos"),
            "OUTPUT_PATH": str(place / "out"),
            "CACHE_PATH": str(place / "cache"),
        }

    def check(self, **variables: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "entrypoint", "--check"]
        environment = self.environment | variables
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        return run.returncode, run.stderr

    def fetch(self, **variables: str) -> Path:
        """The folder that the trainer gets, fetched in a process of its own."""
        code = (
            "import os, sys; from pathlib import Path\n"
            "from tests.support.single_files import planned\n"
            "from entrypoint.fetch.fetch import fetch_model\n"
            "hub = Path(os.environ['HF_HOME']) / 'hub'\n"
            "print(fetch_model(planned(os.environ), patterns=(), token=None, hub_cache=hub).path)"
        )
        environment = self.environment | variables
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
        return Path(run.stdout.strip())


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    return Machine(tmp_path, hub.endpoint)


@pytest.mark.parametrize("base", ["flux-dev", "sdxl", "sd3.5-large", "sd3"])
def test_local_files_ask_no_gated_repository_and_need_no_token(hub, machine, files, base):
    code, log = machine.check(BASE_MODEL=base, **files[base])
    assert code == 0, log
    repositories = {CLIP} if base in ("sdxl", "sd3") else {CLIP, T5}
    for repository in repositories:
        assert f"from {repository}, " in log and "It needs no token." in log
    asked = hub.asked() + hub.asked(method="HEAD")
    assert {request.path for request in asked} == {f"/api/models/{repository}" for repository in repositories}
    assert not any(request.authorized for request in asked)


def test_tokenizers_are_fetched_once_and_then_no_network_is_needed(hub, machine, files):
    folder = machine.fetch(BASE_MODEL="flux-dev", **files["flux-dev"])
    requests = len(hub.log)
    assert not [a for a in hub.log if "FLUX" in a.path or "safetensors" in a.path]
    assert json.loads((folder / "transformer" / "config.json").read_text())["num_single_layers"] == 38
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}):
        assert machine.fetch(BASE_MODEL="flux-dev", **files["flux-dev"], **offline) == folder
        code, log = machine.check(BASE_MODEL="flux-dev", **files["flux-dev"], **offline)
        assert code == 0 and "To fetch for the model: nothing." in log, log
    assert len(hub.log) == requests


def test_the_tokenizers_give_the_same_numbers(hub, machine, files):
    from transformers import AutoTokenizer

    folder = machine.fetch(BASE_MODEL="flux-dev", **files["flux-dev"])
    for name, length in (("tokenizer", 77), ("tokenizer_2", 512)):
        found = AutoTokenizer.from_pretrained(folder / name)
        want = AutoTokenizer.from_pretrained(miniature("flux") / name)
        assert found.model_max_length == length
        for text in ("a photo of a red circle, on  white", "Blue squares!\nA LINE"):
            assert found(text).input_ids == want(text).input_ids


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}], ids=["asked", "no route"])
def test_without_a_network_the_missing_files_are_named_within_seconds(machine, files, offline):
    began = time.monotonic()
    code, log = machine.check(BASE_MODEL="flux-dev", **files["flux-dev"], **offline)
    assert code == 75 and time.monotonic() - began < 30
    endpoint = offline.get("HF_ENDPOINT", machine.environment["HF_ENDPOINT"])
    error = log.split("ERROR", 1)[1]
    assert "the tokenizer of CLIP and T5" in error and "set MODEL_CONFIG_PATH=FOLDER" in error
    assert f"{endpoint}/{CLIP}/resolve/main/merges.txt to FOLDER/tokenizer;" in error
    assert f"{endpoint}/{T5}/resolve/main/tokenizer.json to FOLDER/tokenizer_2 " in error


def test_a_folder_of_tokenizers_is_the_way_out(machine, files, tmp_path):
    for folder, repository in (("tokenizer", CLIP), ("tokenizer_2", T5)):
        (tmp_path / "words" / folder).mkdir(parents=True)
        for name, content in vocabularies()[repository].items():
            (tmp_path / "words" / folder / name).write_bytes(content)
    asked = {**files["flux-dev"], "MODEL_CONFIG_PATH": str(tmp_path / "words"), "HF_ENDPOINT": NOWHERE}
    code, log = machine.check(BASE_MODEL="flux-dev", **asked)
    assert code == 0 and "To fetch for the model: nothing." in log, log
    (tmp_path / "words" / "tokenizer_2" / "tokenizer.json").unlink()
    code, log = machine.check(BASE_MODEL="flux-dev", **asked)
    assert code == 75 and f"{tmp_path / 'words'} has no tokenizer_2/ with tokenizer.json" in log, log


def test_a_gated_repository_is_asked_only_for_what_is_missing_and_the_files_that_help_are_named(machine, files):
    asked = {name: files["flux-dev"][name] for name in ("MODEL_PATH", "VAE_PATH")}
    code, log = machine.check(BASE_MODEL="flux-dev", **asked)
    assert code == 77 and "accept the conditions" in log, log
    assert "which need neither a token nor this repository: set CLIP_L_PATH, T5_PATH." in log


def test_a_hub_that_does_not_answer_is_said_with_what_was_wanted(machine):
    began = time.monotonic()
    code, log = machine.check(BASE_MODEL="flux-dev", HF_ENDPOINT=NOWHERE)
    assert code == 75 and time.monotonic() - began < 40
    assert f"BASE_MODEL=flux-dev: {NOWHERE}/black-forest-labs/FLUX.1-dev: ConnectError" in log
    assert "attempt 2 in" in log and "gives up in" in log
    assert "set MODEL_PATH, VAE_PATH, CLIP_L_PATH, T5_PATH" in log


def test_baked_tokenizers_need_no_network(machine, files, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "entrypoint.bake", "tokenizers", str(tmp_path / "baked"), str(tmp_path / "build")]
    run = subprocess.run(command, env=machine.environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    baked = tmp_path / "baked" / "tokenizers"
    assert {path.name for path in baked.iterdir()} == {
        name.replace("/", "--") for name in (CLIP, T5, QWEN, QWEN_VL, QWEN3_VL, MISTRAL)
    }
    for repository in (CLIP, T5, QWEN, QWEN_VL, QWEN3_VL, MISTRAL):
        place = baked / repository.replace("/", "--")
        assert {path.name: path.read_bytes() for path in place.iterdir()} == {
            name: content for name, content in vocabularies()[repository].items() if "safetensors" not in name
        }
    model = planned(machine.environment | {"BASE_MODEL": "flux-dev", **files["flux-dev"]})
    published = without_weights.published(model)
    assert published is not None
    assert len(without_weights.missing(model, published, hub_cache=tmp_path / "hub")) == 2
    monkeypatch.setattr(without_weights, "IN_IMAGE", baked)
    assert without_weights.missing(model, published, hub_cache=tmp_path / "hub") == []
