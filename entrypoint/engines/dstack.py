"""dstack: a task. It retries where there is no machine, or where one is taken away.

It cannot tell exit codes apart: with `error` among its events it would also start a job again whose settings are wrong.
So 75 is tried again inside the container. https://dstack.ai/docs/reference/dstack.yml/task/
"""

from __future__ import annotations

from typing import Any

from entrypoint.engines.again import loop, with_image_variables
from entrypoint.engines.documents import GRACE_S, Document, as_yaml
from entrypoint.engines.gpu_names import DSTACK, VENDOR
from entrypoint.engines.request import Request

NAMES = DSTACK
GPU_MARGIN_MIB = 2048  # dstack counts in the sizes that names have, drivers a little less


def make(request: Request) -> Document:
    """The task, as `dstack apply` takes it. Secrets are dstack's own, by the lower-case name of the variable."""
    environment = []
    for name, value in request.variables.items():
        environment.append(f"{name}={value}")
    before = []
    for name in request.secrets:
        environment.append(f"{name}=${{{{ secrets.{name.lower()} }}}}")
        before.append(f'dstack secret set {name.lower()} "${name}"')
    names: dict[str, None] = dict.fromkeys(DSTACK[choice.card] for choice in request.cards)
    least_gb = (request.least_memory_mib - GPU_MARGIN_MIB) // 1024
    gpu = {"vendor": VENDOR, "name": list(names), "memory": f"{least_gb}GB..", "count": request.count}
    task: dict[str, Any] = {
        "type": "task",
        "name": request.name,
        "image": request.image,
        "env": environment,
        # "sh" and not bash: the image has it, and the script needs no more.
        "shell": "sh",
        "commands": [loop(with_image_variables())],
        "working_dir": "/workspace",
        "resources": {"gpu": gpu, "disk": f"{request.disk_gb}GB..", "shm_size": "8GB"},
        "spot_policy": "auto" if request.spot else "on-demand",
        "retry": {"on_events": ["no-capacity", "interruption"], "duration": f"{round(request.hours + 24)}h"},
        "max_duration": f"{round(request.hours + 0.5)}h",
        "stop_duration": f"{GRACE_S}s",
    }
    if request.nodes > 1:
        task["nodes"] = request.nodes
    if request.storage:
        task["volumes"] = [f"{request.storage}:/workspace"]
    notes = []
    if not request.storage:
        notes.append("No --storage: an interrupted job begins anew. Name one of dstack's volumes.")
    file = f"{request.name}.dstack.yml"
    start = ("dstack", "apply", "--yes", "-f", file)
    return Document(file, as_yaml(task), start, "dstack", "pip install dstack", tuple(before), tuple(notes))
