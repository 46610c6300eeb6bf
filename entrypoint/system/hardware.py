"""What this container runs on, found without torch. Beside trainer.spec.weight_formats the only place that knows
vendors."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import re
import runpy
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoint.settings.variables.engine import BACKENDS, FORMATS
from entrypoint.system.environment import VISIBLE, child_environment
from trainer.spec.errors import SettingsError, UnreachableError
from trainer.spec.weight_formats import PRECISIONS, supported_formats

GIB = 2**30


# By speed; formats that lose more than a rounding are last. What was not measured is not first.
_FASTEST = ("fp8", "bf16", "fp16", "int8", "int8-storage", "fp8-storage", "nf4")
_FASTEST_AMD = ("bf16", "fp8", "int8-storage", "fp8-storage", "nf4")
QUERY = ("nvidia-smi", "--query-gpu=index,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits")
QUERY_SECONDS = 30.0  # without persistence mode the driver takes seconds to wake up
BUILDS = {"nvidia": "cuda", "amd": "hip"}  # vendor → what torch.version calls a build for it
DRIVERS = {12: 525, 13: 580}  # major version of CUDA → the first driver that runs what is built for any minor one
_VIDEO_MEMORY = {"1", "2"}  # heap types of the kernel's topology: visible to the CPU, and not


@dataclass(frozen=True)
class Hardware:
    """What can be trained on. Tests make these up."""

    vendor: str  # a value of BACKENDS
    architecture: str  # compute capability (9.0), gfx name (gfx942), or the machine's type (x86_64)
    memory_gib: float  # of one device, the smallest if they differ; the host's where there is no accelerator
    count: int  # devices
    driver: str
    host_memory_gib: float
    cpu_count: int

    @property
    def device(self) -> str:
        """The torch device type: both vendors of accelerators answer to the same."""
        return "cpu" if self.vendor == "cpu" else "cuda"

    @property
    def backend(self) -> str:
        """The value of BACKEND that asks for it."""
        return next(name for name, vendor in BACKENDS.items() if vendor == self.vendor)

    @property
    def formats(self) -> tuple[str, ...]:
        """The values of PARAMS_PRECISION that this hardware computes in, the one to choose by default first."""
        if self.vendor == "cpu":
            return FORMATS
        nvidia = self.vendor == "nvidia"
        known = (
            supported_formats(nvidia=_version(self.architecture))
            if nvidia
            else supported_formats(amd=self.architecture)
        )
        first: tuple[str, ...] = _FASTEST if nvidia else _FASTEST_AMD
        return (*(name for name in first if name in known), *(name for name in known if name not in first))

    @property
    def auto_precisions(self) -> tuple[str, ...]:
        """What PARAMS_PRECISION=auto may become: the fastest; if that is too large, 8 bits; and last, 4."""
        if self.vendor == "cpu":
            return self.formats[:1]
        smaller = (next((name for name in self.formats if PRECISIONS[name].bytes == 1), ""), "nf4")
        return tuple(dict.fromkeys((self.formats[0], *(name for name in smaller if name in self.formats))))

    @property
    def unquantized_precision(self) -> str:
        """The format that computes with weights as they are, for models too small to gain from another."""
        return next(name for name in self.formats if name in ("bf16", "fp32"))

    @property
    def can_capture(self) -> bool:
        """Whether steps are recorded (trainer.engine.cuda_graphs). On AMD that was not tried."""
        return self.vendor == "nvidia"

    @property
    def runs_flash_4(self) -> bool:
        """Whether FlashAttention 4 (trainer.engine.attention.flash_attention_4) has both passes for this."""
        return self.vendor == "nvidia" and _version(self.architecture)[0] >= 9

    @property
    def fastest_attention(self) -> str:
        """By what was measured: elsewhere torch is left to pick."""
        return "flash_4" if self.runs_flash_4 and _version(self.architecture)[0] == 9 else "native"

    def activation_dtype(self, precision: str) -> str:
        """torch's name of the type of activations, with weights in a format: 16 bits that are fast here."""
        return PRECISIONS[precision].dtype or (
            "bfloat16" if self.vendor == "cpu" or "bf16" in self.formats else "float16"
        )

    def __str__(self) -> str:
        if self.vendor == "cpu":
            return f"{self.cpu_count} CPU cores ({self.architecture}), {self.host_memory_gib:.0f} GiB"
        return f"{self.count} × {self.vendor} {self.architecture}, {self.memory_gib:.0f} GiB each"


def detect(
    *,
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
    root: Path = Path("/"),
    environ: Mapping[str, str] | None = None,
) -> Hardware:
    """The accelerators that there are, else the CPU. `root` is where /proc, /sys and /dev are looked for.

    Raises UnreachableError if a driver is there but does not answer.
    """
    given = os.environ if environ is None else environ
    visible, host = {name: given.get(name) for name in VISIBLE}, _host(root)
    nvidia = _nvidia(host, run=run, visible=visible["CUDA_VISIBLE_DEVICES"])
    return nvidia or _amd(host, root=root, visible=next(filter(None, visible.values()), None)) or host


