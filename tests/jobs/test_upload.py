"""PUSH_TO_HUB: the real client and a real process, against a local stand-in for the Hub."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from entrypoint.fetch import http
from entrypoint.processes import upload
from tests.support.hub import Hub
from tests.support.hub_process import Process
from trainer.spec.errors import GatedError, SettingsError

ROOT = Path(__file__).parents[2]
TOKEN, READER = "hf_canaryWRITEtoken", "hf_canaryREADtoken"
QUICK = http.RetryPolicy(budget=1.0, first_wait=0.05, longest_wait=0.2, timeout=2.0)


@pytest.fixture(scope="module")
def server():
    with Hub() as running:
        yield running


@pytest.fixture
def hub(server):
    server.writers, server.known_tokens = {TOKEN}, {READER}
    yield server
    server.reset()


@pytest.fixture
def out(tmp_path):
    """What a job leaves: two formats of the final LoRA, samples, and files that are nobody's business."""
    folder = tmp_path / "output"
    (folder / "sample").mkdir(parents=True)
    for name in ("step-00000010-00.png", "contact-sheet.png", ".half.tmp.png", "mine.png", "step-00000010-00-mine.png"):
        Image.new("RGB", (8, 8), (10, len(name), 3)).save(folder / "sample" / name)
    for name in ("run.log", "plan.json", "metrics.jsonl"):
        (folder / name).write_text("private")
    lora(folder, "x-diffusers", 1)
    lora(folder, "x", 2)
    return folder


def lora(folder, name, value):
    about = {"ss_output_name": "x", "ss_network_dim": "4", "ss_steps": "24", "ss_num_train_images": "16"}
    about |= {"modelspec.trigger_phrase": 'zot: "a"', "ss_sd_model_name": "mini"}
    (folder / f"{name}.safetensors").write_bytes(save({"a": np.full(9, value, np.float32)}, about))


@pytest.fixture
def asked(out):
    return upload.Job("me/lora", TOKEN, str(out), "x", "org/base", at_start=QUICK, at_end=QUICK)


def environment(hub, tmp_path):
    mine = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}
    return {**mine, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}


def uploaded(what, hub, tmp_path):
    with upload.beside(what, environment(hub, tmp_path)) as finish:
        return finish()


def files(hub, name="me/lora"):
    repo = hub.repos["model", name]
    return repo.commits[repo.refs["main"]]


def test_the_final_files_come_in_one_commit_to_a_private_repository(hub, asked, out, tmp_path):
    assert uploaded(asked, hub, tmp_path) == 0
    repo, there = hub.repos["model", "me/lora"], files(hub)
    assert repo.private and repo.log == ["Kiln: x"]
    assert there.keys() == {"x.safetensors", "x-diffusers.safetensors", "README.md"} | {
        "sample/step-00000010-00.png",
        "sample/contact-sheet.png",
    }
    assert there["x.safetensors"] == (out / "x.safetensors").read_bytes()
    assert upload.is_done(asked, out / "x.safetensors")
    assert not upload.is_done(dataclasses.replace(asked, repo="me/other"), out / "x.safetensors")
    lora(out, "x", 3)
    assert not upload.is_done(asked, out / "x.safetensors"), "another file of the same name"
    assert not [p for p, data in there.items() if TOKEN.encode() in data or str(tmp_path).encode() in data]


def test_a_further_run_uploads_its_own_files_beside_those_of_the_first(hub, asked, out, tmp_path):
    assert uploaded(asked, hub, tmp_path) == 0
    before = files(hub)
    lora(out, "x-2", 5)
    lora(out, "x-2-step00000001-mine", 6)
    home = out / "runs" / "x-2"
    (home / "sample").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(home / "sample" / "contact-sheet.png")
    status = {"started": time.time() + 1, "run": "x-2", "run_folder": "runs/x-2"}
    (out / "status.json").write_text(json.dumps(status))
    assert uploaded(dataclasses.replace(asked, started=time.time()), hub, tmp_path) == 0
    there = files(hub)
    assert there.keys() - before.keys() == {"x-2.safetensors", "runs/x-2/sample/contact-sheet.png"}
    assert all(there[name] == before[name] for name in before if name != "README.md")
    assert b"runs/x-2/sample/contact-sheet.png" in there["README.md"]
    assert (home / upload.MARKER).is_file() and upload.is_done(asked, out / "x.safetensors")


