"""UPLOAD_TO: a real process and a real client, against a server that checks signatures by AWS's rules."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import threading

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from entrypoint.fetch import http
from entrypoint.processes import upload
from tests.support.bucket_server import SAS, Buckets
from trainer.spec.errors import GatedError, SettingsError

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
        assert manifest["files"][name] == {"bytes": len(there[name]), "sha256": hashlib.sha256(there[name]).hexdigest()}
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