def select(found: Hardware, backend: str) -> Hardware:
    """The part of `found` that BACKEND asks for. Raises SettingsError if it is not there."""
    vendor = found.vendor if backend == "auto" else BACKENDS[backend]
    if vendor == found.vendor:
        return found
    if vendor == "cpu":
        return dataclasses.replace(
            found, vendor="cpu", architecture="host", memory_gib=found.host_memory_gib, count=0, driver=""
        )
    raise SettingsError(
        f"BACKEND={backend!r}: no such device answers here, only {found}. Fix: give the container its GPUs "
        f"(for example docker run --gpus all, or --device /dev/kfd --device /dev/dri), or set BACKEND=auto."
    )


def torch_version() -> dict[str, Any]:
    """What torch.version holds, read without importing torch, which takes seconds; empty where there is no torch."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return runpy.run_path(str(file)) if file and file.is_file() else {}


def check_torch(found: Hardware, version: Mapping[str, Any]) -> None:
    """Raises SettingsError if torch is not built for this hardware, or the driver is too old for it.

    torch itself would see no device, and say so only after everything is downloaded.
    """
    if found.vendor == "cpu" or not version:
        return
    built = version.get(BUILDS[found.vendor])
    if not built:
        raise SettingsError(
            f"torch {version.get('__version__')} is not built for {found}. Fix: take the image for {found.backend} "
            f"(its name ends in -{found.backend}), or set BACKEND=cpu."
        )
    needed = DRIVERS.get(_version(built)[0]) if found.vendor == "nvidia" else None
    if needed and _version(found.driver) and _version(found.driver)[0] < needed:
        raise SettingsError(
            f"The driver {found.driver} of this machine is too old for torch {version['__version__']}, which needs "
            f"{needed} or newer. Fix: update the driver, or rent a machine with CUDA {built} or newer."
        )


def _nvidia(
    host: Hardware, *, run: Callable[..., subprocess.CompletedProcess[str]], visible: str | None
) -> Hardware | None:
    try:
        own = child_environment(os.environ)
        answer = run(QUERY, env=own, capture_output=True, text=True, timeout=QUERY_SECONDS, check=False)
    except OSError:  # not installed
        return None
    except subprocess.TimeoutExpired as problem:
        raise UnreachableError(f"nvidia-smi did not answer in {QUERY_SECONDS:.0f} s: the driver is stuck.") from problem
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    rows = [row for row in rows if len(row) == len(QUERY[1].split(","))] if answer.returncode == 0 else []
    rows = _visible(rows, visible)
    if not rows:
        return None
    # Machines whose GPU shares the host's memory print [N/A].
    memory = [float(row[2]) / 1024 if row[2].replace(".", "").isdecimal() else host.host_memory_gib for row in rows]
    return dataclasses.replace(
        host,
        vendor="nvidia",
        architecture=min((row[1] for row in rows), key=_version),
        memory_gib=min(memory),
        count=len(rows),
        driver=rows[0][3],
    )


def _visible(rows: list[list[str]], visible: str | None) -> list[list[str]]:
    """The rows that CUDA_VISIBLE_DEVICES leaves: a list of numbers up to the first impossible one, or of names."""
    if visible is None:
        return rows
    names = [name.strip() for name in visible.split(",")]
    if all(name.lstrip("-").isdecimal() for name in names):
        wanted = [row for name in names for row in rows if row[0] == name]
        return wanted if "-1" not in names else wanted[: names.index("-1")]
    return rows[: len([name for name in names if name])]


def _amd(host: Hardware, *, root: Path, visible: str | None) -> Hardware | None:
    """From the kernel's own description of the nodes. Without /dev/kfd they are the host's and not ours."""
    if not (root / "dev/kfd").exists():
        return None
    devices = []
    for node in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*")):
        properties = _properties(node / "properties")
        if int(properties.get("simd_count", 0)) and int(properties.get("gfx_target_version", 0)):
            banks = [_properties(bank) for bank in node.glob("mem_banks/*/properties")]
            size = sum(int(b.get("size_in_bytes", 0)) for b in banks if b.get("heap_type") in _VIDEO_MEMORY)
            devices.append((_gfx(int(properties["gfx_target_version"])), size / GIB))
    devices = [devices[int(number)] for (number,) in _visible([[str(i)] for i in range(len(devices))], visible)]
    if not devices:
        return None
    return dataclasses.replace(
        host,
        vendor="amd",
        architecture=devices[0][0],
        memory_gib=min(memory for _, memory in devices),
        count=len(devices),
        driver=_read(root / "sys/module/amdgpu/version") or _read(root / "proc/sys/kernel/osrelease"),
    )


def _gfx(version: int) -> str:
    """90402 → gfx942: two decimal digits each, of which the last two are written as one hexadecimal digit."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _host(root: Path) -> Hardware:
    """The CPU and its memory, less what a container may not use."""
    total = re.search(r"MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"))
    sizes = [int(total.group(1)) * 1024] if total else [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(root / limit)
        sizes += [int(text)] if text.isdecimal() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdecimal() and quota[1].isdecimal() and int(quota[1]):
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    memory = min(sizes) / GIB
    return Hardware("cpu", platform.machine(), memory, 0, "", memory, cores)


def _properties(path: Path) -> dict[str, str]:
    """Lines of a name and a value."""
    pairs = (line.split(maxsplit=1) for line in _read(path).splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _read(path: Path) -> str:
    """The text of a file of the kernel's, or nothing: which of them there are differs from container to container."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _version(text: str) -> tuple[int, ...]:
    """Numbers in a version, to compare by."""
    return tuple(int(part) for part in re.findall(r"\d+", text))
