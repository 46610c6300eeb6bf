"""The real libraries, offline. They run where the library is installed, or lies in a folder of TRACKERS_SITE."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from entrypoint.trackers import beside
from tests.support.finished_runs import finished_run

SITES = os.environ.get("TRACKERS_SITE", "")


def environment(tracker, tmp_path):
    """The variables of the process; skips where the library is nowhere."""
    site = Path(SITES) / tracker
    if importlib.util.find_spec(tracker) is None and not (SITES and site.is_dir()):
        pytest.skip(f"{tracker} is not installed: pip install --require-hashes -r entrypoint/trackers/{tracker}.lock")
    given = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")} | {"PYTHONPATH": str(site)}
    return beside.environment_of(tracker, given, cache=tmp_path / "cache", hub_token=None)


@pytest.fixture
def out(tmp_path):
    finished_run(tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**status, "started": time.time() + 60}))
    return tmp_path


def tracked(tracker, out, tmp_path, times=2):
    """Track the run of `out`, and once more as a restart does."""
    own = environment(tracker, tmp_path)
    for _ in range(times):
        with beside.tracking(tracker, out, own) as ending:
            ending.exit_code = 0
    return own


def asked(own, code):
    """What a program with the library prints."""
    done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_wandb_keeps_an_offline_run(out, tmp_path, capfd):
    tracked("wandb", out, tmp_path, times=1)
    said = capfd.readouterr()
    assert "wandb sync" in said.err and said.err.count("\n") == 1 and said.out == ""
    (run,) = (out / "tracking" / "wandb").glob("offline-run-*")
    assert len(list((run / "files" / "media" / "images" / "sample").glob("*.png"))) == 6
    assert list((run / "files" / "media" / "html").glob("plan*.html"))
    data = next(run.glob("*.wandb")).read_bytes()
    assert b"validation_loss" in data and not (run / "files" / "wandb-metadata.json").exists()


def test_mlflow_keeps_one_run_in_files(out, tmp_path, capfd):
    own = tracked("mlflow", out, tmp_path)
    assert capfd.readouterr().err.count("\n") == 2, "a line for each start"
    code = f"""
import json, os
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
from mlflow.tracking import MlflowClient
client = MlflowClient({(out / "tracking" / "mlruns").as_uri()!r})
(experiment,) = [e for e in client.search_experiments() if e.name == "kiln"]
(run,) = client.search_runs([experiment.experiment_id])
losses = client.get_metric_history(run.info.run_id, "loss")
images = client.list_artifacts(run.info.run_id, "images")
print(json.dumps([run.info.status, len(losses), run.data.params["Base model"], len(images)]))
"""
    assert asked(own, code) == ["FINISHED", 40, "mini-flux", 12]


def test_trackio_keeps_one_run_in_its_database(out, tmp_path, capfd):
    tracked("trackio", out, tmp_path)
    assert capfd.readouterr().err.count("\n") == 2, "a line for each start"
    (database,) = (out / "tracking" / "trackio").glob("*.db")
    with sqlite3.connect(database) as opened:
        rows = opened.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert sorted(step for step, row in values if "loss" in row) == list(range(1, 41))
    assert sum("validation_loss" in row for _, row in values) == 2
    assert len(list((out / "tracking" / "trackio" / "media").rglob("*.png"))) == 6
