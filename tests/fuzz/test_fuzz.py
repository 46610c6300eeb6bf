"""A short version of tests/fuzz/run.py: the corpus, and some mutations of it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.run import attempt, mutated
from tests.fuzz.targets import TARGETS, Target, seeds

KNOWN = seeds()
every_target = pytest.mark.parametrize("name", TARGETS)


@every_target
def test_the_corpus_is_read_or_refused(name):
    assert KNOWN[name]
    assert [problem for data in KNOWN[name] if (problem := attempt(TARGETS[name], data))] == []


@every_target
@given(st.integers(0, 2**32), st.binary(max_size=200))
@settings(max_examples=40)
def test_mutations_are_read_or_refused(name, seed, noise):
    rng = random.Random(seed)
    data = mutated(rng, rng.choice([*KNOWN[name], noise]), TARGETS[name].words, KNOWN[name])
    assert attempt(TARGETS[name], data) is None


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
