"""A whole job tells the addresses of WEBHOOK_URL, and leaves a report and a model card. Nothing else changes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from entrypoint.notify.delivery import NAME
from tests.support.webhooks import Receiver

ROOT = Path(__file__).parents[2]
TOKEN, KEY = "cAnaryTOKEN4567890", "whsec_Y0FuYXJ5S0VZMTIzNDU2Nzg5MA=="
STEPS = {"PARAMS_MAX_STEPS": "4", "PARAMS_SAVE_EVERY_N_STEPS": "2", "PARAMS_SAMPLE_EVERY_N_STEPS": "2"}
PROMPTS = json.dumps(["a circle --w 64 --h 64 --s 2 --d 3"])


@pytest.fixture
def receiver():
    with Receiver() as running:
        yield running


def told(receiver):
    return [json.loads(got.body)["type"].removeprefix("training.") for got in receiver.got]


def written(folder):
    """Everything in the job's folders, by name."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_job_tells_leaves_a_report_and_keeps_its_secrets(job, tmp_path, receiver):
    address = f"{receiver.address}/services/{TOKEN}"
    asked = {**STEPS, "SAMPLE_PROMPTS": PROMPTS, "WEBHOOK_URL": address, "WEBHOOK_SECRET": KEY, "PRICE_PER_HOUR": "1"}
    code, printed = job.run(**asked)
    assert code == 0, printed
    assert told(receiver)[0] == "started" and told(receiver)[-1] == "finished"
    assert told(receiver).count("checkpoint") == 2 and told(receiver).count("sampled") >= 1
    everything = {**written(tmp_path), "printed": printed.encode()}
    assert [place for place, data in everything.items() if TOKEN.encode() in data or KEY.encode() in data] == []
    page = (job.out / "report.html").read_text()
    assert "Finished" in page and "data:image/jpeg" in page and str(job.out) not in page
    _, front, _ = (job.out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["widget"][0]["output"]["url"] == "sample/step-00000004-00.png"


@pytest.mark.slow
def test_no_process_of_the_job_has_an_address_in_its_arguments_or_environment(job, receiver):
    asked = {"WEBHOOK_URL": f"{receiver.address}/services/{TOKEN}", "WEBHOOK_SECRET": KEY, "PARAMS_MAX_STEPS": "2"}
    process = job.start(own_interpreter=True, **asked)
    seen = set()
    while process.poll() is None:
        seen |= others_with_secrets(process.pid)
    assert process.returncode == 0 and seen == set(), process.printed()
    assert told(receiver)[-1] == "finished"


def others_with_secrets(leader):
    """The processes below `leader` whose arguments or environment hold the address or the key."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) != leader:
                continue
            arguments, environment = ((folder / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:  # it has ended
            continue
        is_entrypoint = b"entrypoint" in arguments.split(b"\0")  # it was started with both
        data = arguments if is_entrypoint else arguments + environment
        if TOKEN.encode() in data or KEY.encode() in data:
            found.add(arguments)
    return found


def test_a_stop_is_told(job, receiver):
    asked = {"PARAMS_MAX_STEPS": "400", "WEBHOOK_URL": receiver.address, "PARAMS_SAMPLE_EVERY_N_STEPS": "0"}
    process = job.start(**asked)
    job.wait_for_step(process, 3)
    receiver.wait_for(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143 and told(receiver)[0] == "started" and told(receiver)[-1] == "stopped"
    assert json.loads(receiver.got[-1].body)["data"]["saved_step"] >= 3
    assert not (job.out / "report.html").exists()  # nobody waits for it
    assert json.loads((job.out / NAME).read_text())["events"] == []


def test_a_refusal_is_told_before_anything_is_trained(job, receiver):
    code, printed = job.run(DATASET_NAME="/nowhere/at/all", WEBHOOK_URL=receiver.address)
    assert code in (65, 78), printed
    assert told(receiver) == ["failed"] and "/nowhere/at/all" in json.loads(receiver.got[0].body)["data"]["message"]


@pytest.mark.parametrize("where", ["environment", "CONFIG_JSON"])
def test_settings_that_cannot_be_used_are_told_as_well(job, receiver, where):
    own = {"WEBHOOK_URL": receiver.address, "PARAMS_NETWORK_ALPHA": "many"}
    code, printed = job.run(
        **(own if where == "environment" else {"CONFIG_JSON": json.dumps(own), "PARAMS_NETWORK_DIM": "x"})
    )
    assert code == 78, printed
    assert (
        told(receiver) == ["failed"] and "PARAMS_NETWORK_ALPHA" in json.loads(receiver.got[0].body)["data"]["message"]
    )


def test_a_place_that_nothing_tells_is_told_and_a_check_needs_none(job, receiver):
    """As on a laptop, for a job that is to run on two machines."""
    code, printed = job.run(NODES="2", WEBHOOK_URL=receiver.address)
    assert code == 78 and "nothing says which node this is" in printed, printed
    assert told(receiver) == ["failed"] and "NODES=2" in json.loads(receiver.got[0].body)["data"]["message"]
    code, printed = job.run("--check", NODES="2")
    assert code == 0 and "2 machines with NUM_GPUS=1 each train together" in printed, printed
    code, printed = job.run("--check", NODES="2", NODE_RANK="7", MASTER_ADDR="127.0.0.1")
    assert code == 78 and "NODE_RANK=7" in printed, printed


def test_a_check_tells_nobody(job, receiver):
    code, printed = job.run("--check", WEBHOOK_URL=receiver.address, LOG_WITH="wandb")
    assert code == 0 and receiver.got == [] and "wandb" not in printed.replace("LOG_WITH=wandb", "")


def test_an_address_that_is_dead_changes_no_end_and_no_byte(job, tmp_path):
    asked = {**STEPS, "PARAMS_SAMPLE_EVERY_N_STEPS": "0", "SOURCE_DATE_EPOCH": "1700000000"}
    assert job.run(**asked)[0] == 0
    first = (job.out / "x.safetensors").read_bytes()
    dead = {"WEBHOOK_URL": "http://127.0.0.1:9/x https://nowhere.invalid/y", "OUTPUT_PATH": str(tmp_path / "second")}
    with Receiver() as refusing:
        refusing.answers = [(404, {})] * 99
        dead["WEBHOOK_URL"] = refusing.address
        code, printed = job.run(**asked, **dead)
    assert code == 0 and "404" in printed and "Training is not affected" in printed
    assert (tmp_path / "second" / "x.safetensors").read_bytes() == first


@pytest.mark.slow
def test_the_code_of_the_card_draws_with_the_very_file(job):
    assert job.run(**STEPS, SAMPLE_PROMPTS=PROMPTS)[0] == 0
    code = re.search(r"```python\n(.*?)```", (job.out / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace('"trainer/', f'"{ROOT}/trainer/')
    own = {"PATH": os.environ["PATH"], "HOME": str(job.out), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=job.out, env=own, capture_output=True, text=True)
    assert done.returncode == 0 and (job.out / "image.png").is_file(), done.stderr
