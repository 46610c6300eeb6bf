"""SkyPilot: a managed job, which SkyPilot starts again on another machine when its own is taken away.

Its `recover_on_exit_codes` names the exit codes after which the job is started again on the same terms; every other
code ends it at once. It does so without a limit and without a pause, which is right after a machine was taken away
(143). 75 is therefore tried again inside the container, where both are ours. https://docs.skypilot.co/en/latest/examples/managed-jobs.html
"""

from __future__ import annotations

from typing import Any

from entrypoint.engines.again import IMAGE_VARIABLES, loop, with_image_variables
from entrypoint.engines.documents import Document, as_yaml
from entrypoint.engines.gpu_names import SKY
from entrypoint.engines.request import STOPPED_EXIT_CODE, Request

NAMES = SKY


def make(request: Request) -> Document:
    """The task, as `sky jobs launch` takes it."""
    wanted = []
    for choice in request.cards:
        wanted.append({"accelerators": f"{SKY[choice.card]}:{request.count}"})
    recovery: dict[str, Any] = {"max_restarts_on_errors": 0}
    if STOPPED_EXIT_CODE in request.again:
        recovery["recover_on_exit_codes"] = [STOPPED_EXIT_CODE]
    resources: dict[str, Any] = {
        "image_id": f"docker:{request.image}",
        "disk_size": request.disk_gb,
        "use_spot": request.spot,
        "job_recovery": recovery,
        **({"ordered": wanted} if len(wanted) > 1 else wanted[0]),
    }
    places = {name: IMAGE_VARIABLES[name] for name in ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME")}
    task: dict[str, Any] = {"name": request.name, "resources": resources, "envs": {**places, **request.variables}}
    if request.nodes > 1:
        task["num_nodes"] = request.nodes
    if request.secrets:
        task["secrets"] = dict.fromkeys(request.secrets)
    if "://" in request.storage:
        # MOUNT alone has no rename and no write in the middle of a file (docs/engines.md); a cached mount has both.
        task["file_mounts"] = {"/workspace": {"source": request.storage, "mode": "MOUNT_CACHED"}}
    elif request.storage:
        task["volumes"] = {"/workspace": request.storage}
    task["run"] = f"mkdir -p /workspace && cd /workspace || exit 74\n{loop(with_image_variables())}"
    file = f"{request.name}.yaml"
    start = ["sky", "jobs", "launch", "--yes"]
    for name in request.secrets:
        start += ["--secret", name]
    notes = []
    if not request.storage:
        notes.append(
            "No --storage: a job that is recovered begins anew. Name a volume, or a bucket (s3://..., gs://...)."
        )
    return Document(file, as_yaml(task), (*start, file), "sky", "pip install skypilot", notes=tuple(notes))
