import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _there_is_a_machine_for_it():
    """tests/container/run.sh looks for an engine, and says here why there is none."""
    if reason := os.environ.get("KILN_NO_CONTAINER"):
        pytest.skip(f"NO CONTAINER WAS TESTED: {reason}")
