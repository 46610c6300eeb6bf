"""What each library is called with, where none is installed: stand-ins with its arguments write the calls down.

The process, the pipe to it and the files of the run are the real ones. That the stand-ins take what the libraries take
is compared where these are (test_libraries.py), as is what the libraries make of it.
"""

import json
import os
import time
from pathlib import Path

import pytest

from entrypoint.settings.row import Secret
from entrypoint.trackers import beside
from tests.support.finished_runs import ODD, finished_run

STANDINS = Path(__file__).parents[2] / "support" / "standin_trackers"
SAMPLES = [(step, number) for step in (0, 20, 40) for number in (0, 1)]


@pytest.fixture
def out(tmp_path):
    """A finished run, as the trackers of this start see it."""
    finished_run(tmp_path)
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**status, "started": time.time() + 60}))
    return tmp_path


@pytest.fixture
def tracked(out, tmp_path, capfd):
    """`tracked(name, **variables)`: the calls of one start beside the job, and what it said."""

    def track(tracker, exit_code=0, hub_token=None, **variables):
        recorded = tmp_path / "recorded.jsonl"
        recorded.touch()
        before = len(recorded.read_text().splitlines())
        given = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")} | variables
        given["PYTHONPATH"] = str(STANDINS)
        own = beside.environment_of(tracker, given, cache=tmp_path / "cache", hub_token=hub_token)
        with beside.tracking(tracker, out, {**own, "RECORDED": str(recorded)}) as ending:
            ending.exit_code = exit_code
        return [json.loads(line) for line in recorded.read_text().splitlines()[before:]], capfd.readouterr().err

    return track


def named(calls, name):
    return [call for call in calls if call["call"] == name]


