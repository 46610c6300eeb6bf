"""Files of weights by address: what is said before anything large is downloaded, and that the whole file comes."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
from urllib.parse import quote

import pytest

from entrypoint.fetch import http
from entrypoint.fetch.doors import civitai, files, service, shares, variables
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.doors.offer import Offer
from entrypoint.settings.read import read_settings
from tests.support.raw_server import RawServer, answer
from tests.support.shelf import XML, Civitai, Shelf
from tests.support.small_weights import small_weights
from trainer.spec.errors import GatedError, SettingsError, UnreachableError
from trainer.storage import safetensors_header

QUICK = http.RetryPolicy(budget=3.0, unreached=0.2, first_wait=0.01, longest_wait=0.02, timeout=5.0)
TOKEN = "cAnary-token-1"


DATA = small_weights()


@pytest.fixture
def shelf():
    with Shelf() as running:
        running.files["/lora.safetensors"] = DATA
        yield running


@pytest.fixture
def site(monkeypatch):
    with Civitai() as running:
        monkeypatch.setattr(civitai, "SITE", running.url)
        running.add(123, {9: ("style.safetensors", DATA)})
        yield running


def announce(text, place, keys=Keys(), retries=QUICK):  # noqa: B008 (it is frozen)
    return files.announce(
        "MODEL_PATH", f"MODEL_PATH={text.partition('?')[0]}", text, keys, cache=place, retries=retries
    )


def whole(text, place, keys=Keys(), retries=QUICK):  # noqa: B008
    arrival = announce(text, place, keys, retries)
    files.bring(arrival, retries=dataclasses.replace(retries, cancelled=threading.Event()))
    return arrival.path


def refused(kind, text, place, keys=Keys(), retries=QUICK):  # noqa: B008
    with pytest.raises(kind) as problem:
        whole(text, place, keys, retries)
    said = str(problem.value)
    assert said.startswith("MODEL_PATH=") and "cAnary" not in said
    return said


@pytest.mark.parametrize(
    "address", ["https://[x/a.safetensors", "https://h:99999/a.safetensors", "s3://[x/a", "ftp://[x"]
)
def test_an_address_that_is_none_is_named_and_no_traceback(tmp_path, address):
    assert "[x" not in address or not (civitai.is_one(address) or shares.is_one(address))
    if not service.is_address(address):
        return
    settings = read_settings({"BASE_MODEL": "mini-flux", "DATASET_NAME": str(tmp_path), "MODEL_PATH": address})
    with pytest.raises(SettingsError, match=r"MODEL_PATH.*not written as"):
        variables.arrive(settings, {}, retries=QUICK)


# ---- https


def test_the_header_comes_first_and_the_rest_when_it_is_wanted(shelf, tmp_path):
    shelf.files["/big.safetensors"] = big = small_weights(count=60)
    arrival = announce(f"{shelf.url}/big.safetensors", tmp_path)
    assert arrival.path.name == "big.safetensors" and arrival.missing_bytes == len(big)
    header = safetensors_header.read_header(arrival.path)
    assert len(header.entries) == 60 and files.is_outline(arrival.path)
    safetensors_header.check_layout(header)
    assert arrival.path.stat().st_blocks * 512 < len(big) / 4  # a hole
    files.bring(arrival, retries=QUICK)
    assert arrival.path.read_bytes() == big and not files.is_outline(arrival.path)


def test_what_is_here_is_not_downloaded_again(shelf, tmp_path):
    first = whole(f"{shelf.url}/lora.safetensors", tmp_path)
    shelf.asked.clear()
    arrival = announce(f"{shelf.url}/lora.safetensors", tmp_path)
    assert arrival.path == first and arrival.missing_bytes == 0
    assert len(shelf.asked) == 1  # whether it has changed


def test_another_signature_is_the_same_file_and_another_query_is_another(shelf, tmp_path):
    first = whole(f"{shelf.url}/lora.safetensors?X-Amz-Signature=aaaaaa&id=1", tmp_path)
    assert announce(f"{shelf.url}/lora.safetensors?X-Amz-Signature=bbbbbb&id=1", tmp_path).path == first
    assert announce(f"{shelf.url}/lora.safetensors?X-Amz-Signature=bbbbbb&id=2", tmp_path).path != first


def test_a_parameter_counts_as_a_signature_only_beside_one(shelf):
    def same(first, second):
        return service.identity(f"{shelf.url}/d?{first}") == service.identity(f"{shelf.url}/d?{second}")

    for name in ("token", "st", "se", "sp", "si", "sv", "policy", "expires", "x-amz-meta-model"):
        assert not same(f"{name}=A", f"{name}=B"), name
    assert same("si=A&sv=1&sig=aaaa", "si=B&sv=2&sig=bbbb")
    assert same("Policy=A&Key-Pair-Id=K&Signature=aaaa", "Policy=B&Key-Pair-Id=K&Signature=bbbb")
    assert same("X-Amz-Date=1&X-Amz-Signature=aaaa", "X-Amz-Date=2&X-Amz-Signature=bbbb")
    assert same("X-Goog-Date=1&X-Goog-Signature=aaaa", "X-Goog-Date=2&X-Goog-Signature=bbbb")
    assert not same("id=1&sig=aaaa", "id=2&sig=aaaa") and not same("token=A&sig=a", "token=B&sig=a")


def test_a_file_that_has_changed_is_brought_to_a_place_of_its_own(shelf, tmp_path):
    first = whole(f"{shelf.url}/lora.safetensors", tmp_path)
    shelf.files["/lora.safetensors"] = small_weights(1)
    second = whole(f"{shelf.url}/lora.safetensors", tmp_path)
    assert second != first and second.read_bytes() == small_weights(1) and first.read_bytes() == DATA


def without_version(shelf, path="/lora.safetensors"):
    """Let the server say nothing by which a content is known: neither an ETag nor a date."""

    def rule(request):
        status, headers, body = shelf.answer(request, path, "")
        return status, {name: value for name, value in headers.items() if name != "ETag"}, body

    shelf.rules[path] = rule


def test_an_outline_never_takes_the_place_of_a_whole_file(shelf, tmp_path):
    without_version(shelf)
    first = whole(f"{shelf.url}/lora.safetensors", tmp_path)
    again = announce(f"{shelf.url}/lora.safetensors", tmp_path)
    assert again.path == first and again.missing_bytes == 0 and first.read_bytes() == DATA
    shelf.files["/lora.safetensors"] = small_weights(1)
    second = whole(f"{shelf.url}/lora.safetensors", tmp_path)
    assert second != first and second.read_bytes() == small_weights(1) and first.read_bytes() == DATA


def test_a_file_that_is_as_it_was_before_it_changed_is_still_here(shelf, tmp_path):
    first = whole(f"{shelf.url}/lora.safetensors", tmp_path)
    shelf.files["/lora.safetensors"] = small_weights(1)
    whole(f"{shelf.url}/lora.safetensors", tmp_path)
    shelf.files["/lora.safetensors"] = DATA
    again = announce(f"{shelf.url}/lora.safetensors", tmp_path)
    assert again.path == first and again.missing_bytes == 0 and first.read_bytes() == DATA
    shelf.rules["/lora.safetensors"] = lambda _: (503, {}, b"")
    offline = announce(f"{shelf.url}/lora.safetensors", tmp_path, retries=dataclasses.replace(QUICK, budget=0.1))
    assert offline.path == first  # the newest, as the server said last


def test_what_another_job_brings_while_the_server_is_asked_stays(shelf, tmp_path, monkeypatch):
    ask = service.ask

    def slowly(*arguments, **named):
        offer = ask(*arguments, **named)
        monkeypatch.setattr(service, "ask", ask)
        whole(f"{shelf.url}/lora.safetensors", tmp_path)
        return offer

    monkeypatch.setattr(service, "ask", slowly)
    without_version(shelf)
    arrival = announce(f"{shelf.url}/lora.safetensors", tmp_path)
    assert arrival.path.read_bytes() == DATA and arrival.missing_bytes == 0


def test_a_file_that_was_changed_here_is_set_aside_and_brought_again(shelf, tmp_path):
    first = whole(f"{shelf.url}/lora.safetensors", tmp_path)
    first.write_bytes(DATA[:1000])
    assert whole(f"{shelf.url}/lora.safetensors", tmp_path) == first and first.read_bytes() == DATA
    assert [path.stat().st_size for path in first.parent.iterdir() if path != first] == [1000]


@pytest.mark.parametrize("gone", ["silent", "expired"])
def test_a_file_that_is_here_serves_where_its_address_does_not(shelf, tmp_path, gone, caplog):
    first = whole(f"{shelf.url}/lora.safetensors?sig=aaaaaaaa", tmp_path)
    expired = XML.format("AccessDenied", "Request has expired").encode()
    shelf.rules["/lora.safetensors"] = lambda _: (503, {}, b"") if gone == "silent" else (403, {}, expired)
    with caplog.at_level(logging.WARNING):
        again = announce(
            f"{shelf.url}/lora.safetensors?sig=bbbbbbbb", tmp_path, retries=dataclasses.replace(QUICK, budget=0.1)
        )
    assert again.path == first and again.offer is None and "using that" in caplog.text


def test_a_token_goes_to_its_host_alone(shelf, tmp_path):
    shelf.tokens["/lora.safetensors"] = TOKEN
    host = shelf.url.removeprefix("http://")
    assert "DOWNLOAD_TOKENS" in refused(GatedError, f"{shelf.url}/lora.safetensors", tmp_path)
    assert "DOWNLOAD_TOKENS" in refused(
        GatedError, f"{shelf.url}/lora.safetensors", tmp_path, Keys(hosts={"example.com": TOKEN}, hub=TOKEN)
    )
    assert {token for _, _, token in shelf.asked} == {""}
    assert whole(f"{shelf.url}/lora.safetensors", tmp_path, Keys(hosts={host: TOKEN})).read_bytes() == DATA


def test_a_token_is_not_carried_to_where_a_redirect_leads(shelf, tmp_path):
    port, host = shelf.server.server_port, shelf.url.removeprefix("http://")
    shelf.rules["/moved"] = lambda _: (302, {"Location": f"http://localhost:{port}/lora.safetensors"}, b"")
    assert whole(f"{shelf.url}/moved", tmp_path, Keys(hosts={host: TOKEN})).read_bytes() == DATA
    assert {(path, token) for _, path, token in shelf.asked} == {
        ("/moved", f"Bearer {TOKEN}"),
        ("/lora.safetensors", ""),
    }


@pytest.mark.parametrize(
    ("status", "code", "message", "kind", "said"),
    [
        (403, "AccessDenied", "Request has expired", GatedError, "signature has expired"),
        (403, "SignatureDoesNotMatch", "no", GatedError, "key is not accepted"),
        (403, "RequestTimeTooSkewed", "no", GatedError, "clock"),
        (403, "AccessDenied", "no", GatedError, "not public"),
        (404, "NoSuchKey", "no", SettingsError, "no such file"),
        (404, "NoSuchBucket", "no", SettingsError, "no such bucket"),
        (400, "AuthorizationHeaderMalformed", "no", SettingsError, "AWS_REGION"),
        (410, "", "", SettingsError, "no such file"),
        (418, "", "", SettingsError, "refuses it"),
    ],
)
def test_a_refusal_is_named_with_its_fix(shelf, tmp_path, status, code, message, kind, said):
    shelf.rules["/lora.safetensors"] = lambda _: (status, {}, XML.format(code, message).encode())
    assert said in refused(kind, f"{shelf.url}/lora.safetensors?sig=cAnary1", tmp_path)


def test_a_web_page_and_other_files_are_refused_before_the_download(shelf, tmp_path):
    shelf.rules["/page"] = lambda _: (200, {"Content-Type": "text/html"}, b"<html>log in</html>")
    assert "web page" in refused(SettingsError, f"{shelf.url}/page", tmp_path)
    for name, data, said in [
        ("/x.ckpt", b"PK\x03\x04" + bytes(9000), "is a pickle"),
        ("/x.safetensors", b"PK\x03\x04" + bytes(9000), "is a pickle"),
        ("/y.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("/z.safetensors", DATA[:-100], "cut short"),
        ("/q.safetensors", b"\xff" * 5000, "not a safetensors file"),
    ]:
        shelf.files[name] = data
        assert said in refused(SettingsError, f"{shelf.url}{name}", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_download_goes_on_where_it_was_cut(shelf, tmp_path):
    arrival = announce(f"{shelf.url}/lora.safetensors", tmp_path)
    shelf.cuts["/lora.safetensors"] = [50_000, 30_000]
    shelf.asked.clear()
    files.bring(arrival, retries=QUICK)
    assert arrival.path.read_bytes() == DATA and len(shelf.asked) == 3


def test_what_a_stopped_job_has_downloaded_is_kept(shelf, tmp_path):
    arrival = announce(f"{shelf.url}/lora.safetensors", tmp_path)
    shelf.rules["/lora.safetensors"] = lambda r: None if r.headers["Range"] is None else (503, {}, b"")
    shelf.cuts["/lora.safetensors"] = [50_000]
    with pytest.raises(UnreachableError):
        files.bring(arrival, retries=dataclasses.replace(QUICK, budget=0.1))
    del shelf.rules["/lora.safetensors"]
    again = announce(f"{shelf.url}/lora.safetensors", tmp_path)
    assert again.path == arrival.path and again.missing_bytes == len(DATA) - 50_000
    files.bring(again, retries=QUICK)
    assert again.path.read_bytes() == DATA


def test_a_server_that_crawls_or_leads_astray_is_given_up(tmp_path):
    def crawl(connection, head):
        for byte in answer(DATA)[:400]:
            connection.sendall(bytes([byte]))
            threading.Event().wait(0.05)

    with RawServer(crawl) as server:
        slow = dataclasses.replace(QUICK, budget=0.5, timeout=0.2)
        refused(UnreachableError, f"{server.url}/x.safetensors", tmp_path, retries=slow)
    with RawServer(lambda *_: answer(b"", "302 Found", location="ftp://inside/x")) as server:
        assert "redirects" in refused(SettingsError, f"{server.url}/x.safetensors", tmp_path)


def test_a_file_of_the_hub_is_compared_with_the_hash_that_it_states(shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", shelf.url)
    stated = {"X-Linked-ETag": f'"{hashlib.sha256(small_weights(5)).hexdigest()}"', "Location": "/lora.safetensors"}
    shelf.rules["/o/m/resolve/main/x.safetensors"] = lambda _: (302, stated, b"")
    text = refused(UnreachableError, f"{shelf.url}/o/m/resolve/main/x.safetensors", tmp_path, Keys(hub=TOKEN))
    assert "is not the announced one" in text
    assert not any(path.stat().st_size == len(DATA) and not files.is_outline(path) for path in tmp_path.rglob("*.s*"))
    stated["X-Linked-ETag"] = f'"{hashlib.sha256(DATA).hexdigest()}"'
    assert whole(f"{shelf.url}/o/m/resolve/main/x.safetensors", tmp_path).read_bytes() == DATA


def test_the_name_of_the_file_is_the_servers_and_leads_nowhere(shelf, tmp_path):
    for said, name in [
        ('attachment; filename="my style.safetensors"', "my style.safetensors"),
        ("attachment; filename*=UTF-8''p%C3%A9.safetensors", "pé.safetensors"),
        ('attachment; filename="../../x.safetensors"', "lora.safetensors"),
        ('attachment; filename=".x"', "lora.safetensors"),
    ]:
        shelf.disposition["/lora.safetensors"] = said
        path = announce(f"{shelf.url}/lora.safetensors?{len(said)}", tmp_path).path
        assert path.name == name and tmp_path in path.parents and ".." not in str(path)


@pytest.mark.parametrize("letter", ["a", "é"])
def test_a_name_that_is_too_long_for_a_volume_is_shortened(shelf, tmp_path, letter):
    said = letter * (254 // len(letter.encode()))
    shelf.disposition["/lora.safetensors"] = f"attachment; filename*=UTF-8''{quote(said)}"
    path = whole(f"{shelf.url}/lora.safetensors", tmp_path)
    assert path.read_bytes() == DATA and path.name == f"{said[: 180 // len(letter.encode())]}.safetensors"


# ---- Civitai


FORMS = (
    "civitai:123",
    "civitai:77@123",
    "civitai:123/9",
    "urn:air:sdxl:lora:civitai:77@123",
    "air:sdxl:lora:civitai:77@123",
)


@pytest.mark.parametrize("text", [*FORMS, "civitai.com/api/download/models/123?type=Model", "civitai.com/models/77/x"])
def test_a_version_has_many_names(site, tmp_path, text, monkeypatch):
    text = f"https://{text}" if "/models/" in text else text
    assert service.is_address(text)
    arrival = announce(text, tmp_path)
    assert arrival.path.name == "style.safetensors" and arrival.offer.digest == hashlib.sha256(DATA).hexdigest()
    files.bring(arrival, retries=QUICK)
    assert arrival.path.read_bytes() == DATA


def test_the_token_goes_to_civitai_and_not_to_its_storage(site, tmp_path):
    site.tokens["/api/download/models/123"] = TOKEN
    assert "CIVITAI_TOKEN" in refused(GatedError, "civitai:123", tmp_path)
    assert "CIVITAI_TOKEN" in refused(GatedError, "civitai:123", tmp_path, Keys(civitai="cAnary-wrong", hub=TOKEN))
    assert whole("civitai:123", tmp_path, Keys(civitai=TOKEN)).read_bytes() == DATA
    assert {token for _, path, token in site.asked if path.startswith("/storage")} == {""}


def test_other_bytes_than_civitai_states_are_not_used(site, tmp_path):
    site.files["/storage/9"] = small_weights(3)
    assert "is not the announced one" in refused(UnreachableError, "civitai:123", tmp_path)
    assert not any(file.read_bytes() == small_weights(3) for file in tmp_path.rglob("*.safetensors"))


def test_several_files_of_a_version(site, tmp_path):
    site.add(
        5, {1: ("full.safetensors", small_weights(1)), 2: ("small.safetensors", small_weights(2)), 3: ("x.zip", b"PK")}
    )
    assert announce("civitai:5", tmp_path).path.name == "full.safetensors"  # the primary one
    assert announce("civitai:5/2", tmp_path).path.name == "small.safetensors"
    assert "no file 8. It has 1 (full" in refused(SettingsError, "civitai:5/8", tmp_path)
    del site.versions[5]["files"][0]["primary"]
    assert "civitai:5/NUMBER" in refused(SettingsError, "civitai:5", tmp_path)
    site.versions[5]["files"][1]["metadata"] = {"fp": "fp8"}
    assert announce("https://civitai.com/api/download/models/5?fp=fp8", tmp_path).path.name == "small.safetensors"
    site.add(6, {4: ("x.ckpt", b"PK\x03\x04")})
    assert "no .safetensors file, only 4 (x.ckpt)" in refused(SettingsError, "civitai:6", tmp_path)


def test_odd_names_and_answers_of_civitai_are_named(site, tmp_path):
    for text in ("civitai:", "civitai:abc", "civitai:1@2@3", "urn:air:sdxl:lora:huggingface:x", "civitai:-1"):
        assert "Allowed: civitai:VERSION" in refused(SettingsError, text, tmp_path)
    assert "no such version" in refused(SettingsError, "civitai:404", tmp_path)
    assert "is one of model 77" in refused(SettingsError, "civitai:78@123", tmp_path)
    site.add(8, {1: ("a.safetensors", DATA)}, availability="EarlyAccess")
    site.tokens["/api/download/models/8"] = TOKEN
    assert "early access" in refused(GatedError, "civitai:8", tmp_path)
    site.versions[8]["files"][0]["hashes"] = {}
    assert "no SHA-256" in refused(UnreachableError, "civitai:8", tmp_path)
    site.rules["/api/v1/model-versions/9"] = lambda _: (200, {}, b"[1, 2]")
    assert "none of Civitai's API" in refused(SettingsError, "civitai:9", tmp_path)


def test_a_secret_of_an_offer_is_not_in_its_repr():
    offer = Offer("https://x/y?sig=cAnary1", {"Authorization": "Bearer cAnary2"})
    assert "cAnary" not in repr(offer) + repr(Keys(hub="cAnary", civitai="cAnary", hosts={"x": "cAnary"}))
