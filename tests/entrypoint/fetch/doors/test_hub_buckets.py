"""Buckets of the Hub: what is listed and brought, and what the Hub may not say."""

from __future__ import annotations

import json

import pytest

from entrypoint.fetch import http
from entrypoint.fetch.doors import files, folders, hub_buckets, service
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.fetch import fetch_source
from entrypoint.runpod.allowed import _images
from tests.support.hub import Hub
from tests.support.small_weights import small_weights
from trainer.spec.errors import DataError, GatedError, SettingsError, UnreachableError
from trainer.spec.plan import Source

QUICK = http.RetryPolicy(budget=2.0, unreached=0.2, first_wait=0.01, longest_wait=0.02, timeout=5.0)
WHERE = "hf://buckets/me/photos"
TREE = "/api/buckets/me/photos/tree"
KEYS = Keys(hub="hf_cAnary")


@pytest.fixture
def hub(monkeypatch):
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def entry(path, data=b"", **changes):
    return {"type": "file", "path": path, "size": len(data), "xetHash": f"{len(data):064x}", **changes}


def put(hub, files, *, tree=TREE):
    """The files, and a list that has them."""
    hub.plain[tree] = json.dumps([entry(path, data) for path, data in files.items()]).encode()
    hub.plain |= {f"/buckets/me/photos/resolve/{path}": data for path, data in files.items()}


def refused(kind, call):
    with pytest.raises(kind) as problem:
        call()
    assert "cAnary" not in str(problem.value) and str(problem.value).startswith("X=")
    return str(problem.value)


def bring(tmp_path, where=WHERE, keys=KEYS):
    return folders.bring("X=hf", where, keys, cache=tmp_path, retries=QUICK)


def held(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".kiln"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_all_below_a_name_comes_with_the_token_and_once(hub, tmp_path):
    put(hub, {"cats/é 1.png": b"one", "cats/sub/2.txt": b"three"}, tree=f"{TREE}/cats")
    folder = bring(tmp_path, f"{WHERE}/cats/")
    assert held(folder) == {"é 1.png": b"one", "sub/2.txt": b"three"}
    assert hub.log and all(asked.authorized for asked in hub.log)
    before = len(hub.log)
    assert bring(tmp_path, f"{WHERE}/cats/") == folder and len(hub.log) == before + 1  # the list alone
    assert folders.known(f"{WHERE}/cats/", tmp_path, {}) == folder


def test_a_list_of_several_pages(hub, tmp_path):
    put(hub, {"b.png": b"22"})
    hub.plain["/buckets/me/photos/resolve/a.png"] = b"1"
    first = json.dumps([entry("a.png", b"1"), {"type": "directory", "path": "empty"}]).encode()
    hub.fault(TREE, status=200, body=first, headers={"Link": f'<{TREE}?recursive=true&cursor=2>; rel="next"'})
    assert held(bring(tmp_path)) == {"a.png": b"1", "b.png": b"22"}


def test_a_page_that_fails_is_asked_for_again_and_no_other(hub, tmp_path):
    hub.plain["/buckets/me/photos/resolve/a.png"] = b"1"
    put(hub, {"b.png": b"22"})
    first = json.dumps([entry("a.png", b"1")]).encode()
    hub.fault(TREE, status=200, body=first, headers={"Link": f'<{TREE}?cursor=2>; rel="next"'})
    hub.fault(TREE, status=503, times=2)
    assert held(bring(tmp_path)) == {"a.png": b"1", "b.png": b"22"}
    assert len(hub.asked(TREE)) == 4


def test_a_dataset_of_a_job(hub, tmp_path):
    put(hub, {"a.png": b"picture"})
    found = fetch_source(Source("bucket", WHERE), cache=tmp_path, token="hf_cAnary", retries=QUICK)
    assert found.path and all(asked.authorized for asked in hub.log)


def test_a_file_of_weights(hub, tmp_path):
    hub.plain["/buckets/me/photos/resolve/loras/x y.safetensors"] = small_weights()
    text = f"{WHERE}/loras/x y.safetensors"
    assert service.is_address(text)
    arrival = files.announce("MODEL_PATH", "X=hf", text, KEYS, cache=tmp_path, retries=QUICK)
    files.bring(arrival, retries=QUICK)
    assert arrival.path.read_bytes() == small_weights() and hub.log[-1].authorized


@pytest.mark.parametrize("status", [401, 403])
def test_a_bucket_that_is_not_public_names_the_token(hub, tmp_path, status):
    hub.fault(TREE, status=status, times=9)
    assert "HF_TOKEN" in refused(GatedError, lambda: bring(tmp_path, keys=Keys()))


def test_no_such_bucket_and_an_empty_one(hub, tmp_path):
    hub.fault(TREE, status=404)
    assert "no such bucket" in refused(SettingsError, lambda: bring(tmp_path))
    put(hub, {})
    refused(DataError, lambda: bring(tmp_path))


@pytest.mark.parametrize(
    "listed",
    [
        [entry("../out.png", b"1")],
        [entry("/etc/passwd", b"1")],
        [entry("a.png", b"1"), entry("a.png", b"1")],
        [entry("a.png", size=-1)],
        [entry("a.png", size=True)],
        [{"type": "file"}],
        ["a.png"],
    ],
)
def test_what_cannot_be_a_file_is_refused(hub, tmp_path, listed):
    hub.plain[TREE] = json.dumps(listed).encode()
    refused(SettingsError, lambda: bring(tmp_path))
    assert not list(tmp_path.rglob("*.png"))


def test_a_list_goes_on_in_the_same_bucket_alone(hub, tmp_path):
    for link in ("https://elsewhere.example/x", "/api/buckets/you/secret/tree"):
        hub.fault(TREE, status=200, body=b"[]", headers={"Link": f'<{link}>; rel="next"'})
        assert "goes on elsewhere" in refused(SettingsError, lambda: bring(tmp_path))


def test_a_list_without_end_ends(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_buckets, "MOST_PAGES", 3)
    hub.fault(TREE, status=200, body=b"[]", headers={"Link": f'<{TREE}?cursor=1>; rel="next"'}, times=99)
    assert "Pack them" in refused(SettingsError, lambda: bring(tmp_path))
    assert len(hub.asked(TREE)) == 3


def test_more_files_than_can_be_are_refused(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_buckets, "MOST_FILES", 1)
    put(hub, {"a.png": b"1", "b.png": b"2"})
    assert "Pack them" in refused(SettingsError, lambda: bring(tmp_path))


def test_what_is_no_list_is_asked_for_again(hub, tmp_path):
    hub.plain[TREE] = b'{"error": 1}'
    refused(UnreachableError, lambda: bring(tmp_path))
    assert len(hub.asked(TREE)) > 1


def test_a_request_of_serverless_may_not_name_one():
    assert _images(WHERE) is not None and _images(f"{WHERE}/x.zip") is not None


@pytest.mark.parametrize(
    "text", ["hf://buckets/me", "hf://buckets/me/x/../y", "hf://buckets/me/x?y", "hf://buckets//x"]
)
def test_what_is_no_address_of_one(text):
    refused(SettingsError, lambda: hub_buckets.parse("X=hf", text))
