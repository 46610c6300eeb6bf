"""Set-up of all tests. No torch here: the tests of data and settings run without it."""

from __future__ import annotations

import gc
import os

# Before torch or a BLAS is loaded: two test processes share two cores, and one thread gives the same sums everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest
from hypothesis import settings

pytest_plugins = ["tests.support.fixtures"]
pytest.register_assert_rewrite("tests.support")
# A busy machine is no failure; the same examples each time, so that a red test is red again.
settings.register_profile("kiln", deadline=None, derandomize=True, database=None)
settings.load_profile("kiln")


def pytest_collection_finish() -> None:
    """Jobs in this process collect garbage many times: what is imported by now need not be looked through each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What was logged may hold halves of letters, which a report cannot take from one process to another."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report
