"""Models whose repository or folder brings code: it is not downloaded, not run, and nobody is asked about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench.original_names import miniature
from tests.support.hub import Hub, read_folder
from trainer.base_model import model_folder
from trainer.base_model.single_file import convert_single_files
from trainer.spec.errors import SettingsError
from trainer.spec.family import get_family
from trainer.spec.plan import ModelPlan

ROOT = Path(__file__).parents[2]
FACTS = get_family("flux").FACTS
EVIL = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Evil: pass\n"
CLASS = "code.Evil"

# What a config says, by its file → the words of the refusal.
POISONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "tokenizer": ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, CLASS]}}, "auto_map="),
    "old tokenizer": ("tokenizer/tokenizer_config.json", {"auto_map": [CLASS, CLASS]}, "auto_map="),
    "of another repository": ("tokenizer_2/tokenizer_config.json", {"auto_map": [f"a/b--{CLASS}"] * 2}, "auto_map="),
    "tokenizer's class": ("tokenizer/tokenizer_config.json", {"tokenizer_class": "Evil"}, "tokenizer_class='Evil'"),
    "another known tokenizer": ("tokenizer/tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}, "tokenizer_"),
    "trust": ("tokenizer/tokenizer_config.json", {"trust_remote_code": True}, "trust_remote_code=True"),
    "text encoder": ("text_encoder/config.json", {"auto_map": {"AutoModel": CLASS}}, "auto_map="),
    "T5": ("text_encoder_2/config.json", {"auto_map": {"AutoConfig": CLASS}}, "auto_map="),
    "architecture": ("text_encoder/config.json", {"architectures": ["Evil"]}, "architectures=['Evil']"),
    "kind of model": ("text_encoder/config.json", {"model_type": "evil"}, "model_type='evil'"),
    "denoiser": ("transformer/config.json", {"auto_map": {"AutoModel": CLASS}}, "auto_map="),
    "class": ("vae/config.json", {"_class_name": "Evil"}, "_class_name='Evil'"),
    "class of a file": ("vae/config.json", {"_class_name": ["code", "Evil"]}, "_class_name=['code', 'Evil']"),
    "scheduler": ("scheduler/scheduler_config.json", {"_class_name": "Evil"}, "_class_name='Evil'"),
    "quantiser": ("text_encoder_2/config.json", {"quantization_config": "Evil"}, "quantised"),
    "pipeline": ("model_index.json", {"_class_name": ["pipeline", "Evil"]}, "which Kiln never downloads or runs"),
    "known pipeline": ("model_index.json", {"_class_name": "EvilPipeline"}, "_class_name='EvilPipeline'"),
    "custom pipelines": ("model_index.json", {"custom_pipelines": {"x": CLASS}}, "custom_pipelines="),
    "component": ("model_index.json", {"vae": ["code", "Evil"]}, "vae=['code', 'Evil']"),
    "known library": ("model_index.json", {"vae": ["diffusers", "VQModel"]}, "vae=['diffusers', 'VQModel']"),
    "another library": ("model_index.json", {"text_encoder": ["os", "system"]}, "text_encoder=['os', 'system']"),
    "more components": ("model_index.json", {"extra": ["code", "Evil"]}, "extra=['code', 'Evil']"),
}


def poisoned(name: str, marker: Path) -> dict[str, bytes]:
    """The files of a miniature with code beside each config, and one config that names it."""
    files = read_folder(miniature("flux"))
    place, says, _ = POISONS[name]
    files[place] = json.dumps({**json.loads(files[place]), **says}).encode()
    for folder in ("", "tokenizer/", "tokenizer_2/", "text_encoder/", "text_encoder_2/", "transformer/", "vae/"):
        for file in ("code.py", "pipeline.py", "modeling_clip.py", "tokenization_clip.py", "x.fp16.py"):
            files[f"{folder}{file}"] = EVIL.format(marker=str(marker)).encode()
    return files


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture
def job(server: Hub, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs a job that would train on a folder of one image, with an answer ready on stdin."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "1.png")

    def run(source: str, **variables: str) -> tuple[int, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "hf"), "BACKEND": "cpu"}
        environment |= {"BASE_MODEL": "mini-flux", "MODEL_PATH": source, "DATASET_NAME": str(tmp_path / "photos")}
        environment |= {"OUTPUT_PATH": str(tmp_path / "out"), "CACHE_PATH": str(tmp_path / "cache"), **variables}
        done = subprocess.run(
            [sys.executable, "-m", "entrypoint"],
            env=environment,
            cwd=ROOT,
            input="y\n" * 100,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_no_code_of_a_repository_is_downloaded_or_run(server: Hub, job: Any, tmp_path: Path) -> None:
    """Whatever the environment says, and with "y" on stdin."""
    marker = tmp_path / "marker"
    server.add("model", "org/evil", poisoned("tokenizer", marker))
    trusting = ("HF_HUB_TRUST_REMOTE_CODE", "TRANSFORMERS_TRUST_REMOTE_CODE", "HF_DATASETS_TRUST_REMOTE_CODE")
    code, log = job("org/evil", **dict.fromkeys(trusting, "1"))
    assert code == 78 and "tokenizer/tokenizer_config.json says auto_map=" in log, log
    assert "which Kiln never downloads or runs" in log and "Traceback" not in log and "[y/N]" not in log
    assert not marker.exists()
    assert [path for path in (tmp_path / "hf").rglob("*") if path.suffix == ".py"] == []
    asked = [request.path for request in server.log if ".py" in request.path or request.path.endswith(".safetensors")]
    assert asked == []  # nor the gigabytes of its weights


def test_code_beside_a_model_that_does_not_need_it_stays_where_it_is(server: Hub, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    names = poisoned("tokenizer", marker)
    assert {name for name in model_folder.wanted(names, FACTS.files) if name.endswith(".py")} == set()
    deep = ["tokenizer/more/tokenizer.json", "vae/a/b/config.json", "scheduler/x/scheduler_config.json"]
    assert model_folder.wanted(deep, FACTS.files) == set()


@pytest.mark.parametrize("name", POISONS)
def test_a_folder_that_names_code_or_another_class_is_refused_with_file_and_key(tmp_path: Path, name: str) -> None:
    """By the entrypoint, and by the trainer without it."""
    marker = tmp_path / "marker"
    folder = tmp_path / "model"
    for file, content in poisoned(name, marker).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    place, _, words = POISONS[name]
    with pytest.raises(SettingsError) as caught:
        model_folder.check_folder("MODEL_PATH=x", folder, FACTS.files, FACTS)
    assert words in str(caught.value) and place in str(caught.value) and caught.value.exit_code == 78
    if name != "quantiser" and place != "model_index.json":
        with pytest.raises(SettingsError, match="cannot be used"):
            _load_all(folder)
    assert not marker.exists()


def _load_all(folder: Path) -> None:
    """All that a job loads of a model."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    from trainer.families import common

    family = get_family("flux")
    convert_single_files(ModelPlan("mini-flux", "flux", str(folder), path=str(folder)), folder.parent / "cache")
    family.load_encoders(folder, device="cpu", dtype=torch.float32)
    family.load_denoiser(folder, device="cpu", dtype=torch.float32)
    family.load_vae(folder, device="cpu")
    common.load_scheduler(FlowMatchEulerDiscreteScheduler, folder, FACTS.kinds["scheduler"], None)


def test_a_job_on_a_local_folder_with_code_ends_with_78(job: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for file, content in poisoned("component", marker).items():
        (tmp_path / "model" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / file).write_bytes(content)
    code, log = job(str(tmp_path / "model"))
    assert code == 78 and "model_index.json says vae=['code', 'Evil']" in log and not marker.exists(), log
