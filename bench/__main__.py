"""Measurements, printed as lines of JSON and, with `--markdown FILE`, as a table with hardware and versions.

    python -m bench WHAT [--help]

step: speed and memory of a training step in any variant
plans: the plan for hardware that need not be there; `--cards`: for those that people have
shapes: a job's steps with images of one, ten and twenty shapes
samples: pictures that are drawn while a job trains
targets: our Triton kernels compiled for accelerators that need not be there
peers: steps of other trainers in the same run
memory: predicted and measured peaks
parity: gradients of each precision against bf16
kernels: the kernels of the 8-bit engine, one by one
attention: the kernels of attention that torch can choose from
gpus: a step on one GPU and on several
nodes: faults on several machines: time to end, to go on, and work lost
concept: how well a miniature learns in each precision
job: a full-size model, and whole jobs on it
minute: a person's whole job on several GPUs, and where each second goes
reach: all targets of docs/performance.md, on all accelerators
prepare: encoding images and captions, on one GPU and on several
captions: captioning images by models of the published sizes
loading, scan: reading the cache, and scanning a dataset
scale: seconds, memory and files of many images, and how they grow
layouts: loading models from files of every layout
state: writing states
monitor: how much the monitor page slows training, with 20 viewers
picture: no measurement, but the picture of docs/performance.md, from rows of `peers`
screenshots: no measurement, but pictures of the monitor page for docs/
same: no measurement, but the proof that a refactoring changes no result (`make same BASE=<commit>`)
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import bench

HELPERS = (
    "__main__",
    "browser",
    "cards",
    "full_size",
    "members",
    "network",
    "original_names",
    "others",
    "report",
)  # modules that are no measurement


def main(arguments: list[str]) -> int:
    """Run the measurement that the first argument names; the exit code."""
    modules = pkgutil.iter_modules(bench.__path__)
    known = sorted(module.name for module in modules if module.name not in HELPERS)
    if not arguments or arguments[0] not in known:
        print(f"{__doc__}\nWHAT: {', '.join(known)}", file=sys.stderr)
        return 64
    # As in a job (entrypoint/processes/launch.py).
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    importlib.import_module(f"bench.{arguments[0]}").main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
