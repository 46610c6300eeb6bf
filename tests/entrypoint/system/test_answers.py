"""What the jobs of a queue ask alike is asked once, and each is told what it would be told alone."""

import logging

import pytest
from PIL import Image

from entrypoint import __main__ as entrypoint
from entrypoint import job
from entrypoint.planning import preflight, summary
from entrypoint.queue.jobs import expand
from entrypoint.system import answers
from entrypoint.system.answers import Answers
from entrypoint.system.machine import Machine
from trainer.base_model import model_folder
from trainer.data import scan
from trainer.spec.errors import SettingsError


def test_a_question_is_asked_once_for_the_same_arguments():
    asked = []

    def question(*arguments):
        asked.append(arguments)
        return sum(arguments)

    known = Answers(Machine())
    assert [known.of(question, 1, 2), known.of(question, 1, 2), known.of(question, 2, 2)] == [3, 3, 4]
    assert asked == [(1, 2), (2, 2)]


def test_what_decides_may_be_said_and_other_questions_are_others():
    known = Answers(Machine())
    assert known.of(lambda names: names[0], ["a"], by="x") == "a"
    first = lambda names: names[0]  # noqa: E731 (its identity counts)
    assert known.of(first, ["a"], by="x") == known.of(first, ["b"], by="x") == "a"
    assert known.of(first, ["b"], by="y") == "b"


def test_a_refusal_is_remembered_and_a_bug_is_not():
    asked = []

    def refuse(text):
        asked.append(text)
        if text == "bug":
            raise KeyError(text)
        raise SettingsError(text)

    known = Answers(Machine())
    for text, kind in (("no", SettingsError), ("no", SettingsError), ("bug", KeyError), ("bug", KeyError)):
        with pytest.raises(kind, match=text):
            known.of(refuse, text)
    assert asked == ["no", "bug", "bug"]


def test_the_answers_that_are_kept_are_the_last_that_were_used(monkeypatch):
    monkeypatch.setattr(answers, "MOST", 2)
    asked = []
    known = Answers(Machine())
    for number in (1, 2, 1, 3, 1, 2):
        known.of(asked.append, number)
    assert asked == [1, 2, 3, 2]


# ---- a queue


def write_images(folder, count, *, size):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (size, size), (40 * number, 90, 7)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"image {number}")


@pytest.fixture
def environ(tmp_path):
    write_images(tmp_path / "data", 3, size=64)
    return {
        "BASE_MODEL": "mini-flux",
        "DATASET_NAME": str(tmp_path / "data"),
        "OUTPUT_PATH": str(tmp_path / "out"),
        "CACHE_PATH": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
    }


def _said(caplog, environ):
    """What a check says, by job: without the names of their folders, and free space, which is another each time."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        code = entrypoint.main(["--check"], environ)
    jobs: list[list[str]] = [[]]
    for record in caplog.records:
        text = record.getMessage().partition(" needed, ")[0]
        if text.startswith("---- "):
            jobs.append([])
        else:
            jobs[-1].append(text)
    return code, jobs


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"SWEEP": "PARAMS_RESOLUTION=64,32,64x32"}, 0),
        ({"JOBS": '{"TRIGGER_WORD": "zot"}\n{"PARAMS_SEED": 3}\n{"DATASET_NAME": "nobody/nothing"}'}, 75),
        ({"SWEEP": "PARAMS_SEED=1,2", "DATASET_NAME": "{tmp}/empty"}, 65),
        ({"SWEEP": "PARAMS_SEED=1,2", "DATASET_NAME": "http://127.0.0.1:1/images.zip"}, 75),
        ({"SWEEP": "PARAMS_SEED=1,2", "MODEL_PATH": "{tmp}/empty"}, 78),
        ({"SWEEP": "PARAMS_SEED=1,2", "OUTPUT_PATH": "{tmp}/data"}, 0),  # the jobs' folders are among the images
    ],
)
def test_each_job_of_a_queue_is_told_what_it_is_told_alone(changes, code, environ, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(summary, "cpu_workers", lambda: 0)
    monkeypatch.setattr(job, "CHECK_RETRIES_S", 0.0)
    (tmp_path / "empty").mkdir()
    environ |= {name: value.replace("{tmp}", str(tmp_path)) for name, value in changes.items()}
    queued = expand(environ)
    if environ["OUTPUT_PATH"].endswith("data"):  # an earlier run of the first has left samples there
        (queued[0].out / "sample").mkdir(parents=True)
        write_images(queued[0].out / "sample", 2, size=64)
        write_images(queued[0].out / "mine", 1, size=64)
    alone = [_said(caplog, one.environ)[1][0] for one in queued]
    found, together = _said(caplog, environ)
    assert found == code
    if code:
        together[-1] = together[-1][:-1]  # how many cannot run
    assert together[1:] == alone
    assert all(len(lines) >= 2 for lines in alone)


def test_images_and_the_model_are_read_once_for_all_jobs(environ, monkeypatch):
    monkeypatch.setattr(summary, "cpu_workers", lambda: 0)
    counts = {"images": 0, "models": 0, "probes": 0}

    def counted(kind, function):
        def count(*arguments):
            counts[kind] += 1
            return function(*arguments)

        return count

    monkeypatch.setattr(scan, "_examine", counted("images", scan._examine))
    monkeypatch.setattr(model_folder, "check_folder", counted("models", model_folder.check_folder))
    monkeypatch.setattr(preflight, "_probe", counted("probes", preflight._probe))
    sweep = "PARAMS_SEED=1,2,3 PARAMS_RESOLUTION=32,64"
    assert entrypoint.main(["--check"], environ | {"SWEEP": sweep}) == 0
    assert counts == {"images": 3, "models": 1, "probes": 1}
