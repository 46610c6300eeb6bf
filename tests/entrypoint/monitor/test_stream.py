"""What a viewer of the monitor page is told, at first and then as it changes, and after it was cut off."""

import json
import time

import pytest

from entrypoint.monitor import numbers, stream
from entrypoint.monitor.documents import Served
from entrypoint.monitor.live import Live
from entrypoint.monitor.log_tail import MOST_KEPT, LogTail
from entrypoint.monitor.numbers import Numbers
from tests.support.finished_runs import finished_run, write_sample
from tests.support.monitor import serving
from trainer.spec.messages.noise_bands import KEYS


def row(step, **more):
    return json.dumps({"step": step, "epoch": 1, "lr": 1e-4, "loss": 1 / step, "grad_norm": 0.5, "time": 1.0, **more})


@pytest.fixture
def page(tmp_path):
    finished_run(tmp_path)
    (tmp_path / "run.log").write_text("2026-01-01 00:00:00,000 INFO one\n2026-01-01 00:00:00,000 INFO two\n")
    with serving(tmp_path, price=3.6) as running:
        running.folder = tmp_path
        yield running


def by_name(events):
    return {event.name: event.data for event in events}


def write_status(folder, **values):
    path = folder / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_viewer_is_told_everything_that_the_folder_says(page):
    told = by_name(page.events())
    assert set(told) == {"plan", "samples", "checkpoints", "dataset", "status", "history", "log"}
    status = told["status"]
    assert status["phase"] == "done" and status["ended"] and status["step"] == 40 and status["triggers"] == ["zot"]
    assert status["seconds"] == pytest.approx(90) and status["cost"] == pytest.approx(0.09)
    history = told["history"]
    assert history["every"] == 1 and history["columns"]["step"] == [*range(1, 41)]
    assert history["columns"]["loss"][3] == 0.25 and history["validation"] == [[20, 0.1], [40, 0.05]]
    assert [sample[:3] for sample in told["samples"]["images"]][:2] == [
        [0, 0, "step-00000000-00.png"],
        [0, 1, "step-00000000-01.png"],
    ]
    assert told["samples"]["prompts"][1]["settings"] == "Steps: 4, Seed: 7, Size: 64x48"
    assert "\x1b" not in told["samples"]["prompts"][0]["text"]
    names = [file["name"] for file in told["checkpoints"]["loras"]]
    assert names == ["x-step00000020.safetensors", "x-step00000040.safetensors", "x.safetensors"]
    assert told["log"]["text"].count("INFO") == 2 and told["log"]["is_whole"]
    assert ["Rank, alpha", "32, 4"] in told["plan"]["settings"] and len(told["plan"]["reasons"]) == 1


def test_the_cost_is_by_the_price_of_the_job_where_no_other_is_given(tmp_path):
    finished_run(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["quote"]["price_per_hour"] = 7.2
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    for given, cost in ((None, 0.18), (3.6, 0.09)):
        live = Live(Served(tmp_path, price=given))
        live.look()
        assert json.loads(live.documents["status"][1])["cost"] == pytest.approx(cost)


def test_numbers_are_put_into_words_once_for_all_who_have_as_many(tmp_path, monkeypatch):
    """Twenty viewers of a fast job: what each of them costs is the bytes that it is sent."""
    finished_run(tmp_path)
    live = Live(Served(tmp_path))
    live.look()
    streams, counted = stream.Streams(live), []
    for name in ("history", "since"):
        monkeypatch.setattr(live.numbers, name, counting(getattr(live.numbers, name), name, counted))
    viewers = [stream.Viewer.of("", live.instance) for _ in range(3)]
    late = stream.Viewer.of("", live.instance)
    first = [streams._news(viewer) for viewer in viewers]
    assert len(set(first)) == 1 and b"event: history" in first[0] and counted == ["history"]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\n" + row(41) + "\n")  # ends a half-written line first
    live.look()
    news = [streams._news(viewer) for viewer in viewers]
    assert len(set(news)) == 1 and b"event: rows" in news[0] and counted == ["history", "since"]
    assert b"event: history" in streams._news(late) and b"41" in news[0]
    assert counted == ["history", "since", "history"] and streams._news(viewers[0]) == b""


def counting(function, name, counted):
    def call(*arguments):
        counted.append(name)
        return function(*arguments)

    return call


def test_what_changes_is_told_and_nothing_else(page):
    write_status(page.folder, phase="training", exit_code=None, eta_s=1000)
    seen = page.stream(until="never")
    told = {}
    while "log" not in told:
        event = next(seen)
        told[event.name] = event.data
    assert told["status"]["cost_at_end"] == pytest.approx(told["status"]["cost"] + 1)
    with (page.folder / "metrics.jsonl").open("a") as file:  # ends a half-written line first
        file.write(f"\n{row(41)}\n{row(41, validation_loss=0.5)}\n{row(42)[:10]}")
    with (page.folder / "run.log").open("a") as file:
        file.write("2026-01-01 00:00:01,000 INFO three\n")
    write_sample(page.folder / "sample", 41, 0, "new")
    news = {}
    while not {"rows", "log", "samples"} <= set(news):
        event = next(seen)
        news[event.name] = event.data
    assert news["rows"] == {
        "columns": {
            "step": [41], "loss": [pytest.approx(1 / 41, 1e-5)], "lr": [1e-4], "grad_norm": [0.5],
            "prodigy_d": [None], "images_per_second": [None], "memory_gib": [None], **{key: [None] for key in KEYS},
        },
        "validation": [[41, 0.5]],
    }  # fmt: skip
    assert news["log"] == {"text": "2026-01-01 00:00:01,000 INFO three\n", "is_whole": False}
    assert "plan" not in news and "checkpoints" not in news


def test_who_was_cut_off_gets_what_came_since(page):
    last = page.events()[-1].id
    with (page.folder / "metrics.jsonl").open("a") as file:
        file.write(f"\n{row(41)}\n")
    time.sleep(stream.TICK_S)
    told = by_name(page.events(last=last, until="rows"))
    assert told["rows"]["columns"]["step"] == [41] and not set(told) & {"history", "log", "samples", "plan"}


@pytest.mark.parametrize("last", ["", "x", "0.0.0.0.0.0", "0123456789abcdef.9.9.9.9.9", "\u0660", "-1.2", "9" * 5000])
def test_an_id_of_nobody_begins_anew(page, last):
    assert {"history", "samples", "plan"} <= set(by_name(page.events(last=last.encode("ascii", "ignore").decode())))


def test_a_stream_ends_before_a_proxy_cuts_it_and_the_next_goes_on(page, monkeypatch):
    monkeypatch.setattr(stream, "LONGEST_S", 1.5)
    began = time.monotonic()
    events = page.events(until="never")
    assert 1 < time.monotonic() - began < 10 and events[-1].id
    assert page.events(last=events[-1].id) == []


def test_the_longest_answer_is_shorter_than_runpods_proxy_allows():
    assert stream.LONGEST_S + 10 < 100


def test_too_many_viewers_are_refused(page, monkeypatch):
    monkeypatch.setattr(stream, "MOST_STREAMS", 1)
    first = page.stream(until="never")
    next(first)
    assert page.ask("/events").status == 503
    assert page.ask("/health").status == 200
    first.close()


def test_a_job_that_has_not_begun_is_not_taken_for_the_one_before(tmp_path):
    finished_run(tmp_path)
    with serving(tmp_path, started=time.time()) as page:
        told = by_name(page.events())
        assert told["status"]["phase"] == "preparing" and told["status"]["step"] == 0
        assert told["history"]["columns"]["step"] == [] and told["checkpoints"]["files"] == ["status.json"]
        assert told["samples"]["images"] == [] and told["checkpoints"]["loras"] == []
        write_status(tmp_path, phase="training", started=time.time())
        time.sleep(stream.TICK_S)
        assert by_name(page.events())["status"]["phase"] == "training"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"phase": 1, "run": 2}', b'{"run": "../x", "run_folder": "/etc"}', b"\xff\xfe"]
)
def test_damaged_files_are_shown_as_nothing(tmp_path, content):
    finished_run(tmp_path)
    for name in ("status.json", "plan.json", "metrics.jsonl", "run.json", "sample/step-00000000-00.png"):
        (tmp_path / name).write_bytes(content)
    with serving(tmp_path) as page:
        told = by_name(page.events())
        assert told["status"]["phase"] in ("preparing", "done") and told["plan"]["settings"] == []


