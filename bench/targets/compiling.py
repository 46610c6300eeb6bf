"""Compile a launch for a target, and read from the result what it uses."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.targets.launches import Launch
from bench.targets.limits import Target, Usage

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NVIDIA_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
REGISTER_BYTES = 4


class _Driver:
    """In the place of a driver: there is one device, which is the target, and nothing runs on it."""

    def __init__(self, target: Target) -> None:
        self.target = GPUTarget(target.backend, target.architecture, target.threads_per_warp)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def usage(launch: Launch, target: Target) -> Usage:
    """Compile; raises what Triton or the vendor's compiler raises."""
    driver.set_active(_Driver(target))
    kernel = launch.function()
    kernel.device_caches = collections.defaultdict(kernel.create_binder)  # of the target before
    compiled = kernel.warmup(*launch.mocked_arguments(), grid=(1,), num_warps=launch.num_warps)
    registers, spills = _registers(compiled, target)
    threads = compiled.metadata.num_warps * target.threads_per_warp
    return Usage(threads, registers, spills, compiled.metadata.shared)


def _registers(compiled: Any, target: Target) -> tuple[int, int]:
    """Registers of a thread, and how many of them are kept in memory."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        found = {key: int(value) for key, value in re.findall(r"\.([sv]gpr(?:_spill)?_count):\s+(\d+)", text)}
        return found["vgpr_count"], found["vgpr_spill_count"] + found["sgpr_spill_count"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    match = NVIDIA_USAGE.search(printed.stdout)
    assert match is not None, printed.stdout
    registers, stack, _shared, local = map(int, match.groups())
    return registers, max(stack, local) // REGISTER_BYTES
