"""report.html: everything in one file, nothing of it alive, whatever the job has left."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from entrypoint.report import start
from entrypoint.report.__main__ import main
from entrypoint.report.charts import Chart, Line, smoothed
from entrypoint.report.gather import gather
from entrypoint.report.page import page
from entrypoint.report.sections import MOST_EMBEDDED, chosen_steps
from tests.support.finished_runs import ODD, write_sample
from trainer.spec.messages import trend
from trainer.spec.messages.noise_bands import KEYS
from trainer.spec.messages.usage import prompting

ALIVE = ("script", "iframe", "object", "embed", "form", "input", "link", "base")


class Reader(HTMLParser):
    """Every element with its attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def written(folder, price=None):
    return page(gather(folder), price=price)


def test_nothing_in_it_runs_or_leads_elsewhere(finished):
    text = written(finished)
    read = Reader(text)
    assert [tag for tag, _ in read.elements if tag in ALIVE] == []
    names = {name for _, attributes in read.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")] and "style" not in names
    for tag, attributes in read.elements:
        for name in ("src", "href"):
            place = attributes.get(name, "#")
            assert place.startswith(("data:image/jpeg;base64,", "#", "https://")), (tag, place)
    assert any(ODD[:20] in text for text in read.texts), "the text itself is there"
    assert "\u202e" not in text and "\x1b" not in text


def test_the_policy_allows_its_own_style_alone(finished):
    text = written(finished)
    (policy,) = [
        a["content"] for tag, a in Reader(text).elements if "Content-Security-Policy" in a.get("http-equiv", "")
    ]
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy and "script-src" not in policy


def test_it_has_all_that_people_look_for(finished):
    text = " ".join(Reader(written(finished, price=2.0)).texts)
    for words in (
        "Finished",
        "40",
        "step 20",
        "before training",
        "Validation loss",
        "1 min 30 s",
        "0.05",
        "x.safetensors",
    ):
        assert words in text, words
    for words in ("bad.jpg", "damaged", "not read from “the end” on", "2 images", "Seed: 7", "torch", "Optimiser"):
        assert words in text, words
    svgs = [a["aria-label"] for tag, a in Reader(written(finished)).elements if tag == "svg"]
    assert svgs[0] == "Loss, step 1 to 40" and len(svgs) == 3


def test_the_samples_at_other_strengths_follow_those_of_the_steps(finished):
    for strength in (0.5, 0.0):
        write_sample(finished / "sample", 40, 0, strength=strength)
        write_sample(finished / "sample", 20, 0, strength=strength)  # of a run that was shorter
    run = gather(finished)
    assert {sample.strength for sample in run.samples} == {1.0} and len(run.at_strengths) == 2
    captions = re.findall("<figcaption>([^<]*)</figcaption></figure>", written(finished))
    first = captions[: captions.index("step 40, strength 0.5") + 1]
    assert first == ["before training", "step 20", "step 40", "step 40, strength 0", "step 40, strength 0.5"]
    assert sum("strength" in caption for caption in captions) == 2


def test_the_loss_by_noise_level_has_a_curve_for_each_band(finished):
    rows = []
    for step in range(41, 49):
        rows.append(json.dumps({"step": step, "loss": 0.5, KEYS[step % 2 * 3]: 0.1 * step, "time": 1.0}))
    path = finished / "metrics.jsonl"
    path.write_text(path.read_text() + "\n" + "\n".join(rows))
    text = written(finished)
    svgs = [a["aria-label"] for tag, a in Reader(text).elements if tag == "svg"]
    assert svgs[1] == "Loss by noise level, smoothed, step 41 to 48"
    assert re.findall(r"<span class='key (band\d)'>([^<]*)", text) == [
        ("band0", "0–25 % noise"), ("band3", "75–100 % noise"),
    ]  # fmt: skip
    assert text.count('<polyline class="band') == 2


def test_the_prompt_begins_as_the_log_says(finished):
    run = gather(finished)
    assert prompting(run.triggers) in " ".join(Reader(written(finished)).texts)
    assert prompting([]).startswith("Write prompts like your captions; start with strength 1")


def test_it_tells_no_place_of_this_machine(finished):
    assert str(finished) not in written(finished)


@pytest.mark.parametrize(
    "gone", ["plan.json", "metrics.jsonl", "sample", "dataset-report.csv", "x.safetensors", "status.json"]
)
def test_what_is_missing_or_damaged_is_left_out(finished, gone):
    place = finished / gone
    if place.is_dir():
        for path in place.iterdir():
            path.write_bytes(b"\x89PNG damaged")
    else:
        place.write_bytes(b'{"a": [1, 2')
    assert "</html>" in written(finished)
    if place.is_file():
        place.unlink()
    assert "</html>" in written(finished)


@pytest.mark.parametrize(("phase", "words"), [("failed", "Failed after step 40"), ("stopped", "Stopped after step 40")])
def test_how_it_ended_is_at_the_top(finished, phase, words):
    status = finished / "status.json"
    told = f'"phase": "{phase}", "message": "<b>no room</b>", "saved_step": 20'
    status.write_text(status.read_text().replace('"phase": "done"', told))
    text = written(finished)
    assert words in text and "&lt;b&gt;no room" in text and "state of step 20 is saved" in text


def test_many_samples_stay_within_a_bounded_size(finished):
    for step in range(100, 1600, 50):
        for number in range(4):
            write_sample(finished / "sample", step, number)
    text = written(finished)
    images = re.findall('base64,([^"]+)', text)
    assert sum(map(len, images)) < MOST_EMBEDDED * 1.4 and len(images) <= 12 * 4 + 8
    assert chosen_steps(range(0, 1000, 10))[0] == 0 and chosen_steps(range(0, 1000, 10))[-1] == 990


# ---- curves


def test_a_curve_of_odd_numbers_is_drawn_as_far_as_it_can_be():
    points = [(step, value) for step, value in enumerate([1.0, float("nan"), float("inf"), -2.0, 5e9, 0.0] * 400)]
    for logarithmic in (False, True):
        drawing = Chart(
            "x", [Line("a", "raw", points), Line("b", "held", points[:9], dots=True)], logarithmic=logarithmic
        ).svg()
        assert "nan" not in drawing and "inf" not in drawing and len(drawing) < 60_000
    assert Chart("x", [Line("a", "raw", [(1, 2.0)])]).svg() == ""
    assert "polyline" in Chart("x", [Line("a", "raw", [(1, 2.0), (2, 2.0)])]).svg()


def test_the_smoothed_curve_has_no_bias_at_its_beginning():
    assert [round(y, 9) for _, y in smoothed([(i, 3.0) for i in range(50)])] == [3.0] * 50
    assert smoothed([]) == []


# ---- the command, and the end of a job


def test_the_command_writes_both_and_replaces_nothing_of_a_user(finished):
    assert main([str(finished), "--price-per-hour", "0.5"]) == 0
    first = (finished / "README.md").read_text()
    assert main([str(finished)]) == 0 and (finished / "README.md").read_text() == first
    (finished / "README.md").write_text(first.replace("# x", "# my own words"))
    (finished / "report.html").write_text("<p>mine")
    assert main([str(finished)]) == 0
    assert "my own words" in (finished / "README.md.set-aside").read_text()
    assert (finished / "report.html.set-aside").read_text() == "<p>mine"
    assert (finished / "README.md").read_text() == first


def test_a_folder_of_something_else_is_refused(tmp_path):
    command = [sys.executable, "-m", "entrypoint.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 78 and "is not the output of a job" in done.stderr and os.listdir(tmp_path) == []


def test_the_end_of_a_job_writes_it_once_the_job_is_its_own(finished, monkeypatch, caplog):
    environment = {"PATH": os.environ["PATH"]}
    start.write(finished, environment, started=0.0, price=1.0)
    assert (finished / "report.html").is_file()
    (finished / "report.html").unlink()
    start.write(finished, environment, started=9e9, price=1.0)
    assert not (finished / "report.html").exists()
    monkeypatch.setattr(start, "MOST_S", 0.001)
    start.write(finished, environment, started=0.0, price=1.0)
    assert "could not be written (TimeoutExpired)" in caplog.text


def test_a_risen_loss_is_told_as_the_log_does(finished):
    """The log judges the losses of the last start; those of the whole run, in metrics.jsonl, may say something else."""
    assert "has risen" not in written(finished)
    with (finished / "metrics.jsonl").open("a") as file:
        file.write("\n")  # the last line is half written
        for step in range(41, 141):
            row = {"step": step, "epoch": 1, "lr": 1e-4, "loss": 4.0, "grad_norm": 0.5, "time": 1.0}
            file.write(f"{json.dumps(row)}\n")
    by_all = str(trend.Risen(4.0, 4.0, 35)).rpartition(" to ")[2]
    assert f"to {by_all}" in written(finished)  # of an older run, whose status.json says nothing of it
    status = json.loads((finished / "status.json").read_text())
    risen = str(trend.Risen(0.5, 4.0, 30))
    for said in (risen, ""):
        (finished / "status.json").write_text(json.dumps({**status, "risen": said}))
        assert ("has risen" in written(finished)) == bool(said) and said in written(finished)
