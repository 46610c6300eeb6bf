"""A short version of tests/fuzz/run.py: the corpus, and some mutations of it."""

import argparse
import json
import logging
import os
import random
import signal
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import sandbox, targets, whole
from tests.fuzz.run import attempt, campaign, mutated
from tests.fuzz.targets import TARGETS, Target, seeds

KNOWN = seeds()
RUNS = [name for name in TARGETS if TARGETS[name].is_run]
READERS = [name for name in TARGETS if name not in RUNS]
every_target = pytest.mark.parametrize("name", TARGETS)
every_reader = pytest.mark.parametrize("name", READERS)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Warnings of codecs and the log are no news: the inputs are odd on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        yield
        logging.disable(logging.NOTSET)
    targets.remove_scratch()


@every_target
def test_the_corpus_is_read_or_refused(name):
    assert KNOWN[name]
    assert [problem for data in KNOWN[name] if (problem := attempt(TARGETS[name], data))] == []


@every_reader
@given(st.integers(0, 2**32), st.binary(max_size=200))
@settings(max_examples=40)
def test_mutations_are_read_or_refused(name, seed, noise):
    rng = random.Random(seed)
    data = mutated(rng, rng.choice([*KNOWN[name], noise]), TARGETS[name].words, KNOWN[name])
    assert attempt(TARGETS[name], data) is None


@pytest.mark.parametrize("name", RUNS)
def test_whole_runs_of_odd_inputs_end_with_a_documented_exit_code(name):
    """The seeds are fixed, so the time is; tests/fuzz/run.py tries others."""
    for seed in range(8):
        assert attempt(TARGETS[name], b"%d" % seed) is None, seed


def test_a_run_that_says_what_it_must_not_is_noticed():
    heard = sandbox.Heard(["fine", "a \x1b[31m", "x" * 2001, "Traceback (most recent call last):", "line\n" * 200])
    assert [fault.split(" ")[1] for fault in heard.faults()] == ["raw", "line", "traceback:", "message"]


def test_a_run_that_hangs_or_writes_outside_is_noticed(monkeypatch):
    case = json.dumps({"env": {}, "arguments": [], "files": {}}).encode()

    def writes(_case, *, launch):
        (whole.root() / "cwd" / "x").write_text("")
        return 0

    monkeypatch.setattr(whole, "_entrypoint", writes)
    assert "files were changed" in attempt(TARGETS["check"], case)
    monkeypatch.setattr(whole, "_entrypoint", lambda _case, *, launch: 70)
    assert "exit code 70" in attempt(TARGETS["check"], case)
    monkeypatch.setattr(whole, "CPU_S", 0.2)

    def busy(_case, *, launch):
        while True:
            pass

    monkeypatch.setattr(whole, "_entrypoint", busy)
    assert "of CPU time" in attempt(TARGETS["check"], case)


def test_what_is_below_a_folder_is_seen_and_removed_however_deep_it_is(tmp_path):
    """Compared with os.walk, which needs no links followed either."""
    files = {
        "a/b/c.txt": "x",
        "a/d/e/f.txt": "xy",
        "a/loop": {"kind": "link", "to": "{S}"},
        "fifo": {"kind": "fifo"},
        "deep": {"kind": "deep", "depth": 30},
    }
    sandbox.make(tmp_path, files)
    walked = {}
    for folder, folders, names in os.walk(tmp_path):
        for name in [*folders, *names]:
            path = f"{folder}/{name}"
            walked[path] = os.lstat(path).st_mode
    seen = sandbox.state_of(tmp_path)
    assert {path: mode for path, (mode, _, _) in seen.items()} == walked
    assert seen[f"{tmp_path}/a/d/e/f.txt"][1] == 2
    assert len([path for path in seen if path.startswith(f"{tmp_path}/deep")]) == 30
    sandbox.make(tmp_path, {"deeper": {"kind": "deep", "depth": 1200}})
    assert len(sandbox.state_of(tmp_path)) == len(seen) + 1200
    sandbox.emptied(tmp_path)
    assert os.listdir(tmp_path) == []


def _flags(tmp_path, **changes):
    plain = {"inputs": 30, "seconds": 60.0, "seed": 1, "processes": 2, "memory_gib": 3.0, "found": tmp_path}
    return argparse.Namespace(**plain | changes)


def test_the_processes_of_a_campaign_share_its_inputs_and_end_in_time(tmp_path, monkeypatch):
    found = campaign(["prompts", "datasets"], _flags(tmp_path))
    assert [(name, of_target.count) for name, of_target in found.items()] == [("prompts", 15), ("datasets", 15)]
    monkeypatch.setitem(TARGETS, "prompts", Target(lambda _: time.sleep(0.05), ()))
    began = time.monotonic()
    found = campaign(["prompts", "datasets"], _flags(tmp_path, inputs=2_000_000, seconds=2.0))
    assert 2.0 <= time.monotonic() - began < 20.0
    assert found["prompts"].count > 0
    assert found["datasets"].count > 0
    assert os.listdir(tmp_path) == []


def test_an_input_that_crashes_a_process_is_kept(tmp_path, monkeypatch, capfd):
    """Whoever reads an input may take the process with it: then this process knows the input."""

    def crash(data):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setitem(TARGETS, "prompts", Target(crash, (), is_run=True))
    found = campaign(["prompts"], _flags(tmp_path, processes=1))
    assert list(found["prompts"].kinds) == ["the process ended with -9"]
    kept = [place.read_bytes() for place in (tmp_path / "prompts").iterdir()]
    assert kept == [random.Random("prompts 1 0").randbytes(8)]
    assert "prompts: found-" in capfd.readouterr().out


def test_memory_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "prompts", Target(lambda _: bytes(2**30), (), is_run=True))
    assert list(campaign(["prompts"], _flags(tmp_path, memory_gib=0.5))["prompts"].kinds) == ["MemoryError"]
    assert campaign(["prompts"], _flags(tmp_path, memory_gib=3.0))["prompts"].kinds == {}


@pytest.mark.parametrize("name", ["settings", "images", "archives", "lora", "state"])
def test_a_reader_that_lets_another_error_out_is_noticed(name):
    """The test can fail."""
    assert attempt(Target(TARGETS[name].read, ()), b"\xff not this")


def test_a_reader_that_hangs_is_noticed():
    began = time.process_time()

    def busy(_):
        until = time.process_time() + 1.1
        while time.process_time() < until:
            pass

    assert "took" in attempt(Target(busy, ()), b"") and time.process_time() - began > 2
