import pytest

from tests.support.finished_runs import finished_run


@pytest.fixture
def finished(tmp_path):
    """A folder with the files of a finished run."""
    finished_run(tmp_path)
    return tmp_path
