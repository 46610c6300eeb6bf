import pytest

from tests.support.pod import KEY, RunPodServer


@pytest.fixture
def server():
    with RunPodServer() as running:
        yield running
        assert running.wrong == [], "the stand-in answered in a shape that RunPod's document does not have"


@pytest.fixture
def account(server):
    """The environment of somebody with a key."""
    return {"RUNPOD_API_KEY": KEY, "RUNPOD_API_BASE_URL": server.url}
