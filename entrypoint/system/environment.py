"""The environment of child processes: no secrets, no variables of other launchers."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

from entrypoint.settings.variables import NAMES

SECRET = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "API_KEY", "ACCESS_KEY", "PRIVATE_KEY", "CONFIG_JSON")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Of clusters and other launchers, who each tell a process that it is one of several: none of ours is one of theirs.
RANKS = (
    *("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_WORLD_SIZE", "GROUP_RANK", "ROLE_WORLD_SIZE"),
    *("ROLE_RANK", "NUM_NODES", "NODE_RANK", "NUM_TRAINERS", "MASTER_ADDR", "MASTER_PORT", "PRIMARY_ADDR"),
    "PRIMARY_PORT",
)
LAUNCHERS = ("TORCHELASTIC_", "PET_", "ACCELERATE_")
VISIBLE = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")  # where both are set, the first is what counts


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without secrets, without our settings, among which addresses may be signed, and without the Hub."""
    settings = {*NAMES} - {"HF_HOME"}
    left_out = {*settings, *RANKS}
    kept = {k: v for k, v in environment.items() if k not in left_out and not k.startswith(LAUNCHERS)}
    kept = {k: v for k, v in kept.items() if not any(word in k.upper() for word in SECRET)}
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, environment.get("PYTHONPATH", "")) if p)
    ours = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    # Threads that spin while they wait make a CPU step many times slower as soon as another program wants a core.
    # Memory that was freed in pieces of one size serves another.
    return {"OMP_WAIT_POLICY": "PASSIVE", "PYTORCH_ALLOC_CONF": "expandable_segments:True", **kept, **ours}
