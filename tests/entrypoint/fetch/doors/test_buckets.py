"""Buckets: signatures by an independent reading of AWS's rules, and what each service refuses."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import datetime
import hashlib
import json
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest

from entrypoint.fetch import http
from entrypoint.fetch.doors import buckets, files, folders
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.fetch import fetch_source
from tests.support.bucket_server import KEY_ID, SAS, SECRET, Buckets
from tests.support.drawings import draw
from tests.support.small_weights import small_weights
from trainer.spec.errors import DataError, GatedError, SettingsError, UnreachableError
from trainer.spec.plan import Source
from trainer.storage.folders import locked

QUICK = http.RetryPolicy(budget=3.0, unreached=0.2, first_wait=0.01, longest_wait=0.02, timeout=5.0)
ODD = "odd/x y+é%20'(1).safetensors"


@pytest.fixture
def server():
    with Buckets() as running:
        running.objects[f"mine/{ODD}"] = small_weights()
        yield running


def refused(kind, call):
    with pytest.raises(kind) as problem:
        call()
    said = str(problem.value)
    assert "cAnary" not in said and said.startswith("X=")
    return said


def test_a_signed_address_is_what_awss_rules_ask_for(server):
    offer = buckets.ask("X=s3", f"s3://mine/{ODD}", server.keys, retries=QUICK)
    assert offer.size == len(small_weights()) and offer.name == ODD.partition("/")[2]
    asked = urlsplit(server.asked[-1][1])
    assert unquote(asked.path) == f"/mine/{ODD}" and "X-Amz-Signature" in asked.query


def test_a_file_of_weights_comes_from_a_bucket(server, tmp_path):
    keys = Keys(clouds=server.keys)
    arrival = files.announce("MODEL_PATH", "X=s3", f"s3://mine/{ODD}", keys, cache=tmp_path, retries=QUICK)
    server.cuts[urlsplit(server.asked[-1][1]).path] = [60_000]
    files.bring(arrival, retries=QUICK)
    assert arrival.path.read_bytes() == small_weights()


def test_what_is_wrong_with_keys_and_names_is_named(server):
    def asked(text=f"s3://mine/{ODD}", **changes):
        given = {**server.keys, **changes}
        return lambda: buckets.ask("X=s3", text, {k: v for k, v in given.items() if v}, retries=QUICK)

    assert "SignatureDoesNotMatch" in refused(GatedError, asked(AWS_SECRET_ACCESS_KEY="cAnary-other"))
    assert "InvalidAccessKeyId" in refused(GatedError, asked(AWS_ACCESS_KEY_ID="AKIAcAnaryOther12345"))
    assert "AWS_REGION" in refused(SettingsError, asked(AWS_REGION="us-east-1"))
    assert "no such bucket" in refused(SettingsError, asked("s3://other/x.safetensors"))
    assert "no such file" in refused(SettingsError, asked("s3://mine/x.safetensors"))
    assert "folder of a bucket" in refused(SettingsError, asked("s3://mine/odd/"))
    assert "Set AWS_ACCESS_KEY_ID" in refused(GatedError, asked(AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""))
    assert "not public" in refused(GatedError, asked(AWS_SKIP_SIGNATURE="true"))
    assert "Correct it" in refused(SettingsError, asked(AWS_ENDPOINT_URL="ftp://cAnaryhost:1:2"))
    server.late = datetime.timedelta(hours=13)
    assert "signature has expired" in refused(GatedError, asked())
    for text in ("s3://", "s3://x", "s3:///y", "s3://mine/y?versionId=1", "s3://key:cAnary@mine/y"):
        refused(SettingsError, asked(text))


def test_a_service_that_does_not_answer_may_answer_later():
    nowhere = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    refused(UnreachableError, lambda: buckets.ask("X=s3", "s3://mine/x", nowhere, retries=QUICK))
    place = buckets.parse("X=s3", "s3://mine/x")
    refused(UnreachableError, lambda: list(buckets.listed("X=s3", place, nowhere)))


# ---- the others, by the shapes of their addresses


def test_azure_signs_with_a_key_or_takes_a_sas_token_as_it_is(server):
    key = base64.b64encode(b"cAnary-azure-key").decode()
    place = buckets.parse("X=az", "az://box/a b.safetensors")
    account = {"AZURE_STORAGE_ACCOUNT_NAME": "me", "AZURE_STORAGE_ACCOUNT_KEY": key}
    address = urlsplit(buckets.signed("X=az", place, "GET", account))
    query = dict(parse_qsl(address.query))
    assert address.netloc == "me.blob.core.windows.net" and unquote(address.path) == "/box/a b.safetensors"
    assert {"sig", "se", "sp", "sv"} <= query.keys() and query["sp"] == "r" and query["sr"] == "b"
    joined = f"DefaultEndpointsProtocol=https;AccountName=me;AccountKey={key};EndpointSuffix=core.windows.net"
    same = urlsplit(buckets.signed("X=az", place, "GET", {"AZURE_STORAGE_CONNECTION_STRING": joined}))
    assert same.netloc == address.netloc and "sig" in dict(parse_qsl(same.query))
    server.objects["mine/a.safetensors"] = small_weights()
    by_sas = {
        "AZURE_STORAGE_ACCOUNT_NAME": "me",
        "AZURE_STORAGE_ENDPOINT": server.url,
        "AZURE_STORAGE_SAS_TOKEN": f"?{SAS}",
    }
    assert buckets.ask("X=az", "az://mine/a.safetensors", by_sas, retries=QUICK).size == len(small_weights())
    wrong = {**by_sas, "AZURE_STORAGE_SAS_TOKEN": SAS.replace("7890", "cAnary")}
    said = refused(GatedError, lambda: buckets.ask("X=az", "az://mine/a.safetensors", wrong, retries=QUICK))
    assert "AuthenticationFailed" in said and "AZURE_STORAGE_SAS_TOKEN" in said
    assert "no storage account" in refused(GatedError, lambda: buckets.signed("X=az", place, "GET", {}))


def test_google_signs_with_the_key_of_a_service_account(tmp_path, server):
    cryptography = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    from cryptography.hazmat.primitives import serialization

    private = cryptography.generate_private_key(public_exponent=65537, key_size=2048)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {"type": "service_account", "private_key": pem, "private_key_id": "1", "client_email": "me@x.iam"}
    account |= {"token_uri": "https://oauth2.googleapis.com/token", "client_id": "1", "project_id": "x"}
    file = tmp_path / "key.json"
    file.write_text(json.dumps(account))
    place = buckets.parse("X=gs", "gs://mine/a b.safetensors")
    address = urlsplit(buckets.signed("X=gs", place, "PUT", {"GOOGLE_APPLICATION_CREDENTIALS": str(file)}))
    query = dict(parse_qsl(address.query))
    assert query["X-Goog-Algorithm"] == "GOOG4-RSA-SHA256" and query["X-Goog-Credential"].startswith("me@x.iam/")
    assert len(bytes.fromhex(query["X-Goog-Signature"])) == 256


def test_google_without_a_usable_key_says_which(tmp_path):
    place = buckets.parse("X=gs", "gs://mine/a.safetensors")
    for clouds in (
        {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "no.json")},
        {"GOOGLE_SERVICE_ACCOUNT_KEY": "cAnary"},
    ):
        said = refused(GatedError, lambda clouds=clouds: buckets.signed("X=gs", place, "GET", clouds))
        assert "GOOGLE_APPLICATION_CREDENTIALS" in said
    public = buckets.signed("X=gs", place, "GET", {"GOOGLE_SKIP_SIGNATURE": "true"})
    assert public == "https://storage.googleapis.com/mine/a.safetensors"


# ---- images


def images(server, count=5):
    for number in range(count):
        file = server.scratch / f"{number}.png"
        draw(64, 64, seed=number).save(file)
        server.objects[f"mine/set/10_dog/{number}.png"] = file.read_bytes()
        server.objects[f"mine/set/10_dog/{number}.txt"] = f"a thing {number}".encode()


def test_a_folder_of_a_bucket_becomes_a_folder_and_goes_on_where_it_was_stopped(server, tmp_path, monkeypatch):
    server.scratch = tmp_path
    images(server)
    monkeypatch.setattr(folders, "PARALLEL_FILES", 1)
    keys, source = Keys(clouds=server.keys), Source("bucket", "s3://mine/set")

    def fetched():
        return Path(fetch_source(source, cache=tmp_path / "c", token=None, keys=keys, retries=QUICK).path)

    def asked():
        return [urlsplit(path).path.rpartition("/")[2] for _, path, _ in server.asked if "/set/10_dog/" in path]

    server.rules["/mine/set/10_dog/3.png"] = lambda _: (403, {}, b"<Code>AccessDenied</Code>")
    with pytest.raises(GatedError, match=r"DATASET_NAME=s3://mine/set: 10_dog/3\.png: the server forbids it"):
        fetched()
    assert asked() == ["0.png", "0.txt", "1.png", "1.txt", "2.png", "2.txt", "3.png"]
    del server.rules["/mine/set/10_dog/3.png"]
    server.asked.clear()
    folder = fetched()
    assert asked() == ["3.png", "3.txt", "4.png", "4.txt"]
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("10*/*")}
    assert found == {name.removeprefix("mine/set/"): data for name, data in server.objects.items() if "/set/" in name}
    server.asked.clear()
    assert fetched() == folder and asked() == []
    server.objects["mine/set/10_dog/9.txt"] = b"new"
    assert fetched() != folder


def held(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def brought(server, cache, location="s3://mine/set", **changes):
    keys = Keys(clouds={**server.keys, **changes})
    found = held(folders.bring("X=s3", location, keys, cache=cache, retries=QUICK))
    return {name: data for name, data in found.items() if not name.startswith(".kiln")}


def test_a_file_of_the_same_size_that_has_changed_is_another_one(server, tmp_path):
    server.objects["mine/set/a.txt"] = b"a dog"
    assert brought(server, tmp_path) == {"a.txt": b"a dog"}
    server.objects["mine/set/a.txt"] = b"a cat"
    assert brought(server, tmp_path) == {"a.txt": b"a cat"}


def test_a_download_does_not_go_on_with_the_bytes_of_a_file_that_has_changed(server, tmp_path):
    server.objects["mine/set/a.png"] = b"a" * 100_000
    server.cuts["/mine/set/a.png"] = [50_000]
    once = dataclasses.replace(QUICK, budget=0.0)
    with pytest.raises(UnreachableError):
        folders.bring("X=s3", "s3://mine/set", Keys(clouds=server.keys), cache=tmp_path, retries=once)
    assert [path.stat().st_size for path in tmp_path.rglob("*.part")] == [50_000]
    server.objects["mine/set/a.png"] = b"b" * 100_000
    assert brought(server, tmp_path) == {"a.png": b"b" * 100_000}


def test_a_file_that_changes_after_the_listing_is_not_taken(server, tmp_path):
    server.objects["mine/set/a.txt"] = b"a dog"
    listed = server.list
    server.list = lambda *asked: (listed(*asked), server.objects.update({"mine/set/a.txt": b"a cat"}))[0]
    with pytest.raises(UnreachableError, match="has changed on the server"):
        brought(server, tmp_path)
    server.list = listed
    assert brought(server, tmp_path) == {"a.txt": b"a cat"}


def test_two_jobs_bring_one_folder_one_after_the_other(server, tmp_path):
    server.objects["mine/set/a.png"] = b"a" * 100_000
    place = folders._place("s3://mine/set", tmp_path, server.keys)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with locked(place / "lock"):
            other = pool.submit(brought, server, tmp_path)
            with pytest.raises(concurrent.futures.TimeoutError):
                other.result(timeout=0.5)
            assert server.asked == []
        assert other.result() == {"a.png": b"a" * 100_000}


def test_marks_of_folders_are_no_files(server, tmp_path):
    for name in ("set/", "set/sub/", "set/sub/a.txt", "set/empty.txt"):
        server.objects[f"mine/{name}"] = b"a dog" if name == "set/sub/a.txt" else b""
    assert brought(server, tmp_path) == {"sub/a.txt": b"a dog", "empty.txt": b""}


def test_the_same_name_at_another_endpoint_is_another_folder(server, tmp_path):
    server.objects["mine/set/a.txt"] = b"a dog"
    brought(server, tmp_path)
    assert folders.known("s3://mine/set", tmp_path, server.keys) is not None
    assert folders.known("s3://mine/set", tmp_path, {**server.keys, "AWS_ENDPOINT_URL": "https://other.host"}) is None
    joined = "AccountName=me;AccountKey=cAnary"
    by_name, by_connection = {"AZURE_STORAGE_ACCOUNT": "me"}, {"AZURE_STORAGE_CONNECTION_STRING": joined}
    assert buckets.endpoint("az", by_name) == buckets.endpoint("az", by_connection) == "me"
    assert buckets.endpoint("gs", {"GOOGLE_BASE_URL": "https://other.host"}) == "https://other.host"
    assert buckets.endpoint("s3", {}) == ""


def test_a_check_sees_what_is_new_in_a_bucket_and_a_key_that_no_longer_serves(server, tmp_path, caplog):
    server.objects["mine/set/a.png"] = b"a" * 1000
    brought(server, tmp_path)
    keys = Keys(clouds=server.keys)

    def missing(keys=keys):
        return folders.missing("X=s3", "s3://mine/set", keys, cache=tmp_path, retries=QUICK)[1]

    assert missing() == []
    server.objects["mine/set/b.png"] = b"b" * 1000
    assert [name for name, _, _ in missing()] == ["a.png", "b.png"]
    assert missing(Keys(clouds={**server.keys, "AWS_ACCESS_KEY_ID": "AKIAcAnaryOther12345"})) == []
    assert "Using what was downloaded before" in caplog.text


def test_a_guarded_process_does_not_ask_a_library_that_connects_by_itself(server, monkeypatch):
    monkeypatch.setenv("KILN_PUBLIC_ADDRESSES", "1")
    said = refused(SettingsError, lambda: buckets.ask("X=s3", f"s3://mine/{ODD}", server.keys, retries=QUICK))
    assert "a request may name nothing in a bucket" in said
    refused(SettingsError, lambda: list(buckets.listed("X=s3", buckets.parse("X=s3", "s3://mine/odd"), server.keys)))
    assert server.asked == []


def test_a_bucket_without_such_a_folder_and_names_that_lead_out(server, tmp_path):
    keys = Keys(clouds=server.keys)
    with pytest.raises(DataError, match="no file of this name"):
        folders.bring("X=s3", "s3://mine/none/", keys, cache=tmp_path, retries=QUICK)
    server.objects["mine/bad/../../x.png"] = b"x"
    with pytest.raises(SettingsError, match="leads out of its folder"):
        folders.bring("X=s3", "s3://mine/bad", keys, cache=tmp_path / "c", retries=QUICK)
    assert not (tmp_path / "x.png").exists()


def test_an_archive_in_a_bucket(server, tmp_path):
    import io
    import zipfile

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("1.txt", "a thing")
    server.objects["mine/a.zip"] = packed.getvalue()
    source = Source("archive", "s3://mine/a.zip")
    done = fetch_source(source, cache=tmp_path, token=None, keys=Keys(clouds=server.keys), retries=QUICK)
    assert hashlib.sha256(packed.getvalue()).hexdigest()[:32] in done.path