def test_the_card_is_of_the_files_header_alone(hub, asked, tmp_path):
    import yaml

    assert uploaded(asked, hub, tmp_path) == 0
    _, front, body = files(hub)["README.md"].decode().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "org/base" and front["instance_prompt"] == 'zot: "a"' and "lora" in front["tags"]
    assert "rank 4" in body and "24 steps" in body and "sample/contact-sheet.png" in body


def test_a_repository_that_is_there_keeps_its_visibility_and_files(hub, asked, tmp_path):
    hub.add("model", "me/lora", {"notes.txt": b"mine", "README.md": b"old"})
    assert uploaded(asked, hub, tmp_path) == 0
    assert not hub.repos["model", "me/lora"].private and hub.asked("/api/repos/create", "POST") == []
    assert files(hub)["notes.txt"] == b"mine" and files(hub)["README.md"] != b"old"


@pytest.mark.parametrize(("token", "exists"), [(READER, True), (READER, False), ("hf_unknown", True)])
def test_a_token_that_may_not_write_is_refused_before_anything_is_trained(hub, asked, tmp_path, token, exists):
    if exists:
        hub.add("model", "me/lora", {})
    with pytest.raises(GatedError, match="HF_WRITE_TOKEN") as refused:
        with upload.beside(replace(asked, token=token), environment(hub, tmp_path)):
            pytest.fail("nothing begins")
    assert token not in str(refused.value)


def test_no_token_is_an_error_of_the_settings():
    assert upload.job(None, None, None) is None
    with pytest.raises(SettingsError, match="HF_WRITE_TOKEN"):
        upload.job("me/lora", None, None)


def test_a_hub_that_is_down_at_first_stops_nobody(hub, asked, tmp_path):
    hub.down = True
    with upload.beside(asked, environment(hub, tmp_path)) as finish:
        hub.down = False
        hub.add("model", "me/lora", {})
        assert finish() == 0
    assert "x.safetensors" in files(hub)


def test_failures_that_pass_are_tried_again_and_make_one_commit(hub, asked, tmp_path):
    put = hub.fault("/put/*", method="PUT", status=500)
    commit = hub.fault("*/commit/main", method="POST", status=503, times=2)
    assert uploaded(replace(asked, at_end=replace(QUICK, budget=20.0)), hub, tmp_path) == 0
    assert put.fired == 1 and commit.fired == 2 and hub.repos["model", "me/lora"].log == ["Kiln: x"]


def test_a_failure_at_the_end_keeps_the_lora_and_the_next_start_uploads_once(hub, asked, out, tmp_path, capfd):
    """E5."""
    before = (out / "x.safetensors").read_bytes()
    fault = hub.fault("*/commit/main", method="POST", status=500, times=1000)
    assert uploaded(asked, hub, tmp_path) == 75
    assert fault.fired >= 2 and hub.repos["model", "me/lora"].log == []
    assert (out / "x.safetensors").read_bytes() == before
    assert not upload.is_done(asked, out / "x.safetensors")
    fault.times = 0
    assert uploaded(asked, hub, tmp_path) == 0
    (out / upload.MARKER).unlink()  # killed between the commit and its mark
    assert uploaded(asked, hub, tmp_path) == 0
    assert hub.repos["model", "me/lora"].log == ["Kiln: x"], "exactly once"
    printed = "".join(capfd.readouterr())
    assert TOKEN not in printed and "s3cret" not in printed and "Traceback" not in printed


