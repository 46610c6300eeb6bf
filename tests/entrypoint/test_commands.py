"""The first argument of the container, and its health check."""

import json
import os
import sys

import pytest

from entrypoint import __main__ as entrypoint
from entrypoint import health
from tests.support.drawings import draw


@pytest.mark.parametrize(
    ("arguments", "check"),
    [
        *(([], False), (["train"], False), (["check"], True), (["--check"], True), (["train", "--check"], True)),
        (["--gpu", "RTX 4090"], True),  # nothing can be trained on a card that is not here
    ],
)
def test_the_first_argument_chooses(monkeypatch, arguments, check):
    asked = []
    monkeypatch.setattr(entrypoint, "job", lambda environ, *, check, card: asked.append(check) or 0)
    assert entrypoint.main(arguments) == 0
    assert asked == [check]


@pytest.fixture
def photographs(monkeypatch, tmp_path):
    """The variables of a job for Flux.1 on two images."""
    for i in range(2):
        draw(64, 64, seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "model").mkdir()
    names = {"BASE_MODEL": "flux", "DATASET_NAME": str(tmp_path), "MODEL_PATH": str(tmp_path / "model")}
    names |= {"OUTPUT_PATH": str(tmp_path / "out"), "CACHE_PATH": str(tmp_path / "cache")}
    for name, value in names.items():
        monkeypatch.setenv(name, value)


def test_a_card_that_is_not_here_is_planned_for(photographs, caplog):
    with caplog.at_level("INFO"):
        assert entrypoint.main(["--check", "--gpu", "RTX 4090"]) == 78  # for the model's folder is empty
    assert "1 × nvidia 8.9, 24 GiB" in caplog.text and "Images: 2 found" in caplog.text
    assert "MODEL_PATH" in caplog.text and "No GPU answers" not in caplog.text


@pytest.mark.parametrize(("card", "message"), [("RTX 4091", "did you mean"), ("GTX 1080 Ti", "no kernels")])
def test_a_card_that_cannot_train_is_refused(photographs, caplog, card, message):
    assert entrypoint.main(["--check", "--gpu", card]) == 78
    assert message in caplog.text


@pytest.mark.parametrize("arguments", [["trian"], ["check", "more"]])
def test_an_unknown_command_is_a_wrong_command_line(monkeypatch, capsys, arguments):
    monkeypatch.setattr(entrypoint, "job", lambda environ, *, check, card: pytest.fail("it ran"))
    assert entrypoint.main(arguments) == 64
    assert "train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        (["shell", "-c", "id --user"], ("bash", "-c", "id --user")),
        (["sample", "--help"], (sys.executable, "-m", "trainer.sample", "--help")),
        (["export", "x", "--out", "y"], (sys.executable, "-m", "trainer.export", "x", "--out", "y")),
    ],
)
def test_some_replace_the_process(monkeypatch, arguments, program):
    class Replaced(BaseException):
        pass

    def exec_(file, arguments, _environment):
        raise Replaced(file, *arguments)

    monkeypatch.setattr(os, "execvpe", exec_)
    with pytest.raises(Replaced) as found:
        entrypoint.main(arguments)
    assert found.value.args == (program[0], *program)


@pytest.mark.parametrize(
    ("status", "ill"),
    [
        ({}, False),
        ({"phase": "training", "updated": 99_000.0}, False),  # 16 minutes ago
        ({"phase": "training", "updated": 98_000.0}, True),  # 33 minutes ago
        ({"phase": "encoding", "updated": 98_000.0}, False),
        ({"phase": "done", "updated": 98_000.0}, False),
        ({"phase": "training", "updated": 50_000.0}, False),  # left by the run before this container
        ({"phase": "training", "updated": "?"}, False),
    ],
)
def test_training_that_stands_still_is_unhealthy(status, ill):
    assert bool(health.stalled(status, now=100_000.0, began=90_000.0, patience_min=30)) is ill


def test_health_reads_the_status_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUTPUT_PATH", str(tmp_path))
    monkeypatch.setattr(health, "_began", lambda: 0.0)
    assert health.main() == 0
    (tmp_path / "status.json").write_text(json.dumps({"phase": "training", "updated": 1000.0}))
    assert health.main() == 1 and "No step for" in capsys.readouterr().out
    (tmp_path / "status.json").write_text("{")
    assert health.main() == 0


def test_a_check_for_a_card_names_it(caplog):
    with caplog.at_level("INFO"):
        entrypoint._card_to_check_for("RTX 4090")
    assert "Checking for RTX 4090: 1 × nvidia 8.9, 24 GiB each" in caplog.text
