"""Vast.ai: an instance of the marketplace, found by a search and created from the first offer that it names.

https://docs.vast.ai/cli/commands; the names of fields are those of `vastai search offers --help`.
"""

from __future__ import annotations

import shlex

from entrypoint.engines.again import loop
from entrypoint.engines.documents import Document
from entrypoint.engines.gpu_names import VAST
from entrypoint.engines.request import Request

NAMES = VAST
LEAST_CUDA = "13.0"  # of the host's driver: the image's torch is built for it (entrypoint.runpod.request)
LEAST_RELIABILITY = "0.98"
MARGIN_GB = 1.5  # Vast.ai counts what the driver has, in GB


def make(request: Request) -> Document:
    """A script that takes the cheapest offer. Secrets are the account's own variables, which each instance gets."""
    names: dict[str, None] = dict.fromkeys(VAST[choice.card] for choice in request.cards)
    query = " ".join(
        (
            f"gpu_name in [{','.join(names)}]",
            f"num_gpus={request.count}",
            f"gpu_ram>={request.least_memory_mib / 1024 - MARGIN_GB:.0f}",
            f"cuda_vers>={LEAST_CUDA}",
            f"disk_space>={request.disk_gb}",
            f"reliability>{LEAST_RELIABILITY}",
            "rentable=True",
        )
    )
    search = ["vastai", "search", "offers", query, "--order", "dph", "--limit", "1", "--raw"]
    if request.spot:
        search.append("--interruptible")
    # As a script, since vastai's own reader of `--env` loses values with quotes in them.
    script = ""
    for name, value in request.variables.items():
        script += f"export {name}={shlex.quote(value)}\n"
    create = ["vastai", "create", "instance", "--image", request.image, "--label", request.name]
    create += ["--disk", str(request.disk_gb), "--cancel-unavail"]
    if request.page:
        create += ["--env", f"-p {request.page}:{request.page}"]
    if request.storage:
        create += ["--link-volume", request.storage, "--mount-path", "/workspace"]
    create += ["--entrypoint", "sh", "--args", "-c", script + loop()]
    first = " ".join(shlex.quote(word) for word in create[:3])
    rest = " ".join(shlex.quote(word) for word in create[3:])
    read_id = "import json, sys; found = json.load(sys.stdin); print(found[0]['id'] if found else '')"
    lines = [
        "#!/bin/sh",
        "set -eu",
        f"offer=$({' '.join(shlex.quote(word) for word in search)} | python3 -c {shlex.quote(read_id)})",
        'test -n "$offer" || { echo "Vast.ai has no such offer now." >&2; exit 75; }',
        f'exec {first} "$offer" {rest}',
        "",
    ]
    before = tuple(f'vastai create env-var {name} "${name}"' for name in request.secrets)
    notes = ("Vast.ai bills the instance until it is destroyed: vastai destroy instance ID, once the LoRA is copied.",)
    file = f"{request.name}.sh"
    return Document(file, "\n".join(lines), ("sh", file), "vastai", "pip install vastai", before, notes)