def test_each_save_is_uploaded_while_training_goes_on(hub, asked, out, tmp_path):
    (out / "status.json").write_text(json.dumps({"started": time.time(), "run": "x", "run_folder": "."}))
    with upload.beside(asked, environment(hub, tmp_path)) as finish:
        for step in (4, 8):
            lora(out, f"x-step{step:08d}-diffusers", step)
            lora(out, f"x-step{step:08d}", step)
            wait_for(lambda name=f"x-step{step:08d}-diffusers.safetensors": name in files(hub))
        assert finish() == 0
    steps = ["Kiln: x-step00000004", "Kiln: x-step00000008"]
    assert hub.repos["model", "me/lora"].log == [*steps, "Kiln: x"]


def test_a_save_that_cannot_be_uploaded_is_no_failure(hub, asked, out, tmp_path):
    (out / "status.json").write_text(json.dumps({"started": time.time(), "run": "x", "run_folder": "."}))
    with upload.beside(asked, environment(hub, tmp_path)) as finish:
        fault = hub.fault("*/commit/main", method="POST", status=500, times=3)
        lora(out, "x-step00000004", 4)
        wait_for(lambda: fault.fired == 3)
        assert finish() == 0
    assert hub.repos["model", "me/lora"].log[-1] == "Kiln: x"


# ---- the process and the Hub's client may fail in any way


NONSENSE = {
    "a list": b"[]",
    "an empty object": b"{}",
    "a number": b"7",
    "objects of another kind": b'{"objects": 3, "files": 3}',
    "a page": b"<html>Log in</html>",
    "deep nesting": b"[" * 100_000,
    "an address of a file": b'{"objects": [{"oid": "x", "size": 1, "actions": {"upload": {"href": "file:///etc/passwd"}}}]}',
    "another oid": b'{"objects": [{"oid": "ff", "size": 1, "error": {"message": "\\u001b[2J"}}], "files": [{}]}',
    "nothing": b"",
}


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    """The code of the uploading process in one that serves many tests."""
    running = Process(server.endpoint, tmp_path_factory.mktemp("home"))
    yield running
    running.kill()


def final(client, job):
    """What the upload of the final files ends with."""
    client.send({"call": "upload", "job": dataclasses.asdict(job)})
    return client.receive()


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE)
@pytest.mark.parametrize("path", ["*/info/lfs/objects/batch", "*/commit/main", "*/preupload/main"])
def test_nonsense_of_the_hub_is_75_and_the_next_try_uploads(hub, asked, out, client, path, body):
    hub.add("model", "me/lora", {})
    fault = hub.fault(path, method="POST", status=200, times=1000, body=body)
    done = final(client, replace(asked, at_end=replace(QUICK, budget=0.05)))
    assert fault.fired and done.code == 75
    assert "\x1b" not in done.log
    fault.times = 0
    assert final(client, asked).code == 0 and files(hub)["x.safetensors"] == (out / "x.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("status", "code"),
    [
        *((401, 77), (402, 77), (403, 77), (404, 77), (413, 77), (400, 78), (422, 78), (507, 75)),
        *((408, 75), (409, 75), (412, 75), (429, 75), (500, 75), (503, 75), (520, 75)),
    ],
)
def test_every_status_of_a_commit_has_its_code(hub, asked, client, status, code):
    fault = hub.fault("*/commit/main", method="POST", status=status, times=1000)
    done = final(client, replace(asked, at_end=replace(QUICK, budget=0.05)))
    assert done.code == code and "PUSH_TO_HUB=me/lora" in done.data["message"]
    assert fault.fired == 1 or code == 75


@pytest.mark.parametrize("wait", ["31536000", "Fri, 31 Dec 2999 23:59:59 GMT"])
def test_a_wait_of_a_year_is_not_waited_for(hub, asked, client, wait):
    fault = hub.fault("*/commit/main", method="POST", status=429, headers={"Retry-After": wait}, times=9)
    assert final(client, asked).code == 75 and fault.fired == 1


