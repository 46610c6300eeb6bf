"""Jobs on RunPod, from one's own machine, against a server that enforces the shapes of its published document."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entrypoint.fetch import http
from entrypoint.runpod import __main__, download, request
from entrypoint.runpod import api as runpod_api
from entrypoint.runpod.api import RunPod
from entrypoint.system.prices import read_offers
from tests.support.pod import KEY, violations

QUICK = http.RetryPolicy(budget=3.0, first_wait=0.01, longest_wait=0.05, timeout=2.0)
JOB = {"BASE_MODEL": "flux", "DATASET_NAME": "org/images", "PARAMS_MAX_EPOCHS": "3", "HF_HOME": "/home/me/hf"}
ROOT = Path(__file__).resolve().parents[3]
IMAGE = ("--image", "ghcr.io/me/kiln:0.1.0")


@pytest.fixture
def command(account, capsys, monkeypatch):
    """`command(*arguments, **environment)`: exit code and all that was printed."""
    monkeypatch.setattr(
        __main__.RunPod,
        "from_environment",
        classmethod(lambda cls, e: cls(e["RUNPOD_API_KEY"], e["RUNPOD_API_BASE_URL"], QUICK)),
    )

    def run(*arguments, **environment):
        code = __main__.main(list(arguments), {**account, **environment})
        out = capsys.readouterr()
        return code, out.out + out.err

    return run


def sent(server, asked):
    return [body for what, body in server.asked if what == asked]


def test_the_template_is_made_once_and_then_updated(server, command):
    code, printed = command("template", *IMAGE)
    assert code == 0 and "Created the template Kiln (cuda) (tpl1)" in printed
    code, printed = command("template", "--image", "ghcr.io/me/kiln:0.2.0", "--volume", "200")
    assert code == 0 and "Updated" in printed
    (template,) = server.templates.values()
    assert template["image"] == "ghcr.io/me/kiln:0.2.0-cuda" and template["category"] == "NVIDIA"
    assert template["disk"] == 25 and template["mounts"] == {"persistent": {"size": 200, "path": "/workspace"}}
    assert template["env"]["HF_TOKEN"] == "{{ RUNPOD_SECRET_HF_TOKEN }}" and template["ports"] == [
        "22/tcp",
        "8675/http",
    ]
    assert command("template", *IMAGE, "--backend", "rocm")[0] == 0
    assert {t["category"] for t in server.templates.values()} == {"NVIDIA", "AMD"}


@pytest.mark.parametrize(
    ("variables", "port"),
    [
        ({}, "8675"),
        ({"MONITOR_PORT": "9000"}, "9000"),
        ({"CONFIG_JSON": '{"MONITOR_PORT": "9000"}'}, "9000"),
        ({"CONFIG_JSON": '{"MONITOR_PORT": 9000}'}, "9000"),
        ({"CONFIG_JSON": '{"MONITOR_PORT": 0}'}, None),
        ({"CONFIG_JSON": '{"MONITOR_PORT": 9000}', "MONITOR_PORT": "9001"}, "9001"),
        ({"CONFIG_JSON": "{"}, "8675"),
    ],
)
def test_a_pod_opens_the_port_of_the_monitor_page_wherever_it_is_named(variables, port):
    assert request.ports(variables) == ["22/tcp", *([f"{port}/http"] if port else [])]


def test_a_pod_gets_the_variables_of_the_environment(server, command):
    code, printed = command("deploy", *IMAGE, "--gpu", "mi300x", "--max-cost", "5", "--yes", **JOB)
    assert code == 0, printed
    assert "1 x MI300X (192 GB each), secure cloud: $2.49 an hour" in printed and "after 2.0 hours" in printed
    (body,) = sent(server, "POST /v2/pods")
    assert body["env"] == {
        "BASE_MODEL": "flux", "DATASET_NAME": "org/images", "PARAMS_MAX_EPOCHS": "3", "PRICE_PER_HOUR": "2.49",
        "MAX_COST": "5",
    }  # fmt: skip
    assert body["image"] == "ghcr.io/me/kiln:0.1.0-rocm" and body["gpu"] == {
        "id": "AMD Instinct MI300X OAM",
        "count": 1,
    }
    assert body["mounts"] == {"persistent": {"size": 100, "path": "/workspace"}} and body["args"] == "train"


def test_a_newer_driver_and_a_network_volume_are_asked_for(server, command):
    asked = ("--gpu", "rtx 4090", "--count", "2", "--cloud", "community", "--network-volume", "vol1", "--yes")
    code, printed = command("deploy", *IMAGE, *asked, **JOB)
    assert code == 0 and "$0.68 an hour" in printed, printed
    (body,) = sent(server, "POST /v2/pods")
    assert body["gpu"] == {"id": "NVIDIA GeForce RTX 4090", "count": 2, "minCudaVersion": "13.0"}
    assert body["mounts"] == {"network": [{"volumeId": "vol1", "path": "/workspace"}]}


def test_more_variables_than_a_pod_may_have_are_packed(server, command):
    from entrypoint.settings.variables import ROWS

    many = {row.name: row.default for row in ROWS.values() if row.default and not row.name.endswith(("_PATH", "_HOME"))}
    for row in ROWS.values():
        if row.kind in ("integer", "number") and row.name not in many and row.name.startswith("PARAMS_"):
            many[row.name] = str(int(row.high))
    assert len(many) > 30
    many["PARAMS_NETWORK_DIM"] = "16"  # the card's memory must hold the job
    padding = [x for i in range(30) for x in ("--secret", f"EXTRA_{i}=s{i}")]
    code, printed = command("deploy", *IMAGE, "--gpu", "4090", "--yes", *padding, **{**many, **JOB})
    assert code == 0, printed
    (body,) = sent(server, "POST /v2/pods")
    assert len(body["env"]) <= 50 and json.loads(body["env"]["CONFIG_JSON"])["PARAMS_MAX_EPOCHS"] == "3"


def test_the_price_is_confirmed(server, command, monkeypatch):
    assert "add --yes" in command("deploy", *IMAGE, "--gpu", "4090", **JOB)[1]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    code, printed = command("deploy", *IMAGE, "--gpu", "4090", **JOB)
    assert code == 1 and "$0.69 an hour" in printed and sent(server, "POST /v2/pods") == []
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert command("deploy", *IMAGE, "--gpu", "4090", **JOB)[0] == 0 and len(server.pods) == 1


def test_a_dry_run_shows_no_token_and_deploys_nothing(server, command):
    code, printed = command("deploy", *IMAGE, "--gpu", "4090", "--dry-run", HF_TOKEN="hf_canary", **JOB)
    assert code == 0 and '"HF_TOKEN": "***"' in printed and "hf_canary" not in printed and not server.pods


def test_weights_behind_a_licence_without_a_token_are_pointed_out(server, command):
    asked = ("deploy", *IMAGE, "--gpu", "4090", "--dry-run")
    hint = "HF_TOKEN is not set"
    assert hint in command(*asked, **JOB)[1]
    assert hint not in command(*asked, "--secret", "HF_TOKEN=mine", **JOB)[1]
    assert hint not in command(*asked, **{**JOB, "BASE_MODEL": "sdxl"})[1]
    assert hint not in command(*asked, **JOB, MODEL_PATH="org/open")[1]


def test_local_files_travel_as_text_or_are_refused(server, command, tmp_path):
    config = tmp_path / "dataset.json"
    config.write_text('{"datasets": [{"resolution": 512, "batch_size": 2, "subsets": [{"num_repeats": 3}]}]}')
    job = {**JOB, "DATASET_CONFIG": str(config)}
    code, printed = command("deploy", *IMAGE, "--gpu", "4090", "--yes", **job)
    assert code == 0, printed
    assert json.loads(sent(server, "POST /v2/pods")[0]["env"]["DATASET_CONFIG"]) == json.loads(config.read_text())
    code, printed = command("deploy", *IMAGE, "--gpu", "4090", "--yes", **{**JOB, "DATASET_NAME": str(tmp_path)})
    assert code == 78 and "no pod can read it" in printed and len(server.pods) == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "hint"),
    [
        (("--gpu", "h100"), {}, 78, "matches several types: name one of H100 PCIe, H100 SXM"),
        (("--gpu", "h200"), {}, 78, "matches no type: name one of"),
        (("--gpu", "mi300x", "--cloud", "community"), {}, 78, "has no MI300X"),
        (("--gpu", "4090"), {"BASE_MODEL": "fluks"}, 78, "fluks"),
        (("--gpu", "4090", "--env", "PARAMS_MAX_EPOHCS=3"), {}, 78, "no such variable"),
        (("--gpu", "4090"), {"RUNPOD_API_KEY": "wrong"}, 77, "invalid API key"),
        (("--gpu", "4090", "--volume", "5"), {}, 78, "5 is less than the minimum of 10"),
        ((), {}, 64, "--gpu"),
    ],
)
def test_what_cannot_be_deployed_costs_nothing(server, command, arguments, environment, code, hint):
    found, printed = command("deploy", *IMAGE, "--yes", *arguments, **{**JOB, **environment})
    assert (found, hint in printed) == (code, True), printed
    assert not server.pods


def test_failures_that_pass_are_waited_for(server, command):
    server.fault("GET /v2/catalog/gpus", status=429, headers={"Retry-After": "1"})
    server.fault("GET /v2/catalog/gpus", status=503)
    code, printed = command("gpus")
    assert code == 0 and "$  2.49/h   192 GB" in printed and printed.index("RTX 4090") < printed.index("MI300X")


def test_todays_prices_are_what_a_quote_takes(command, tmp_path):
    code, printed = command("gpus", "--json")
    (tmp_path / "prices.json").write_text(printed)
    offers, unknown = read_offers(tmp_path / "prices.json")
    found = {offer.card: offer.per_hour for offer in offers}
    assert code == 0 and not unknown and found["MI300X 192GB"] == 2.49 and found["H100 PCIe 80GB"] > 1


def test_a_lost_answer_does_not_pay_for_two_pods(server, command):
    server.fault("POST /v2/pods", lost=True)
    code, printed = command("deploy", *IMAGE, "--gpu", "4090", "--yes", **JOB)
    assert code == 0 and len(server.pods) == 1 and len(sent(server, "POST /v2/pods")) == 1, printed


def test_an_outage_ends_with_75(server, command):
    server.fault("GET /v2/pods", status=502, times=999)
    assert command("status")[0] == 75


def test_status_tells_how_to_fetch_the_results(server, command):
    server.add_pod("a1", ports=["22/tcp"])
    server.add_pod("b2")
    server.add_pod("c3", "EXITED")
    code, printed = command("status")
    assert code == 0 and printed.count("\n") == 3 and "$0.69/h" in printed
    printed = command("status", "a1")[1]
    assert re.search(r"rsync -rtv --partial -e 'ssh -p 34446 .*' -- root@195.0.2.3:/workspace/output/ out", printed)
    assert "runpodctl send /workspace/output" in command("status", "b2")[1]
    assert "It starts the pod again" in command("status", "c3")[1]
    code, printed = command("status", "d4")
    assert code == 78 and "pod not found" in printed


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A function that makes programs of these names, all that PATH has: they note their arguments, and end as told."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(name, code=0):
        (folder / name).write_text(f'#!/bin/sh\necho "$0 $*" >> {tmp_path}/ran\nexit {code}\n')
        (folder / name).chmod(0o755)
        return tmp_path / "ran"

    return make


def test_results_of_a_running_pod_are_copied(server, command, programs, tmp_path):
    server.add_pod("a1", ports=["22/tcp"])
    ran = programs("rsync")
    code, printed = command("fetch", "a1", "--to", str(tmp_path / "here"))
    assert code == 0, printed
    assert "--partial" in ran.read_text() and f"root@195.0.2.3:/workspace/output/ {tmp_path}/here/" in ran.read_text()
    assert (tmp_path / "here").is_dir()


def test_a_stopped_pod_is_started_for_its_results(server, command, programs, tmp_path, monkeypatch):
    server.add_pod("a1", "EXITED", ports=["22/tcp"])
    monkeypatch.setattr(time, "sleep", lambda _: server.add_pod("a1", ports=["22/tcp"]))  # while it waits, it is ready
    ran = programs("scp")
    code, printed = command("fetch", "a1", "--to", str(tmp_path / "here"))
    assert code == 0 and ("POST /v2/pods/a1/action", {"action": "start"}) in server.asked, printed
    assert "costs money" in printed and "stop a1" in printed and "/workspace/output/." in ran.read_text()


def test_a_copy_that_fails_can_be_tried_again(server, command, programs, tmp_path):
    server.add_pod("a1", ports=["22/tcp"])
    assert command("fetch", "a1", "--to", str(tmp_path / "here"))[0] == 78  # no program is installed
    programs("rsync", code=12)
    code, printed = command("fetch", "a1", "--to", str(tmp_path / "here"))
    assert code == 75 and "rsync ended with 12" in printed


def test_a_pod_without_ssh_says_what_is_missing(server, command, programs, monkeypatch):
    server.add_pod("a1")
    programs("rsync")
    monkeypatch.setattr(download, "SSH_TIMEOUT_S", 0.1)
    code, printed = command("fetch", "a1")
    assert code == 75 and "public key" in printed


def test_a_stopped_pod_is_started_again(server, command):
    server.add_pod("a1", "EXITED")
    code, printed = command("start", "a1")
    assert code == 0 and server.pods["a1"]["status"] == "STARTING" and "logs a1" in printed
    assert command("start", "a1")[0] == 78


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("DATASET_NAME", place) for place in ("./photos", "/home/me/photos", "~/photos", "C:\\Users\\me\\photos")),
        *(("DATASET_NAME", place) for place in ("D:/photos", "\\\\server\\photos", "../photos.zip")),
        ("MODEL_PATH", "/models/flux.safetensors"),
        ("DATASET_CONFIG", '{"datasets": [{"resolution": 512, "subsets": [{"image_dir": "/home/me/photos"}]}]}'),
        ("DATASET_CONFIG", '{"general": {"metadata_file": "./m.json"}, "datasets": []}'),
    ],
)
def test_paths_of_this_machine_are_refused_whether_or_not_they_exist(server, command, name, value):
    code, printed = command("deploy", *IMAGE, "--gpu", "4090", "--yes", **{**JOB, name: value})
    assert code == 78 and "no pod can read it" in printed and not server.pods, printed


def test_a_word_that_names_a_local_file_by_chance_is_no_path(server, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zot").touch()
    code, printed = command("deploy", *IMAGE, "--gpu", "4090", "--yes", **JOB, TRIGGER_WORD="zot")
    assert code == 0, printed


def test_a_job_that_the_card_cannot_hold_is_refused(server, command):
    config = {"datasets": [{"resolution": 1024, "batch_size": 64, "subsets": [{"image_dir": "/workspace/images"}]}]}
    job = {"BASE_MODEL": "flux", "DATASET_CONFIG": json.dumps(config)}
    code, printed = command("deploy", *IMAGE, "--gpu", "4090", "--yes", **job)
    assert code == 78 and "largest batch that fits" in printed and not server.pods, printed
    code, printed = command("deploy", *IMAGE, "--gpu", "mi300x", "--yes", **job, PARAMS_BATCH_SIZE="8")
    assert code == 0 and "Peaks predicted, in GiB of 192" in printed, printed


def test_the_log_is_followed_over_cut_connections(server, command):
    server.add_pod("a1", "EXITED")
    server.lines["a1"] = [f"line {i}" for i in range(7)]
    assert command("logs", "a1", "--tail", "2")[1] == "line 5\nline 6\n"
    server.add_pod("a1")
    server.cut_logs_after = 3
    asks = iter(["RUNNING", "RUNNING", "EXITED"])
    of = runpod_api.RunPod.pod
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runpod_api.RunPod, "pod", lambda api, pod: {**of(api, pod), "status": next(asks)})
        code, printed = command("logs", "a1", "--follow")
    assert code == 0 and printed.split("\n")[:-1] == [f"line {i}" for i in range(7)]


def test_a_pod_is_stopped_and_terminated(server, command):
    server.add_pod("a1")
    assert command("stop", "a1")[0] == 0 and server.pods["a1"]["status"] == "EXITED"
    code, printed = command("stop", "a1")
    assert code == 78 and "409" in printed and "not valid while EXITED" in printed
    assert command("stop", "a1", "--terminate")[0] == 0 and not server.pods


def test_the_lines_of_the_document(server, account, tmp_path):
    """Every block of docs/runpod.md that is marked sh, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/runpod.md").read_text(), re.MULTILINE | re.DOTALL)
    script = "set -euxo pipefail\n" + "\n".join(blocks).replace("POD=7h9k2m4n6p", "POD=pod1")
    assert "deploy" in script and "POD=pod1" in script
    (tmp_path / ".venv").symlink_to(sys.prefix)
    server.lines["pod1"] = ["step 1/1"]
    server.on_logs = lambda pod: server.add_pod(pod, "EXITED")
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path, env={**environment, **account, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1/1" in done.stdout and "It starts the pod again" in done.stdout and not server.pods
    assert len(server.templates) == 2
    (body,) = sent(server, "POST /v2/pods")
    assert body["env"]["HF_TOKEN"] == "{{ RUNPOD_SECRET_HF_TOKEN }}" and body["env"]["MAX_COST"] == "5"


def test_the_key_is_in_no_repr():
    assert KEY not in repr(RunPod(KEY))


def test_the_stand_in_refuses_what_the_document_does():
    assert violations("CreatePodRequest", {"name": "x", "gpu": {"id": "y"}}) == ["$: 'image' is a required property"]
    assert violations("CreatePodRequest", {"name": "x", "image": "i", "gpuCount": 1})
    assert violations("CreateTemplateRequest", {"name": "x", "image": "i", "mounts": {"network": []}})
