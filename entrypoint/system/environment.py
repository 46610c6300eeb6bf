"""The environment of child processes: no secrets, no variables of other launchers.

Every program is started with `child_environment`, so that a token does not appear in a core dump, a log of another
library or /proc of a process that does not need it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from entrypoint.settings.variables import NAMES

REPOSITORY = Path(__file__).resolve().parents[2]
# A variable whose name contains one of these counts as a secret. CONFIG_JSON may hold any variable, tokens too.
SECRET_WORDS = (
    *("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL"),
    *("API_KEY", "ACCESS_KEY", "PRIVATE_KEY", "CONFIG_JSON"),
)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # signals that the entrypoint passes on to its children
# Clusters and other launchers set these to tell a process that it is one of several. Libraries act on them, although
# our processes are none of theirs.
RANKS = (
    *("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_WORLD_SIZE", "GROUP_RANK", "ROLE_WORLD_SIZE"),
    *("ROLE_RANK", "NUM_NODES", "NODE_RANK", "NUM_TRAINERS", "MASTER_ADDR", "MASTER_PORT", "PRIMARY_ADDR"),
    "PRIMARY_PORT",
)
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "PET_", "ACCELERATE_")
VISIBLE = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")  # where both are set, the first is what counts
# How our programs run; the environment may set these otherwise.
DEFAULTS = {
    # OpenMP threads that spin while they wait make a CPU step many times slower once another program wants a core.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Segments that grow: memory that was freed in blocks of one size serves blocks of another.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a program that is started from here.

    Left out are secrets, our own variables (a URL among them may carry a signature) except HF_HOME, and those of other
    launchers. The Hub's libraries are offline: everything is fetched before they run.
    """
    child = dict(DEFAULTS)
    for name, value in environment.items():
        is_ours = name in NAMES and name != "HF_HOME"
        is_launchers = name in RANKS or name.startswith(LAUNCHER_PREFIXES)
        is_secret = any(word in name.upper() for word in SECRET_WORDS)
        if not (is_ours or is_launchers or is_secret):
            child[name] = value
    python_path = [str(REPOSITORY)]
    if environment.get("PYTHONPATH"):
        python_path.append(environment["PYTHONPATH"])
    child |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(python_path),
        "PYTHONUNBUFFERED": "1",
    }
    return child
