"""What a tracker is given: each number, validation and sample once, also after a restart and a resumed job."""

import json
import os
import time

import pytest

from entrypoint.settings.row import Secret
from entrypoint.trackers import beside, install
from entrypoint.trackers.feed import NAME, Feed
from tests.support.finished_runs import finished_run, write_sample
from trainer.spec.errors import SettingsError, UnreachableError


class Kept:
    """Keeps what it is given."""

    def __init__(self):
        self.rows, self.shown = [], []

    def numbers(self, step, values):
        self.rows.append((step, values))

    def images(self, step, samples):
        self.shown.append((step, len(samples)))


@pytest.fixture
def out(tmp_path):
    finished_run(tmp_path)
    return tmp_path


def begun(out, tracker="wandb"):
    feed = Feed(out, tracker=tracker, started=0.0)
    return feed, feed.begun()


def test_everything_is_given_once(out):
    feed, about = begun(out)
    kept = Kept()
    feed.send(kept)
    feed.send(kept)
    assert [step for step, _ in kept.rows if step == 20] == [20, 20], "a step and its validation"
    assert len(kept.rows) == 42 and kept.rows[0] == (1, {"lr": 1e-4, "loss": 1.0, "grad_norm": 0.5})
    assert (20, {"validation_loss": 0.1}) in kept.rows and kept.shown == [(0, 2), (20, 2), (40, 2)]
    assert not about.resumed and about.name == "x" and about.config["Base model"] == "mini-flux"


def test_a_restart_goes_on_with_the_same_run(out):
    feed, first = begun(out)
    feed.send(Kept())
    with (out / "metrics.jsonl").open("w") as lines:  # as a resumed job writes it: from its state on, in a new file
        for step in range(30, 43):
            lines.write(json.dumps({"step": step, "loss": 0.5, "time": 1.0}) + "\n")
    write_sample(out / "sample", 60, 0)
    feed, second = begun(out)
    kept = Kept()
    feed.send(kept)
    assert second.resumed and second.id == first.id
    assert [step for step, _ in kept.rows] == [41, 42] and kept.shown == [(60, 1)]
    _, other = begun(out, tracker="mlflow")
    assert not other.resumed and other.id != first.id


def test_a_line_that_is_half_written_is_given_when_it_is_whole(out):
    feed, _ = begun(out)
    feed.send(Kept())
    kept = Kept()
    with (out / "metrics.jsonl").open("a") as lines:
        lines.write('ss": 0.5, "time": 1.0}\n')
    feed.send(kept)
    assert kept.rows == [(41, {"loss": 0.5})]


def test_the_plan_tells_no_place_of_this_machine(out):
    _, about = begun(out)
    assert "What was decided" in about.plan and str(out) not in about.plan + json.dumps(about.config)


def test_nothing_begins_before_the_trainer_knows_its_run(out):
    status = json.loads((out / "status.json").read_text())
    for changes in ({"phase": "encoding"}, {"run": "../x"}, {"run": None}, {"started": -100.0}):
        (out / "status.json").write_text(json.dumps({**status, **changes}))
        assert Feed(out, tracker="wandb", started=0.0).begun() is None, changes


def test_a_damaged_record_begins_a_new_run(out):
    for text in ("", "[1]", '{"with": "wandb", "id": 3, "step": "x"}'):
        (out / NAME).write_text(text)
        _, about = begun(out)
        assert not about.resumed


# ---- the process


KEYS = {"WANDB_API_KEY": "wandb-key-1", "MLFLOW_TRACKING_TOKEN": "mlflow-key-2", "HF_TOKEN": "hf_three", "PATH": "/bin"}


@pytest.mark.parametrize(
    ("tracker", "has"),
    [("wandb", {"WANDB_API_KEY"}), ("mlflow", {"MLFLOW_TRACKING_TOKEN"}), ("trackio", set())],
)
def test_each_gets_its_own_keys_alone(tmp_path, tracker, has):
    own = beside.environment_of(tracker, KEYS, cache=tmp_path, hub_token=Secret("hf_write"))
    assert own.keys() & KEYS.keys() - {"PATH"} == has
    spaces = {**KEYS, "TRACKIO_SPACE_ID": "me/space"}
    own = beside.environment_of(tracker, spaces, cache=tmp_path, hub_token=Secret("hf_write"))
    assert own.get("HF_TOKEN") == ("hf_write" if tracker == "trackio" else None)


def environment(tmp_path, site, **more):
    given = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")} | {"PYTHONPATH": str(site), **more}
    return beside.environment_of("wandb", given, cache=tmp_path / "cache", hub_token=None)


@pytest.mark.parametrize(
    "broken", ["raise RuntimeError('no for cAnary-key-5')", "import sys; sys.exit(3)", "def init(**_): 1 / 0"]
)
def test_a_library_that_fails_ends_nothing_and_says_one_line(out, tmp_path, capfd, broken):
    site = tmp_path / "site"
    site.mkdir()
    (site / "wandb.py").write_text(f"print('noise on stdout')\nimport sys; print('noise', file=sys.stderr)\n{broken}\n")
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps({**status, "started": time.time() + 5}))
    own = environment(tmp_path, site, WANDB_API_KEY="cAnary-key-5")
    with beside.tracking("wandb", out, own) as ending:
        ending.exit_code = 0
    said = capfd.readouterr()
    assert "noise on" not in said.out + said.err and "cAnary" not in said.err
    assert "exit(3)" in broken or (said.err.count("\n") == 1 and "the library has failed" in said.err)


def test_what_cannot_be_installed_is_said_and_ends_nothing(out, tmp_path, capfd):
    own = environment(tmp_path, tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    with beside.tracking("wandb", out, own) as ending:
        ending.exit_code = 0
    said = capfd.readouterr().err
    assert "LOG_WITH=wandb: it could not be installed" in said and "Training goes on" in said


@pytest.mark.parametrize("tracker", sorted(beside.OWN_VARIABLES))
def test_each_lock_is_whole_and_has_hashes(tracker, tmp_path, monkeypatch):
    text = (install.LOCKS / f"{tracker}.lock").read_text()
    names = {line.partition("==")[0] for line in text.splitlines() if "==" in line and not line.startswith(" ")}
    assert ("mlflow-skinny" if tracker == "mlflow" else tracker) in names and "torch" not in names
    assert text.count("--hash=sha256:") >= len(names) > 10
    monkeypatch.setattr(install, "pip_install", lambda *_, **__: "no network")
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnreachableError, match=f"LOG_WITH={tracker}.*no network"):
        install.installed(tracker, tmp_path)
    (tmp_path / "trackers").chmod(0o777)
    with pytest.raises(SettingsError, match="others can write"):
        install.installed(tracker, tmp_path)
