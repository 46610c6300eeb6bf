"""The real process, against local servers: what arrives, in which order, and what a bad server does to a job."""

import json
import os
import time

import pytest
from PIL import Image, PngImagePlugin

from entrypoint.notify import beside, events
from entrypoint.notify.delivery import NAME, Queue, digest_of
from entrypoint.notify.events import Event, Watch
from entrypoint.processes import side_process
from tests.support.webhooks import Receiver
from trainer.spec.errors import UnreachableError

PACE = {"timeout": 2.0, "first": 0.05, "longest": 0.2, "longest_at_end": 0.1}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}


def status(out, **values):
    text = json.dumps(
        {"phase": "training", "started": time.time() + 1, "run": "x", "run_folder": ".", "step": 5, **values}
    )
    (out / "status.json").write_text(text)


def sample(out, step, text="a fox"):
    (out / "sample").mkdir(exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("prompt_text", text)
    Image.new("RGB", (64, 48), (step % 255, 30, 99)).save(out / "sample" / f"step-{step:08d}-00.png", pnginfo=info)


def job(out, *addresses, secret="", **changes):
    return beside.Job(tuple(addresses), secret, str(out), "mini", 1.0, pace=PACE, **changes)


def types(receiver):
    return [json.loads(got.body)["type"] for got in receiver.got]


@pytest.fixture
def receiver():
    with Receiver() as running:
        yield running


def test_a_job_is_told_from_start_to_end(receiver, tmp_path):
    with beside.telling(job(tmp_path, f"{receiver.address}/hook", secret="k"), ENVIRONMENT) as ending:
        status(tmp_path)
        receiver.wait_for(1)
        sample(tmp_path, 5)
        (tmp_path / "x-step00000005.safetensors").write_bytes(b"12345")
        receiver.wait_for(3)
        status(tmp_path, phase="done", output="x.safetensors", exit_code=0)
        (tmp_path / "x.safetensors").write_bytes(b"123")
        ending.exit_code, ending.message = 0, ""
    assert types(receiver)[0] == events.STARTED and types(receiver)[-1] == events.FINISHED
    assert set(types(receiver)) == {events.STARTED, events.CHECKPOINT, events.SAMPLED, events.FINISHED}
    last = json.loads(receiver.got[-1].body)["data"]
    assert last["file"] == {"name": "x.safetensors", "bytes": 3} and last["exit_code"] == 0 and "cost" in last
    assert all(got.headers["webhook-signature"].startswith("v1,") for got in receiver.got)
    assert len({got.headers["webhook-id"] for got in receiver.got}) == len(receiver.got)


def test_a_failure_is_told_with_its_reason_and_without_secrets(receiver, tmp_path):
    environment = {**ENVIRONMENT, "HF_TOKEN": "hf_cAnaryTOKEN"}
    with pytest.raises(UnreachableError):
        with beside.telling(job(tmp_path, receiver.address), environment):
            raise UnreachableError("The Hub said no to hf_cAnaryTOKEN.")
    (told,) = receiver.got
    data = json.loads(told.body)["data"]
    assert data["exit_code"] == 75 and data["message"].startswith("The Hub said no") and b"cAnary" not in told.body


def test_a_server_that_fails_is_asked_again_and_gets_the_same_event(receiver, tmp_path, capfd):
    receiver.answers = [(500, {}), (429, {"Retry-After": "0"}), (503, {})]
    with beside.telling(job(tmp_path, f"{receiver.address}/services/tOkEn123456789"), ENVIRONMENT) as ending:
        ending.exit_code, ending.message = 70, "x"
    assert len({got.headers["webhook-id"] for got in receiver.got}) == 1 and len(receiver.got) == 4
    said = capfd.readouterr().err
    assert said.count("is not told now") == 1 and "tOkEn" not in said


@pytest.mark.parametrize("status_code", [400, 404, 301, 410])
def test_an_address_that_refuses_is_named_without_its_path_and_nothing_fails(receiver, tmp_path, capfd, status_code):
    receiver.answers = [(status_code, {"Location": f"{receiver.address}/elsewhere"})]
    with beside.telling(job(tmp_path, f"{receiver.address}/services/tOkEn123456789"), ENVIRONMENT) as ending:
        ending.exit_code, ending.message = 0, ""
    said = capfd.readouterr().err
    assert str(status_code) in said and "tOkEn" not in said and len(receiver.got) == 1


def test_what_could_not_be_told_is_told_by_the_next_start(receiver, tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "MOST_S", 0.3)
    first = job(tmp_path, receiver.address)
    receiver.answers = [(500, {})] * 50
    with beside.telling(first, ENVIRONMENT) as ending:
        ending.exit_code, ending.message = 75, "later"
    kept = (tmp_path / NAME).read_text()
    assert receiver.address not in kept and digest_of(receiver.address) in kept
    before = len(receiver.got)
    receiver.answers = []
    monkeypatch.setattr(beside, "MOST_S", 30.0)
    with beside.telling(job(tmp_path, receiver.address), ENVIRONMENT) as ending:
        receiver.wait_for(before + 1)
        ending.exit_code, ending.message = 0, ""
    again = receiver.got[before:]
    assert [json.loads(got.body)["type"] for got in again] == [events.FAILED, events.FINISHED]
    assert again[0].headers["webhook-id"] == receiver.got[0].headers["webhook-id"]
    assert json.loads((tmp_path / NAME).read_text())["events"] == []


def test_a_server_that_never_answers_holds_nobody_up(tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "MOST_S", 0.3)
    began = time.monotonic()
    with beside.telling(job(tmp_path, "http://127.0.0.1:9/x"), ENVIRONMENT) as ending:
        assert time.monotonic() - began < 2
        ending.exit_code, ending.message = 0, ""
    assert time.monotonic() - began < 10


def test_a_process_that_is_killed_ends_nothing(receiver, tmp_path, monkeypatch, caplog):
    started, found = side_process._started, []
    monkeypatch.setattr(side_process, "_started", lambda *given: found.append(started(*given)) or found[0])
    with beside.telling(job(tmp_path, receiver.address), ENVIRONMENT) as ending:
        found[0].kill()
        found[0].wait()
        ending.exit_code, ending.message = 0, ""
    assert "has ended. The job goes on" in caplog.text and receiver.got == []


def test_only_public_hosts_are_told_where_a_stranger_chooses_them(receiver, tmp_path):
    environment = {**ENVIRONMENT, "KILN_PUBLIC_ADDRESSES": "1"}
    with beside.telling(job(tmp_path, receiver.address), environment) as ending:
        ending.exit_code, ending.message = 0, ""
    assert receiver.got == []


# ---- what a folder says


def looked(out, **told):
    watch = Watch(out, base="mini", started=time.time(), price=None, told=dict(told))
    return [event.type for event in watch.look(time.time())]


def test_what_an_earlier_start_has_told_is_not_told_again(tmp_path):
    status(tmp_path, step=0)
    sample(tmp_path, 5)
    (tmp_path / "x-step00000005.safetensors").write_bytes(b"1")
    assert looked(tmp_path) == [events.STARTED, events.CHECKPOINT, events.SAMPLED]
    assert looked(tmp_path, run="x", sampled=5, saved=5) == [events.STARTED]
    assert looked(tmp_path, run="another", sampled=5, saved=5)[1:] == [events.CHECKPOINT, events.SAMPLED]


def test_samples_are_told_when_they_are_complete(tmp_path):
    status(tmp_path, phase="sampling")
    sample(tmp_path, 5)
    assert looked(tmp_path) == [events.STARTED]


def test_another_jobs_status_tells_nothing(tmp_path):
    status(tmp_path, started=time.time() - 100)
    sample(tmp_path, 5)
    assert looked(tmp_path) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"events": 3}', '{"events": [{"event": 1, "left": []}]}', "\0"])
def test_a_damaged_queue_is_an_empty_one(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    assert Queue.opened(tmp_path / NAME, {"a"}, time.time()).is_empty()


def test_a_queue_that_nobody_empties_stays_small_and_keeps_the_end(tmp_path):
    queue = Queue(tmp_path / NAME)
    for step in range(80):
        queue.add(Event(events.SAMPLED if step else events.STARTED, time.time(), {"step": step}), {"a"})
    queue.add(Event(events.FAILED, time.time(), {}), {"a"})
    kept = [row.event.type for row in queue.waiting]
    assert len(kept) == 50 and kept[0] == events.STARTED and kept[-1] == events.FAILED
