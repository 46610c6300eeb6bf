"""`python -m bench monitor` times a real job with real viewers, and a job without its page is no measurement."""

import subprocess
import sys

import pytest

from bench import monitor


def test_the_step_is_the_mean_between_two_moments():
    times = [0.0, 1.0, 2.0, 4.0, 8.0]
    assert monitor.mean_step(times, 0.5, 4.5) == pytest.approx(1.5)


@pytest.mark.slow
def test_a_job_is_timed_with_viewers_and_without(tmp_path):
    row = monitor.measure(tmp_path, viewers=5, rounds=2, window=3.0)
    assert row["viewers"] == 5 and row["step_ms_with"] > 0 and row["step_ms_without"] > 0
    assert 0 <= row["core_percent_without"] < row["core_percent_with"] < 50


def test_a_job_that_ends_is_named():
    job = subprocess.Popen([sys.executable, "-c", "raise SystemExit(78)"], stdin=subprocess.DEVNULL)
    with pytest.raises(RuntimeError, match=r"exit code 78"):
        monitor.wait_for(job, lambda: False)
