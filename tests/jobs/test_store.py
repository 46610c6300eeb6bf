"""UPLOAD_TO: a real process and a real client, against a server that checks signatures by AWS's rules."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import threading
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from entrypoint.fetch import http
from entrypoint.fetch.doors.buckets import SCHEMES
from entrypoint.fetch.doors.keys import CLOUDS
from entrypoint.processes import upload
from entrypoint.processes.store import VARIABLES, Store, keys_for
from entrypoint.processes.uploader import Uploader
from tests.support.bucket_server import SAS, Buckets, etag
from trainer.network.client import open_client
from trainer.spec.errors import GatedError, SettingsError, UnreachableError

QUICK = http.RetryPolicy(budget=1.0, first_wait=0.05, longest_wait=0.2, timeout=2.0)


@pytest.fixture
def server():
    with Buckets() as running:
        yield running


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "output"
    (folder / "sample").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "sample" / "contact-sheet.png")
    (folder / "run.log").write_text("private")
    lora(folder, "x-diffusers", 1)
    lora(folder, "x", 2)
    return folder


def lora(folder, name, value):
    about = {"ss_output_name": "x", "ss_network_dim": "4", "ss_steps": "24", "ss_num_train_images": "16"}
    (folder / f"{name}.safetensors").write_bytes(save({"a": np.full(9999, value, np.float32)}, about))


def asked(server, out, address="s3://mine/runs/x", **changes):
    own = {"clouds": server.keys, "at_start": QUICK, "at_end": QUICK, **changes}
    return upload.Job(address, "", str(out), "x", "org/base", variable="UPLOAD_TO", **own)


def uploaded(what, tmp_path):
    mine = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH")}
    with upload.beside(what, {**mine, "HF_HOME": str(tmp_path / "hf")}) as finish:
        return finish()


def below(server, prefix="mine/runs/x/"):
    return {name.removeprefix(prefix): data for name, data in server.objects.items() if name.startswith(prefix)}


def row_of(data):
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "etag": etag(data)}


def store(server, out, name="x"):
    what = dataclasses.replace(asked(server, out), name=name)
    return Store(what, open_client(timeout=5.0))


def manifest_of(server):
    return json.loads(below(server)["manifest.json"])


def test_the_final_files_and_a_manifest_that_tells_their_hashes(server, out, tmp_path):
    what = asked(server, out)
    assert uploaded(what, tmp_path) == 0
    there = below(server)
    names = {"x.safetensors", "x-diffusers.safetensors", "sample/contact-sheet.png"}
    assert there.keys() == names | {"README.md", "manifest.json"}
    manifest = json.loads(there["manifest.json"])
    assert manifest["complete"] is True and manifest["files"].keys() == names
    for name in names:
        assert there[name] == (out / name).read_bytes()
        assert manifest["files"][name] == row_of(there[name])
    assert upload.is_done(what, out / "x.safetensors")
    assert not upload.is_done(dataclasses.replace(what, repo="s3://mine/other"), out / "x.safetensors")
    assert "cAnary" not in (out / "stored.json").read_text() + repr(what)


def test_what_is_there_is_not_sent_again_and_what_is_not_whole_is(server, out, tmp_path):
    assert uploaded(asked(server, out), tmp_path) == 0
    server.asked.clear()
    assert uploaded(asked(server, out), tmp_path) == 0
    sent = [path for method, path, _ in server.asked if method == "PUT" and ".safetensors" in path]
    assert sent == []
    server.objects["mine/runs/x/x.safetensors"] = b"short"
    lora(out, "x-diffusers", 7)
    assert uploaded(asked(server, out), tmp_path) == 0
    assert below(server)["x.safetensors"] == (out / "x.safetensors").read_bytes()
    assert below(server)["x-diffusers.safetensors"] == (out / "x-diffusers.safetensors").read_bytes()


@pytest.mark.parametrize("fault", [(503, "SlowDown"), (500, "InternalError"), (400, "BadDigest")])
def test_a_fault_that_passes_is_tried_again(server, out, tmp_path, fault):
    server.broken_puts = [fault, fault]
    assert uploaded(asked(server, out), tmp_path) == 0
    assert below(server)["x.safetensors"] == (out / "x.safetensors").read_bytes()


def test_a_service_that_keeps_other_bytes_is_noticed(server, out, tmp_path, capfd):
    server.spoiled = True
    assert uploaded(asked(server, out), tmp_path) == 75
    assert not (out / "stored.json").exists() and (out / "x.safetensors").exists()
    assert "kept other bytes" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "cAnary-other"}, GatedError, "key is not accepted"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, GatedError, "no key for this bucket"),
        ({"AWS_REGION": "us-east-1"}, SettingsError, "AWS_REGION"),
    ],
)
def test_a_key_that_does_not_fit_ends_the_job_before_it_begins(server, out, tmp_path, changes, kind, said):
    clouds = {name: value for name, value in {**server.keys, **changes}.items() if value}
    with pytest.raises(kind, match=said) as problem:
        uploaded(asked(server, out, clouds=clouds), tmp_path)
    assert "cAnary" not in str(problem.value) and server.objects == {}


def test_a_bucket_that_is_not_there_and_one_that_may_only_be_read(server, out, tmp_path):
    with pytest.raises(SettingsError, match="no such bucket"):
        uploaded(asked(server, out, "s3://other/x"), tmp_path)
    server.broken_puts = [(403, "AccessDenied")] * 9
    with pytest.raises(GatedError, match="nothing may be written there"):
        uploaded(asked(server, out), tmp_path)
    assert uploaded(asked(server, out, creates=False), tmp_path) == 77  # a check only reads; the end writes
    server.broken_puts = [(507, "QuotaExceeded")]
    with pytest.raises(GatedError, match="takes no more"):
        uploaded(asked(server, out), tmp_path)


def test_a_key_that_ends_during_the_job_leaves_the_lora_here(server, out, tmp_path):
    with upload.beside(
        asked(server, out), {k: os.environ[k] for k in ("PATH", "PYTHONPATH") if k in os.environ}
    ) as finish:
        server.late = datetime.timedelta(hours=13)
        assert finish() == 77
    assert (out / "x.safetensors").exists() and not (out / "stored.json").exists()


def test_an_address_that_is_signed_for_put_takes_the_lora(server, out, tmp_path, capfd):
    from entrypoint.fetch.doors import buckets

    signed = buckets.signed("X", buckets.parse("X", "s3://mine/lora.safetensors"), "PUT", server.keys)
    assert uploaded(asked(server, out, signed, clouds={}), tmp_path) == 0
    assert server.objects == {"mine/lora.safetensors": (out / "x.safetensors").read_bytes()}
    assert "cAnary" not in (out / "stored.json").read_text() and "Signature" not in (out / "stored.json").read_text()
    server.late = datetime.timedelta(hours=13)
    assert uploaded(asked(server, out, signed, clouds={}), tmp_path) == 77
    said = capfd.readouterr().err
    assert "signature has expired" in said and "X-Amz-Signature=" not in said


def test_two_jobs_in_one_folder_keep_each_others_rows_and_are_complete_together(server, out):
    lora(out, "y", 3)
    first, second = store(server, out), store(server, out, "y")
    first.check()
    second.check()
    first.send("x", {"x.safetensors": out / "x.safetensors"}, {}, run="x", final=True)
    assert manifest_of(server)["complete"] is False, "y has not ended"
    assert manifest_of(server)["runs"]["x"]["complete"] is True
    second.send("y", {"y.safetensors": out / "y.safetensors"}, {}, run="y", final=True)
    manifest = manifest_of(server)
    assert manifest["complete"] is True and manifest["files"].keys() == {"x.safetensors", "y.safetensors"}
    store(server, out).check()
    assert manifest_of(server)["complete"] is False and manifest_of(server)["files"] == manifest["files"]


@pytest.mark.parametrize("knows", [True, False])
def test_what_another_job_writes_between_our_reading_and_our_writing_is_not_lost(server, out, knows):
    server.knows_conditions = knows
    lora(out, "y", 3)
    first, second = store(server, out), store(server, out, "y")
    waiting = [lambda: second.send("y", {"y.safetensors": out / "y.safetensors"}, {}, run="y", final=True)]

    def write_first(request):
        if knows and request.command == "PUT" and waiting:
            waiting.pop()()

    server.rules["/mine/runs/x/manifest.json"] = write_first
    first.send("x", {"x.safetensors": out / "x.safetensors"}, {}, run="x", final=True)
    wanted = {"x.safetensors", "y.safetensors"} if knows else {"x.safetensors"}
    assert manifest_of(server)["files"].keys() == wanted and (waiting == []) is knows


def test_a_file_that_another_job_has_replaced_by_one_of_equal_size_is_sent_again(server, out):
    mine, files = store(server, out), {"sample/a.png": out / "a.png", "x.safetensors": out / "x.safetensors"}
    (out / "a.png").write_bytes(b"mine!")
    mine.send("x", files, {}, run="x", final=False)
    server.objects["mine/runs/x/sample/a.png"] = b"other"
    mine.send("x", files, {}, run="x", final=True)
    assert below(server)["sample/a.png"] == b"mine!"
    assert manifest_of(server)["files"]["sample/a.png"] == row_of(b"mine!")


def test_a_run_that_turns_out_to_have_another_name_leaves_the_earlier_one_complete(server, out):
    files = {"x.safetensors": out / "x.safetensors"}
    store(server, out).send("x", files, {}, run="x", final=True)
    later = store(server, out)
    later.check()
    later.send("x-2", files, {}, run="x-2", final=True)
    assert {name: run["complete"] for name, run in manifest_of(server)["runs"].items()} == {"x": True, "x-2": True}


def test_a_key_that_may_not_list_uploads_and_one_that_may_not_read_replaces_no_manifest(server, out, tmp_path):
    server.may_list = False
    assert uploaded(asked(server, out), tmp_path) == 0
    assert below(server)["x.safetensors"] == (out / "x.safetensors").read_bytes()
    before = below(server)["manifest.json"]
    server.may_read = False
    with pytest.raises(GatedError, match="may not read the manifest"):
        uploaded(asked(server, out), tmp_path)
    assert below(server)["manifest.json"] == before


def test_a_service_that_answers_only_later_loses_no_row_of_earlier_jobs(server, out):
    store(server, out, "old").send("old", {"old.safetensors": out / "x.safetensors"}, {}, run="old", final=True)
    started = time.time()
    lora(out, "x-step00000004", 4)
    (out / "status.json").write_text(json.dumps({"started": started, "run": "x", "run_folder": "."}))
    uploading = Uploader(asked(server, out, started=started - 1), threading.Event())
    server.rules["/mine/runs/x/manifest.json"] = lambda _: (503, {}, b"")
    with pytest.raises(UnreachableError):
        uploading.check()
    del server.rules["/mine/runs/x/manifest.json"]
    uploading.saves()
    assert manifest_of(server)["files"].keys() >= {"old.safetensors", "x-step00000004.safetensors"}


def test_the_uploading_process_gets_the_keys_of_its_service_alone():
    every = {f"{begin}{name}": "1" for begin in CLOUDS for name in ("KEY", "REGION")}
    assert {*VARIABLES.values()} == {*CLOUDS}
    for scheme, service in SCHEMES.items():
        assert keys_for(f"{scheme}://b/x", every).keys() == {n for n in every if n.startswith(VARIABLES[service])}
    assert keys_for("https://host/x?sig=1", every) == {}


def test_azure_takes_blocks_by_a_sas_token(server, out, tmp_path):
    clouds = {"AZURE_STORAGE_ENDPOINT": server.url, "AZURE_STORAGE_SAS_TOKEN": SAS}
    assert uploaded(asked(server, out, "az://mine/runs/x", clouds=clouds), tmp_path) == 0
    assert below(server)["x.safetensors"] == (out / "x.safetensors").read_bytes()


def test_saves_come_while_training_goes_on_and_all_is_there_at_the_end(job, server):
    arrived = {}
    seen = threading.Event()

    def watch(request):
        if request.command == "PUT":
            arrived[request.path.partition("?")[0]] = (job.out / "x.safetensors").exists()
            seen.set()

    for step in (4, 8, 12):
        server.rules[f"/mine/runs/x-step{step:08d}.safetensors"] = watch
    code, printed = job.run(UPLOAD_TO="s3://mine/runs", **server.keys, PARAMS_MAX_STEPS="300", KEEP_CHECKPOINTS="300")
    assert code == 0 and "Uploaded to s3://mine/runs; the SHA-256 of the LoRA is" in printed, printed
    there = below(server, "mine/runs/")
    assert there["x.safetensors"] == (job.out / "x.safetensors").read_bytes()
    early = [name for name in there if "-step" in name]
    assert early and json.loads(there["manifest.json"])["complete"] is True
    written = b"".join(p.read_bytes() for p in job.out.rglob("*") if p.is_file())
    assert b"cAnary" not in written + printed.encode()
    server.asked.clear()
    code, printed = job.run(UPLOAD_TO="s3://mine/runs", **server.keys, PARAMS_MAX_STEPS="300", KEEP_CHECKPOINTS="300")
    assert code == 0 and "This job is done" in printed and server.asked == []


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ftp://host/x", "neither a folder of a bucket"),
        ("/some/folder", "neither a folder of a bucket"),
        ("https://host/x", "has no signature"),
        ("https://[x/y?sig=1", "its host or port is not written as one"),
        ("https://h:99999/y?sig=1", "its host or port is not written as one"),
        ("https://a b/y?sig=1", "its host has a blank"),
    ],
)
def test_what_is_no_place_for_files_is_refused(job, address, said):
    code, printed = job.run("--check", UPLOAD_TO=address)
    assert code == 78 and said in printed, printed
