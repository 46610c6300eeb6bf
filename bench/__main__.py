"""Measurements, each printed as JSON lines and, with `--markdown FILE`, as a table with hardware and versions.

    python -m bench WHAT [--help]

step: speed and memory of a training step in one way or another. parity: gradients of each format against bf16.
concept: what a miniature learns in each format.
peers: what else a user would take, in the same run. memory: predicted against measured peaks. prepare: encoding.
kernels: those of the 8-bit engine, one by one. gpus: one, and several. job: a full-size model, and whole jobs on it.
reach: all that is to be reached, on all accelerators there are. layouts, state: reading models and writing states.
loading, scan: data.

same: no measurement, but the proof that a refactoring changes no result (`make same BASE=<commit>`).
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import bench

HELPERS = ("__main__", "full_size", "original_names", "others", "report")  # what measures nothing by itself


def main(arguments: list[str]) -> int:
    known = sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name not in HELPERS)
    if not arguments or arguments[0] not in known:
        print(f"{__doc__}\nWHAT: {', '.join(known)}", file=sys.stderr)
        return 64
    os.environ.setdefault(
        "PYTORCH_ALLOC_CONF", "expandable_segments:True"
    )  # as in a job (entrypoint/processes/launch.py)
    importlib.import_module(f"bench.{arguments[0]}").main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