def test_wandb_is_told_the_run_and_each_number_once_and_nothing_of_the_machine(tracked, out):
    calls, said = tracked("wandb")
    (init,) = named(calls, "init")
    assert (init["project"], init["name"], init["resume"], init["mode"]) == ("kiln", "x", "allow", "offline")
    assert init["dir"] == str(out / "tracking") and init["config"]["Base model"] == "mini-flux"
    assert init["settings"] == {
        "console": "off",
        "silent": True,
        "disable_code": True,
        "disable_git": True,
        "x_disable_machine_info": True,
        "x_disable_meta": True,
        "x_save_requirements": False,
    }
    assert [(call["name"], call["step_metric"], call["hidden"]) for call in named(calls, "define_metric")] == [
        ("step", None, True),
        ("*", "step", None),
    ]
    plan, *rows = [call["data"] for call in named(calls, "log")]
    assert plan["step"] == 0 and plan["plan"]["html"].startswith("<pre># What was decided")
    assert "&lt;script&gt;" in plan["plan"]["html"] and "<script>" not in plan["plan"]["html"]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert losses == [(step, 1 / step) for step in range(1, 41)]
    assert [row for row in rows if "validation_loss" in row] == [
        {"validation_loss": 0.1, "step": 20},
        {"validation_loss": 0.05, "step": 40},
    ]
    images = [(row["step"], key, value) for row in rows for key, value in row.items() if key.startswith("sample/")]
    assert [(step, key) for step, key, _ in images] == [(step, f"sample/{number:02d}") for step, number in SAMPLES]
    assert images[3][2] == {"size": [64, 48], "file": "step-00000020-01.png", "caption": ODD}
    assert calls[-1] == {"call": "finish", "exit_code": 0}
    assert f"this run is in {out}/tracking/wandb (offline: `wandb sync` sends it)" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({"WANDB_API_KEY": "k" * 40}, "online"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_wandb_is_online_with_a_key_and_goes_on_with_the_same_run(tracked, variables, mode):
    first, said = tracked("wandb", exit_code=143, **variables, WANDB_PROJECT="mine")
    second, _ = tracked("wandb", **variables)
    ids = {init["id"] for init in (*named(first, "init"), *named(second, "init"))}
    assert len(ids) == 1 and named(first, "init")[0]["project"] == "mine" and named(first, "init")[0]["mode"] == mode
    assert [call["call"] for call in second] == ["init", "define_metric", "define_metric", "finish"]
    assert first[-1]["exit_code"] == 143 and ("https://wandb.ai/someone" in said) == (mode == "online")


def test_mlflow_is_told_the_run_once_and_finds_it_again(tracked, out):
    first, said = tracked("mlflow", exit_code=75)
    assert [call["call"] for call in first[:3]] == ["client", "create_experiment", "create_run"]
    assert first[0]["tracking_uri"] == (out / "tracking" / "mlruns").as_uri() and first[1]["name"] == "kiln"
    assert first[2]["run_name"] == "x" and set(first[2]["tags"]) == {"kiln_id"}
    parameters = {call["key"]: call["value"] for call in named(first, "log_param")}
    assert parameters["Base model"] == "mini-flux" and "Rank alpha" in parameters
    (text,) = named(first, "log_text")
    assert text["artifact_file"] == "plan.md" and text["text"].startswith("# What was decided")
    metrics = [metric for call in named(first, "log_batch") for metric in call["metrics"]]
    losses = [(metric["step"], metric["value"]) for metric in metrics if metric["key"] == "loss"]
    assert losses == [(step, 1 / step) for step in range(1, 41)]
    assert all(abs(metric["timestamp"] / 1000 - time.time()) < 600 for metric in metrics)
    images = [(call["step"], call["key"], call["size"]) for call in named(first, "log_image")]
    assert images == [(step, f"sample_{number:02d}", [64, 48]) for step, number in SAMPLES]
    assert first[-1] == {"call": "set_terminated", "run_id": "run-1", "status": "FAILED"}
    assert f"{out}/tracking/mlruns (`mlflow ui --backend-store-uri` shows it)" in said
    second, _ = tracked("mlflow")
    assert second[1:] == [
        {"call": "update_run", "run_id": "run-1", "status": "RUNNING"},
        {"call": "set_terminated", "run_id": "run-1", "status": "FINISHED"},
    ]


def test_mlflow_asks_the_server_and_the_experiment_that_are_named(tracked):
    given = {"MLFLOW_TRACKING_URI": "https://mlflow.example", "MLFLOW_EXPERIMENT_NAME": "faces"}
    calls, said = tracked("mlflow", **given)
    assert calls[0]["tracking_uri"] == "https://mlflow.example" and calls[1]["name"] == "faces"
    assert "the server of MLFLOW_TRACKING_URI" in said and "mlflow.example" not in said


def test_trackio_is_told_the_run_and_goes_on_with_it(tracked, out):
    first, said = tracked("trackio")
    (init,) = named(first, "init")
    assert init["project"] == "kiln" and init["space_id"] is None and init["resume"] == "allow"
    assert init["folder"] == str(out / "tracking" / "trackio") and init["config"]["Base model"] == "mini-flux"
    assert (init["embed"], init["auto_log_gpu"], init["auto_log_cpu"]) == (False, False, False)
    plan, *rows = named(first, "log")
    assert plan["step"] == 0 and plan["metrics"]["plan"]["markdown"].startswith("# What was decided")
    losses = [(row["step"], row["metrics"]["loss"]) for row in rows if "loss" in row["metrics"]]
    assert losses == [(step, 1 / step) for step in range(1, 41)]
    images = [(row["step"], key, value) for row in rows for key, value in row["metrics"].items() if "sample" in key]
    assert [(step, key) for step, key, _ in images] == [(step, f"sample/{number:02d}") for step, number in SAMPLES]
    assert images[3][2] == {"size": [64, 48], "file": "step-00000020-01.png", "caption": ODD}
    assert first[-1] == {"call": "finish"} and "(`trackio show` shows it)" in said
    second, _ = tracked("trackio")
    assert [call["call"] for call in second] == ["init", "finish"]
    assert second[0]["name"] == init["name"] and init["name"].startswith("x ")


def test_trackio_uses_the_space_and_the_project_that_are_named(tracked):
    given = {"TRACKIO_SPACE_ID": "me/space", "TRACKIO_PROJECT": "faces"}
    calls, said = tracked("trackio", hub_token=Secret("hf_write"), **given)
    assert (calls[0]["space_id"], calls[0]["project"]) == ("me/space", "faces")
    assert "this run is in the Space me/space" in said
