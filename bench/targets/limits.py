"""The targets that kernels are compiled for, and how much of each one program may use.

NVIDIA: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute Capability"
(registers of a thread, registers and shared memory of a thread block). AMD: the instruction set manuals of CDNA 3 and
CDNA 4, "Local Data Share" and "Vector General Purpose Registers": 512 vector registers for each lane of a SIMD, shared
by the waves that run on it, and four SIMDs in a compute unit.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_THREADS = 1024  # of a program, on all targets


class Target(NamedTuple):
    """An architecture and its limits. `shared_kib` and `registers` are those of one program (a block, a workgroup)."""

    backend: str  # Triton's name: cuda or hip
    architecture: int | str  # Triton's: 90 or gfx942
    threads_per_warp: int
    shared_kib: int
    registers_per_thread: int
    registers: int
    spills: int = 0  # registers that a thread may keep in memory

    @property
    def name(self) -> str:
        return str(self.architecture) if self.backend == "hip" else f"sm_{self.architecture}"

    @property
    def capability(self) -> tuple[int, int]:
        """What torch.cuda.get_device_capability answers there: of gfx942, (9, 4)."""
        digits = str(self.architecture).removeprefix("gfx")
        if self.backend == "hip":
            return int(digits[0]), int(digits[1])
        return int(digits[:-1]), int(digits[-1])


CDNA_REGISTERS = 4 * 64 * 512  # SIMDs, lanes, registers for each lane

TARGETS = {
    target.name: target
    for target in (
        Target("cuda", 80, 32, 163, 255, 65536),  # A100, A30
        Target("cuda", 86, 32, 99, 255, 65536),  # RTX 30, A40, A6000
        Target("cuda", 89, 32, 99, 255, 65536),  # RTX 40, L4, L40S
        Target("cuda", 90, 32, 227, 255, 65536),  # H100, H200
        Target("cuda", 100, 32, 227, 255, 65536),  # B200
        # RTX 50, RTX PRO Blackwell. ptxas gives norm_gradient 64 registers for occupancy where it needs 65: a
        # thread stores one, in a frame of two, and loads it once.
        Target("cuda", 120, 32, 99, 255, 65536, spills=2),
        Target("hip", "gfx942", 64, 64, 512, CDNA_REGISTERS),  # MI300X, MI325X
        Target("hip", "gfx950", 64, 160, 512, CDNA_REGISTERS),  # MI350X, MI355X
    )
}


class Usage(NamedTuple):
    """What one compiled kernel uses."""

    threads: int
    registers: int  # of a thread
    spills: int
    shared_bytes: int


def fault(target: Target, usage: Usage) -> str | None:
    """Why the target cannot run a program that uses this; None: it can."""
    if usage.threads > MAX_THREADS:
        return f"{usage.threads} threads, {MAX_THREADS} are allowed"
    if usage.shared_bytes > target.shared_kib * 1024:
        return f"{usage.shared_bytes} bytes of shared memory, {target.shared_kib * 1024} are allowed"
    if usage.registers > target.registers_per_thread:
        return f"{usage.registers} registers a thread, {target.registers_per_thread} are allowed"
    if usage.registers * usage.threads > target.registers:
        return f"{usage.registers} registers for each of {usage.threads} threads, {target.registers} are there in all"
    if usage.spills > target.spills:
        return f"{usage.spills} spilled registers"
    return None