def test_no_wait_at_all_is_waited_all_the_same(hub, asked, client):
    fault = hub.fault("*/commit/main", method="POST", status=429, headers={"Retry-After": "0"}, times=1000)
    assert final(client, asked).code == 75 and fault.fired < 30


def test_a_signed_address_that_has_expired_is_asked_for_again(hub, asked, client):
    put = hub.fault("/put/*", method="PUT", status=403)
    assert final(client, asked).code == 0 and put.fired == 1


def test_the_clients_own_protocol_may_fail(hub, asked, out, tmp_path, capfd):
    """Xet, which nobody has switched off: its errors are FileNotFoundError, PermissionError, RuntimeError."""
    mine = {name: value for name, value in environment(hub, tmp_path).items() if name != "HF_HUB_DISABLE_XET"}
    patient = replace(asked, at_end=replace(QUICK, budget=60.0))
    with upload.beside(patient, mine) as finish:
        assert finish() == 0
    assert files(hub)["x.safetensors"] == (out / "x.safetensors").read_bytes()
    assert hub.asked("*/xet-write-token/*") and "does without its Xet protocol" in "".join(capfd.readouterr())


def test_a_repository_that_is_gone_at_the_end_is_made_again(hub, asked, out, tmp_path):
    with upload.beside(asked, environment(hub, tmp_path)) as finish:
        del hub.repos["model", "me/lora"]
        assert finish() == 0
    assert files(hub)["x.safetensors"] == (out / "x.safetensors").read_bytes()


def test_a_token_that_is_revoked_in_the_middle_is_77(hub, asked, tmp_path):
    with upload.beside(asked, environment(hub, tmp_path)) as finish:
        hub.writers.clear()
        assert finish() == 77


def test_a_network_that_is_gone_at_the_end_is_75(asked, tmp_path):
    with Hub() as gone:
        gone.writers = {TOKEN}
        with upload.beside(asked, environment(gone, tmp_path)) as finish:
            gone.server.shutdown()
            gone.server.server_close()
            assert finish() == 75


def test_a_process_that_is_killed_is_started_again(hub, asked, out, tmp_path, caplog):
    """Before the end, and in the middle of the commit."""
    with upload.beside(asked, environment(hub, tmp_path)) as finish:
        kill_children()
        stalled = hub.fault("*/commit/main", method="POST", stall_at=0)
        killer = threading.Thread(target=lambda: (stalled.reached.wait(60), kill_children()))
        killer.start()
        assert finish() == 0
        killer.join()
        stalled.released.set()
    assert files(hub)["x.safetensors"] == (out / "x.safetensors").read_bytes()
    assert upload.is_done(asked, out / "x.safetensors") and caplog.text.count("was the memory full?") == 2


def test_a_process_that_dies_each_time_is_75(hub, asked, out, tmp_path, caplog):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "huggingface_hub.py").write_text("import os, sys\nprint('ready')\nos.abort()\n")
    mine = environment(hub, tmp_path) | {"PYTHONPATH": str(broken)}
    with upload.beside(asked, mine) as finish:
        assert finish() == 75
    assert "Start the same job again to upload it" in caplog.text


def test_a_client_that_fails_in_its_own_way_is_75(hub, asked, out, tmp_path, capfd):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "huggingface_hub.py").write_text("class Odd(BaseException): pass\nraise Odd('s3cret')\n")
    mine = environment(hub, tmp_path) | {"PYTHONPATH": str(broken)}
    with upload.beside(asked, mine) as finish:
        assert finish() == 75
    assert "s3cret" not in "".join(capfd.readouterr())


