"""PARAMS_TRAINING_ADAPTER: which names it takes, and how a file of the Hub comes to a job."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.fetch import http, training_adapter
from entrypoint.fetch.training_adapter import fetch_training_adapter
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from tests.support.hub import Hub
from tests.support.machines import CPU, NOW
from trainer.spec.errors import SettingsError, UnreachableError

NAME = "someone/adapters/turbo/v2.safetensors"
NO_PATIENCE = dataclasses.replace(http.USUAL, budget=0.0)


def planned(name, base="mini-z-image", **variables):
    settings = read_settings(
        {"BASE_MODEL": base, "DATASET_NAME": "org/images", "PARAMS_TRAINING_ADAPTER": str(name), **variables}
    )
    return make_plan(settings, read_manifest(None, None), CPU, now=NOW).model


def lora(path, module="diffusion_model.layers.0.attention.to_q", *, dora=False):
    tensors = {f"{module}.lora_A.weight": torch.randn(4, 128), f"{module}.lora_B.weight": torch.randn(128, 4)}
    if dora:
        tensors[f"{module}.lora_magnitude_vector"] = torch.ones(128)
    save_file(tensors, path)
    return path


@pytest.fixture
def hub(monkeypatch):
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def test_a_file_is_named_from_the_root_and_part_of_what_the_run_is(tmp_path, monkeypatch):
    path = lora(tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    assert planned("a.safetensors").training_adapter == str(path) == planned(path).training_adapter
    assert planned(NAME).training_adapter == NAME and planned("none").training_adapter is None


@pytest.mark.parametrize(
    "name",
    ["someone/adapters", "v2.safetensors", "a/v2.safetensors", "/nowhere/v2.safetensors", "a/../b/v2.safetensors"],
)
def test_what_is_neither_a_file_nor_a_name_of_one_is_refused(name):
    with pytest.raises(SettingsError, match=r"PARAMS_TRAINING_ADAPTER=.* is not there\. Allowed: "):
        planned(name)


def test_a_file_that_cannot_be_one_is_refused_by_the_plan(tmp_path):
    with pytest.raises(SettingsError, match=r"PARAMS_TRAINING_ADAPTER=.* cannot be read"):
        planned(lora(tmp_path / "a.safetensors"), base="mini-flux")
    dora = lora(tmp_path / "b.safetensors", "transformer.layers.0.attention.to_q", dora=True)
    with pytest.raises(SettingsError, match="is a DoRA"):
        planned(dora)
    with pytest.raises(SettingsError, match=r"does not go with PARAMS_LORA_TYPE=dora"):
        planned(NAME, PARAMS_LORA_TYPE="dora")


def test_a_file_of_the_hub_is_fetched_once_and_then_serves_without_a_network(hub, tmp_path):
    content = lora(tmp_path / "a.safetensors").read_bytes()
    hub.add("model", "someone/adapters", {"turbo/v2.safetensors": content, "v1.safetensors": b"x"})
    access = {"token": None, "hub_cache": tmp_path / "hub", "retries": NO_PATIENCE}
    found = fetch_training_adapter(planned(NAME), **access)
    assert found.training_adapter == NAME
    with open(found.training_adapter_path, "rb") as file:
        assert file.read() == content
    repo, file = training_adapter.repository(NAME, **access)
    assert str(training_adapter.cached(repo, file)) == found.training_adapter_path
    hub.down = True
    assert fetch_training_adapter(planned(NAME), **access) == found
    with pytest.raises(UnreachableError):
        fetch_training_adapter(planned("someone/adapters/v1.safetensors"), **access)


def test_a_file_that_the_hub_lacks_is_named_with_those_that_it_has(hub, tmp_path):
    hub.add("model", "someone/adapters", {"v1.safetensors": b"no LoRA"})
    access = {"token": None, "hub_cache": tmp_path / "hub", "retries": NO_PATIENCE}
    with pytest.raises(SettingsError, match=r"has no turbo/v2\.safetensors\. It has v1\.safetensors"):
        fetch_training_adapter(planned(NAME), **access)
    with pytest.raises(SettingsError, match=r"PARAMS_TRAINING_ADAPTER=someone/adapters/v1\.safetensors cannot be read"):
        fetch_training_adapter(planned("someone/adapters/v1.safetensors"), **access)
