"""The model of CAPTION_WITH from a stand-in for the Hub: only what is needed, and nothing where nothing is."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
from PIL import Image

from entrypoint.fetch import http
from entrypoint.fetch.captioner import fetch_captioner
from entrypoint.planning.captions import captioner as planning
from tests.support.captioners import make_tagger
from tests.support.hub import Hub, read_folder
from tests.support.plans import job_plan
from trainer.captioning.requests import identity, request_for
from trainer.captioning.store import Made, Store
from trainer.data.folders.own_output import Written
from trainer.spec.errors import SettingsError, UnreachableError
from trainer.spec.plan import CaptionerPlan, DataPlan, Dataset, Source, Subset
from trainer.storage import digests

QUICK = dataclasses.replace(http.USUAL, budget=2.0, timeout=2.0)


@pytest.fixture
def hub(monkeypatch):
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


class Client:
    def __init__(self, tmp_path, images):
        self.cache, self.hub_cache = tmp_path / "cache", tmp_path / "hf" / "hub"
        subset = Subset(Source("folder", str(images), path=str(images)), caption_extension=".txt")
        self.data = DataPlan((Dataset((subset,), (64, 64)),), captioner=CaptionerPlan("org/model"))

    @property
    def access(self):
        return {"token": None, "hub_cache": self.hub_cache, "retries": QUICK}

    def fetch(self) -> CaptionerPlan:
        found = fetch_captioner(self.data, cache=self.cache, written=Written(), **self.access)
        assert found is not None
        return found

    def caption(self, found: CaptionerPlan, images, names) -> None:
        request = request_for(self.data.subsets[0], found, identity(found))
        for name in names:
            Store(self.cache).write(request.key(digests.sha256(images / name)), Made("a dog", "org/model"))


@pytest.fixture
def client(tmp_path, images):
    return Client(tmp_path, images)


def tagger_files(tmp_path) -> dict[str, bytes]:
    files = read_folder(make_tagger(tmp_path / "tagger", side=32))
    return {**files, "model.safetensors": b"x" * 100, "config.json": b"{}", "README.md": b"# x"}


def test_a_tagger_comes_with_its_two_files_alone_and_is_found_again_without_a_network(hub, client, tmp_path):
    commit = hub.add("model", "org/model", tagger_files(tmp_path))
    found = client.fetch()
    assert found.commit == commit
    assert sorted(path.name for path in (client.hub_cache / "models--org--model" / "snapshots" / commit).iterdir()) == [
        "model.onnx",
        "selected_tags.csv",
    ]
    hub.down = True
    assert client.fetch() == found


def test_nothing_is_downloaded_where_every_image_has_a_caption(hub, client, images, tmp_path):
    for name in ("0.txt", "1.txt"):
        (images / name).write_text("by hand")
    assert client.fetch().path == "" and hub.log == []


def test_captions_that_were_made_at_the_last_commit_are_used_though_the_model_has_moved_on(
    hub, client, images, tmp_path
):
    commit = hub.add("model", "org/model", tagger_files(tmp_path))
    found = client.fetch()
    client.caption(found, images, ["0.png", "1.png"])
    hub.add("model", "org/model", {**tagger_files(tmp_path), "selected_tags.csv": b"another"})
    asked = len(hub.log)
    again = client.fetch()
    assert (again.path, again.commit) == ("", commit) and len(hub.log) == asked


def test_a_config_with_code_is_refused_before_its_weights_are_downloaded(hub, client):
    config = {"architectures": ["Florence2ForConditionalGeneration"], "auto_map": {"AutoModel": "evil.Model"}}
    files = {"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}", "model.safetensors": b"x" * 5000}
    hub.add("model", "org/model", files)
    with pytest.raises(SettingsError, match="names code of its own"):
        client.fetch()
    assert hub.sent("*model.safetensors") == 0


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"README.md": b"x"}, "has no config.json"),
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "no weights as model.safetensors"),
        ({"config.json": b"{}", "model.safetensors": b"x"}, "no tokenizer.json"),
    ],
)
def test_a_repository_that_is_no_such_model_is_refused(hub, client, files, says):
    hub.add("model", "org/model", files)
    with pytest.raises(SettingsError, match=rf"CAPTION_WITH=org/model.*{says}"):
        client.fetch()


def test_a_revision_that_is_not_there_is_named_by_its_variable(hub, client, tmp_path):
    hub.add("model", "org/model", tagger_files(tmp_path))
    client.data = dataclasses.replace(client.data, captioner=CaptionerPlan("org/model", revision="v9"))
    with pytest.raises(SettingsError, match="the revision of CAPTION_WITH=v9"):
        client.fetch()


def test_without_a_network_and_without_a_model_the_job_may_try_again(hub, client):
    hub.down = True
    with pytest.raises(UnreachableError, match="CAPTION_WITH=org/model"):
        client.fetch()


def test_a_check_names_size_and_licence(hub, client, images, tmp_path, caplog):
    hub.add("model", "org/model", tagger_files(tmp_path))
    hub.cards[("model", "org/model")] = {"license": "apache-2.0"}
    plan = _plan(client, tmp_path)
    caplog.set_level(logging.INFO)
    size = planning.check(plan, written=Written(), **client.access)
    assert size == sum(
        len(data) for name, data in tagger_files(tmp_path).items() if name in ("model.onnx", "selected_tags.csv")
    )
    assert "To fetch for captions: org/model, 0 MiB, licence apache-2.0." in caplog.text
    hub.cards[("model", "org/model")] = {"license": "<b>\nno licence"}
    planning.check(plan, written=Written(), **client.access)
    assert "its page names no licence" in caplog.text
    (images / "0.txt").write_text("x")
    (images / "1.txt").write_text("x")
    assert planning.check(plan, written=Written(), **client.access) == 0
    assert "Every image has one" in caplog.text


def _plan(client: Client, folder):
    found = job_plan(folder, "flux")
    return dataclasses.replace(found, data=client.data)
