"""A short version of tests/fuzz/run.py: the corpus, and some mutations of it."""

import json
import logging
import random
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import sandbox, whole
from tests.fuzz.run import attempt, mutated
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


@pytest.mark.parametrize("name", ["settings", "images", "archives", "lora", "state"])
def test_a_reader_that_lets_another_error_out_is_noticed(name):
    """The test can fail."""
    assert attempt(Target(TARGETS[name].read, ()), b"\xff not this")


def test_a_reader_that_hangs_is_noticed():
    import time

    began = time.process_time()

    def busy(_):
        until = time.process_time() + 1.1
        while time.process_time() < until:
            pass

    assert "took" in attempt(Target(busy, ()), b"") and time.process_time() - began > 2