def test_a_machine_that_starts_no_process_trains_all_the_same(hub, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with upload.beside(asked, environment(hub, tmp_path)) as finish:
        assert finish() == 75


def test_a_process_that_hangs_is_ended_in_time(hub, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "PROCESSES", 1)
    with upload.beside(asked, environment(hub, tmp_path)) as finish:
        monkeypatch.setattr(upload, "STARTUP_S", 0.0)
        for child in children():
            os.kill(int(child.name), signal.SIGSTOP)
        began = time.monotonic()
        assert finish() == 75 and time.monotonic() - began < 4


@pytest.mark.parametrize("endpoint", ["http://[::1", "ftp://x", "http://a:99999", "x", "http://a..b", "\x01"])
def test_an_odd_address_of_the_hub_is_78(asked, tmp_path, endpoint):
    mine = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_ENDPOINT": endpoint}
    with pytest.raises(SettingsError, match="HF_ENDPOINT"):
        with upload.beside(asked, mine):
            pytest.fail("nothing begins")


def test_a_status_of_somebody_else_leads_nowhere(hub, asked, out, tmp_path):
    """A status.json is read back from the output folder, which others may write to."""
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "private.png").write_bytes(b"private")
    for name, folder in (("x", ".."), ("x", "/etc"), ("../x", "."), ("x", str(tmp_path)), ("x", 7), ("x\0", ".")):
        (out / "status.json").write_text(json.dumps({"started": time.time(), "run": name, "run_folder": folder}))
        assert upload.current_run(asked) is None
    assert uploaded(asked, hub, tmp_path) == 0
    assert not [name for name in files(hub) if "private" in name]


def test_links_and_odd_names_beside_the_samples_stay_here(hub, asked, out, client):
    (out.parent / "private.png").write_bytes(b"private")
    (out / "sample" / "link.png").symlink_to(out.parent / "private.png")
    (out / "sample" / "folder.png").mkdir()
    (out / "sample" / "a\\b.png").write_bytes(b"odd")
    (out / "sample" / "a\nb.png").write_bytes(b"odd")
    hub.add("model", "me/lora", {})
    assert final(client, asked).code == 0
    samples = {name for name in files(hub) if name.startswith("sample/")}
    assert samples == {"sample/contact-sheet.png", "sample/step-00000010-00.png"}


def kill_children():
    for child in children():
        os.kill(int(child.name), signal.SIGKILL)


def test_the_token_is_in_no_argument_and_no_environment(hub, asked, tmp_path):
    """Nor in those of the trainer: faults/test_secrets.py."""
    shown = []
    with upload.beside(asked, {**environment(hub, tmp_path), "HF_TOKEN": TOKEN, "HF_WRITE_TOKEN": TOKEN}) as finish:
        for child in children():
            shown += [(child / name).read_bytes() for name in ("cmdline", "environ")]
        assert finish() == 0
    assert (
        len(shown) >= 2
        and any(b"entrypoint.processes.upload" in s for s in shown)
        and not any(TOKEN.encode() in s for s in shown)
    )


