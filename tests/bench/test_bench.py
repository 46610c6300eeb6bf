"""The measurements run, on narrow models and on the CPU; their figures are for an accelerator."""

import importlib
import inspect
import json
import os
import pkgutil
from pathlib import Path

import pytest
import torch

import bench
from bench import others, peers, reach, step
from bench.__main__ import HELPERS, main

NAMES = [m.name for m in pkgutil.iter_modules(bench.__path__) if m.name not in HELPERS]


@pytest.mark.parametrize("name", NAMES)
def test_every_measurement_can_be_called(name):
    (parameter,) = inspect.signature(importlib.import_module(f"bench.{name}").main).parameters
    assert parameter == "arguments"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "flux2", "sd3", "sdxl", "z_image", "qwen_image", "krea2"])
@pytest.mark.parametrize(
    ("what", "rows"),
    [
        (["step", "fp8+all+eager:1", "bf16+none+eager:2", "nf4+attention+eager:1"], 3),
        (["parity", "--precision", "fp8", "nf4"], 3),
        (["memory", "--batch", "1"], 4),
        (["prepare", "--pictures", "6"], 1),
        (["shapes", "--shapes", "1,2"], 2),
        (["samples", "--pictures", "1", "--rounds", "2"], 2),
    ],
)
def test_a_measurement_prints_its_rows_and_writes_its_table(tmp_path, capsys, name, what, rows):
    table = tmp_path / "table.md"
    assert main([what[0], "--family", name, "--small", "--markdown", str(table), *what[1:]]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(printed) >= rows
    lines = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert len(lines) == rows + 2 and len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
def test_a_measurement_knows_the_other_models_of_a_family(capsys):
    assert main(["step", "--family", "flux2", "--base", "flux2-klein-9b", "--small", "bf16+all+eager:1"]) == 0
    assert main(["shapes", "--family", "flux2", "--base", "flux2-klein-9b", "--small", "--shapes", "1"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert sum("step_s" in row for row in printed) == 2


def test_each_family_is_measured_at_the_size_of_its_first_model():
    klein = step.denoiser_config("flux2", "")
    assert klein["num_attention_heads"] == 24 and klein == step.denoiser_config("flux2", "flux2-klein-4b")
    assert step.text_sizes("flux2", "flux2-klein-9b") == (512, (3 * 4096,), 1)
    assert step.text_sizes("z_image", "") == (128, (2560,), 1)
    assert step.text_sizes("krea2", "") == (128, (12, 2560), 1)


def test_captions_of_different_lengths_are_measured_with_a_mask():
    bench = step.Bench("qwen_image", "bf16", small=True)
    losses = []
    for words in ({"all", "eager"}, {"all", "eager", "masked"}):
        engine = bench.engine(words)
        losses.append(bench.loss(engine, bench.inputs(2))[0].item())
    assert bench.inputs(2)["padding"].sum(1).tolist() == [0, 128 // 4] and losses[0] != losses[1]


@pytest.mark.slow
def test_peers_are_measured_beside_ours(capsys):
    assert main(["peers", "--family", "sd3", "--small", "--batch", "1", "--ours", "fp8+all+eager"]) == 0
    found = [json.loads(line)["what"] for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert found == ["bf16 eager", "bf16 compiled", "torchao compiled", "fp8+all+eager"]


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["ONETRAINER", "SD_SCRIPTS"])
def test_other_trainers_take_a_step(whose):
    """The variable names a checkout of theirs, whose needs are met."""
    if whose not in os.environ:
        pytest.skip(f"{whose} names no checkout")
    checkout = Path(os.environ[whose])
    if whose == "ONETRAINER":
        change = others.onetrainer(checkout, torch.int8)
        peer = peers.Peer("sd3", "OneTrainer int8 eager", small=True, change=change)
    else:
        peer = others.SdScripts(checkout, small=True)
    before = [p.detach().clone() for p in peer.params]
    row = peer.measured(lambda: peer.step(None, 1))
    assert row["step_s"] > 0 and any(not torch.equal(p, q) for p, q in zip(peer.params, before, strict=True))


@pytest.mark.slow
def test_several_processes_are_measured_against_one(capsys):
    given = ["--family", "flux", "--small", "--what", "bf16+all+eager", "--batch", "1", "2", "--gpus", "1", "2"]
    assert main(["gpus", *given, "--steps", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(row["gpus"], row["batch"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(row["of_linear"] == 1 for row in rows[:2]) and all(row["of_linear"] > 0 for row in rows)
    assert all("own_gib" not in row for row in rows)
    for what in (("--what", "bf16+all+eager"), ("--shapes", "1")):
        given = ["--family", "flux", "--small", *what, "--batch", "1", "--gpus", "2", "--steps", "1", "--sharded"]
        assert main(["gpus", *given]) == 0
        (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        assert row["own_gib"] > 0 and row["read_gb_s"] > 0 and row["images_s"] > 0


def test_rows_are_told_as_they_end_and_what_they_said_is_kept(tmp_path, capsys, monkeypatch):
    rows = {"plans": ("plans", "--family", "flux", "--memory", "80", "--batch", "1", "4"), "unknown": ("speed",)}
    monkeypatch.setattr(reach, "ROWS", rows)
    assert main(["reach", str(tmp_path), "--only", "plans", "unknown"]) == 0
    plans, unknown = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert plans["exit"] == 0 and [row["batch"] for row in plans["said"]] == [1, 4]
    assert unknown["exit"] == 64 and unknown["said"] == [] and "WHAT:" in (tmp_path / "unknown.log").read_text()


def test_a_row_that_takes_too_long_is_ended(tmp_path, capsys):
    assert main(["reach", str(tmp_path), "--seconds", "0.2", "--only", "parity-flux"]) == 0
    assert json.loads(capsys.readouterr().out)["exit"] == 124


def test_an_unknown_measurement_is_told_what_there_is(capsys):
    assert main(["speed"]) == 64
    assert "step" in capsys.readouterr().err