# ---- numbers


def read(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    found = Numbers()
    found.read_on(path)
    return found, path


def test_a_long_run_is_thinned_to_means(tmp_path, monkeypatch):
    monkeypatch.setattr(numbers, "MOST_POINTS", 4)
    found, _ = read(tmp_path, "".join(f"{row(step, loss=float(step))}\n" for step in range(1, 11)))
    history = found.history()
    assert history["every"] == 3 and history["columns"]["step"] == [3, 6, 9, 10]
    assert history["columns"]["loss"] == [2, 5, 8, 10]


def test_numbers_are_read_on_where_they_ended(tmp_path):
    found, path = read(tmp_path, f"{row(1)}\n{row(2)}\n{row(3)[:20]}")
    assert found.rows == 2 and found.generation == 0
    with path.open("a") as file:
        file.write(row(3)[20:] + f"\n{row(3, validation_loss=9)}\n")
    assert found.read_on(path) and not found.read_on(path)
    assert found.rows == 4 and found.since(2) == {**found.since(2), "validation": [[3, 9.0]]}
    assert found.since(2)["columns"]["step"] == [3] and found.since(3)["columns"]["step"] == []
    assert found.since(3)["validation"] == [[3, 9.0]] and found.since(4)["validation"] == []


def test_a_resumed_run_writes_its_numbers_anew(tmp_path):
    found, path = read(tmp_path, "".join(f"{row(step)}\n" for step in range(1, 6)))
    other = tmp_path / "other"
    other.write_text(f"{row(1)}\n")
    other.replace(path)
    found.read_on(path)
    assert (found.generation, found.rows, found.last_step) == (1, 1, 1)


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    text = f'[]\n{{"step": "x"}}\nx\n{"[" * 5000}\n{row(1)}\n{{"step": 2, "loss": "much", "lr": Infinity}}\n'
    found, _ = read(tmp_path, text)
    assert found.history()["columns"]["step"] == [1, 2] and found.history()["columns"]["loss"] == [1, None]
    json.dumps(found.history(), allow_nan=False)


# ---- the log


def test_of_a_long_log_the_end_is_shown(tmp_path):
    path = tmp_path / "run.log"
    path.write_text("".join(f"line {number}\n" for number in range(40_000)))
    tail = LogTail()
    assert tail.read_on(path) and not tail.read_on(path)
    text = tail.since(-1)
    assert text.endswith("line 39999\n") and text.startswith("line ") and len(text) <= MOST_KEPT
    place = tail.end
    with path.open("a") as file:
        file.write("new\nhalf")
    tail.read_on(path)
    assert tail.since(place) == "new\n"
    path.unlink()
    path.write_text("another\n")
    tail.read_on(path)
    assert tail.generation == 1 and tail.since(-1) == "another\n"