def children():
    own = str(os.getpid())
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = (place / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if parent == own and b"entrypoint.processes.upload" in (place / "cmdline").read_bytes():
            yield place


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- whole jobs

SHORT = """\
from trainer.process import guard
guard.begin("entrypoint.processes.farewell")  # as the command begins
import dataclasses, sys
from entrypoint.__main__ import main
from entrypoint.fetch import http
from entrypoint.processes import upload
job, quick = upload.job, http.RetryPolicy(1.0, 0.05, 0.2, 2.0)
upload.job = lambda *asked, creates: dataclasses.replace(job(*asked, creates=creates), at_start=quick, at_end=quick)
sys.exit(main([]))
"""


def start(job, hub, **changes):
    mine = {**environment(hub, job.folder), **job.environment, "OMP_NUM_THREADS": "1"}
    mine |= {"PUSH_TO_HUB": "me/lora", "HF_WRITE_TOKEN": TOKEN, "PARAMS_MAX_STEPS": "2", **changes}
    return job.programs.start("-c", SHORT, environment=mine)


@pytest.mark.slow
def test_a_job_whose_upload_fails_is_uploaded_by_the_next_start_without_training(job, hub):
    """E5, and B1's upload: the signal comes while the final file is on its way."""
    fault = hub.fault("*/commit/main", method="POST", status=500, times=1000)
    process = start(job, hub)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 75 and "Start the same job again" in printed, printed
    final = job.out / "x.safetensors"
    before, steps = final.stat().st_mtime_ns, (job.out / "metrics.jsonl").read_bytes()
    fault.times = 0

    stalled = hub.fault("*/commit/main", method="POST", stall_at=0)
    process = start(job, hub)
    assert stalled.reached.wait(100)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - began < 4, printed
    stalled.released.set()

    for _ in range(2):  # the second has nothing to do
        process = start(job, hub)
        printed, _ = process.communicate(timeout=200)
        assert process.returncode == 0 and "Traceback" not in printed, printed
    assert hub.repos["model", "me/lora"].log == ["Kiln: x"]
    assert files(hub)["x.safetensors"] == final.read_bytes()
    assert (final.stat().st_mtime_ns, (job.out / "metrics.jsonl").read_bytes()) == (before, steps)
    everything = [p.read_bytes() for p in job.folder.rglob("*") if p.is_file()] + [printed.encode()]
    assert not any(TOKEN.encode() in data for data in everything)
    assert json.loads((job.out / upload.MARKER).read_text())["repo"] == "me/lora"


@pytest.mark.slow
def test_two_runs_of_one_folder_push_their_own_files(job, hub):
    """The second run begins with what the first had uploaded; killed in the middle, it goes on and uploads once."""
    process = start(job, hub, PARAMS_SAVE_EVERY_N_STEPS="1")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    of_first = {name: data for name, data in files(hub).items() if name != "README.md"}
    assert "x.safetensors" in of_first

    other = {"PARAMS_SEED": "1", "PARAMS_MAX_STEPS": "100"}
    process = start(job, hub, **other)
    wait_for(lambda: (job.out / "runs" / "x-2" / "metrics.jsonl").is_file())
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "New run x-2, beside x" in printed and "Traceback" not in printed
    step = job.status()["step"]
    other["PARAMS_MAX_STEPS"] = str(step + 2)
    process = start(job, hub, **other)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and f"Resumed at step {step} of {step + 2}" in printed, printed

    there = files(hub)
    assert {name: there[name] for name in of_first} == of_first
    assert there["x-2.safetensors"] == (job.out / "x-2.safetensors").read_bytes()
    assert b"# x-2\n" in there["README.md"]
    new = there.keys() - of_first.keys() - {"README.md"}
    assert all(name.startswith(("x-2", "runs/x-2/")) for name in new)
    assert (job.out / "upload.json").is_file() and (job.out / "runs" / "x-2" / "upload.json").is_file()
    log = list(hub.repos["model", "me/lora"].log)
    for changes in ({}, other):  # both are done, and uploaded
        process = start(job, hub, PARAMS_SAVE_EVERY_N_STEPS="1", **changes)
        printed, _ = process.communicate(timeout=200)
        assert process.returncode == 0 and "This job is done" in printed, printed
    assert log == hub.repos["model", "me/lora"].log and log.count("Kiln: x-2") == 1


def test_saves_of_another_run_are_not_uploaded_while_the_run_of_this_job_is_unknown(hub, asked, out, tmp_path):
    """Whether it is a new one, the images show; until then the newest saves are those of the run before."""
    (out / "status.json").write_text(json.dumps({"started": time.time(), "run": "x", "run_folder": "."}))
    lora(out, "x-step00000008", 8)
    with upload.beside(dataclasses.replace(asked, started=time.time()), environment(hub, tmp_path)) as finish:
        time.sleep(2 * upload.POLL_S)
        assert "x-step00000008.safetensors" not in files(hub)
        status = {"started": time.time(), "run": "x-2", "run_folder": "runs/x-2"}
        (out / "status.json").write_text(json.dumps(status))
        lora(out, "x-2-step00000001", 1)
        wait_for(lambda: "x-2-step00000001.safetensors" in files(hub))
        lora(out, "x-2", 2)
        assert finish() == 0
    assert hub.repos["model", "me/lora"].log == ["Kiln: x-2-step00000001", "Kiln: x-2"]
