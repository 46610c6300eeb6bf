"""The real libraries, offline. They run where the library is installed, or lies in a folder of TRACKERS_SITE.

What each is called with is tested everywhere, in test_calls.py.
"""

import ast
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


# ---- the stand-ins of test_calls.py

STANDINS = Path(__file__).parents[2] / "support" / "standin_trackers"
CALLS = {  # tracker → file of the stand-in, and the module that has its names
    "wandb": [("wandb.py", "wandb")],
    "trackio": [("trackio.py", "trackio")],
    "mlflow": [("mlflow/entities.py", "mlflow.entities"), ("mlflow/tracking.py", "mlflow.tracking")],
}


def arguments_of(function):
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument.arg for argument in named if argument.arg != "self"]


def standin_calls(file):
    """(class or "", function, its arguments) of each call that a stand-in takes."""
    found = []
    for node in ast.parse((STANDINS / file).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name in ("init", "log", "finish"):
            found.append(("", node.name, arguments_of(node)))
        elif isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            found += [(node.name, method.name, arguments_of(method)) for method in methods]
    return found


@pytest.mark.parametrize("tracker", CALLS)
def test_the_libraries_take_what_their_stand_ins_take(tracker, tmp_path):
    own = {**environment(tracker, tmp_path), "TRACKIO_DIR": str(tmp_path)}
    for file, module in CALLS[tracker]:
        calls = standin_calls(file)
        code = f"""
import importlib, inspect, json
missing = []
module = importlib.import_module({module!r})
for owner, name, arguments in {calls!r}:
    place = getattr(module, owner) if owner else module
    known = set(getattr(place, "model_fields", {{}})) if name == "__init__" else set()
    known |= set(inspect.signature(getattr(place, name)).parameters)
    missing += [f"{{owner}}.{{name}}: {{argument}}" for argument in arguments if argument not in known]
print(json.dumps(missing))
"""
        assert len(calls) >= 1 and asked(own, code) == []
