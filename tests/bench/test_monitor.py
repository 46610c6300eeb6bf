"""`python -m bench monitor` times a real job with real viewers, and a job without its page is no measurement."""

import math
import subprocess
import sys

import pytest

from bench import monitor


def test_the_step_is_the_median_of_those_between_two_moments():
    times = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert monitor.median_step(times, 0.5, 9.0) == 2.0 and math.isnan(monitor.median_step(times, 3.0, 7.0))


def test_what_a_step_spends_is_that_of_the_best_second():
    """Steps of 0.25 s. Two of the three seconds are shared with others; each ends in the middle of a step."""
    times = [0.25 * number for number in range(40)]
    slices = ((1.1, 10.0), (2.1, 10.9), (3.1, 11.5), (4.1, 12.6))
    assert monitor.steps_by(times, 2.1) == pytest.approx(9.4)
    assert monitor.core_step(times, monitor.Window(0.0, slices)) == pytest.approx(0.6 / 4)
    assert math.isnan(monitor.core_step(times, monitor.Window(0.0, ((20.0, 0.0), (21.0, 2.0)))))


def test_two_halves_are_compared_round_by_round():
    """Eight rounds in which it is 1 % slower, and one in which the machine was busy."""
    seen = {"without": [], "with": []}
    for number in range(9):
        load = 50.0 if number == 4 else 1.0
        seen["without"].append(monitor.Window(0.10 * (number + 1), ()))
        seen["with"].append(monitor.Window(0.101 * (number + 1) * load, ()))
    for kind, spent in (("without", math.nan), ("with", 1.0)):  # other programs had the cores all the while
        seen[kind].append(monitor.Window(spent, ()))
    found = monitor.compared("core", seen, lambda window: window.server_s)
    assert found["core_slower_percent"] == 1.0 and found["core_between"][0] == 1.0
    assert found["core_ms_without"] == 500.0


def test_the_ranks_of_95_percent_are_those_of_the_binomial_distribution():
    """Between the 21st and the 40th of 60: P(20 <= Binomial(60, 1/2) <= 39) by hand is more than 95 %."""
    low, high = monitor.likely_ranks(60)
    inside = sum(math.comb(60, k) for k in range(low + 1, high + 1)) / 2**60
    assert 0.95 <= inside <= 0.99 and monitor.likely_ranks(2) == (0, 1)


@pytest.mark.slow
def test_a_job_is_timed_with_viewers_and_without(tmp_path):
    row = monitor.measure(tmp_path, viewers=5, rounds=2, window=3.0)
    assert row["viewers"] == 5 and row["step_ms_with"] > 0 and row["step_ms_without"] > 0
    assert row["core_ms_without"] > 0 and 0 <= row["server_percent_without"] < row["server_percent_with"] < 50


def test_a_job_that_ends_is_named():
    job = subprocess.Popen([sys.executable, "-c", "raise SystemExit(78)"], stdin=subprocess.DEVNULL)
    with pytest.raises(RuntimeError, match=r"exit code 78"):
        monitor.wait_for(job, lambda: False)
