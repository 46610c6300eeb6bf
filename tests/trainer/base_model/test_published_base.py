"""A published base from local files alone: configs are the family's, tokenizers a folder's, and nothing is asked."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from bench.original_names import checkpoint, flux_files, miniature, weights
from entrypoint.fetch.fetch import fetch_model
from tests.support.published import small_model
from tests.support.single_files import planned
from trainer.base_model import single_file
from trainer.spec.family import get_family


@pytest.fixture(params=["flux", "sdxl", "sd3"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a family that has one more published model, gated and of a miniature's size: BASE_MODEL=small."""
    name = request.param
    monkeypatch.setitem(get_family(name).FACTS.models, "small", small_model(name))
    return name


def test_local_files_and_a_folder_of_tokenizers_make_the_model(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if small == "flux":
        variables = flux_files(tmp_path, torch.float16)
    else:
        save_file(checkpoint(small), tmp_path / "all.safetensors")
        variables = {"MODEL_PATH": str(tmp_path / "all.safetensors")}
    (tmp_path / "pictures").mkdir()
    words = tmp_path / "words"
    for folder in miniature(small).glob("tokenizer*"):
        (words / folder.name).mkdir(parents=True)
        (words / folder.name / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    environment = {"BASE_MODEL": "small", "DATASET_NAME": str(tmp_path / "pictures"), "BACKEND": "cpu"}
    plan = planned(environment | variables | {"MODEL_CONFIG_PATH": str(words)})
    fetched = fetch_model(plan, patterns=(), token=None, hub_cache=tmp_path / "hf" / "hub")
    folder = single_file.convert_single_files(fetched, tmp_path / "cache")
    family = get_family(small)
    found = family.load_encoders(folder, device="cpu", dtype=torch.float32)
    want = family.load_encoders(miniature(small), device="cpu", dtype=torch.float32)
    (a,), (b,) = (family.encode_text(encoders, ["a photo of a red circle"]) for encoders in (found, want))
    assert torch.equal(a["tokens"], b["tokens"])
    part = family.FACTS.parts["denoiser"]
    for name, tensor in weights(miniature(small) / part).items():
        assert torch.equal(weights(folder / part)[name].float(), tensor.half().float()), name
    family.load_vae(folder, device="cpu")
