"""RunPod's library as its documentation tells of it: one local job from test_input.json, and its progress noted."""

from . import serverless  # noqa: F401
