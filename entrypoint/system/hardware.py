"""Detects the accelerators of this container, without torch, which takes seconds to import.

NVIDIA's are asked for with nvidia-smi, AMD's are read from the kernel's topology under /sys. Besides
`trainer.spec.weight_formats`, this is the only module that names vendors.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrypoint.settings.variables.engine import BACKENDS, FORMATS
from entrypoint.system.environment import VISIBLE, child_environment
from trainer.spec.errors import SettingsError, UnreachableError
from trainer.spec.weight_formats import PRECISIONS, supported_formats

HOST_SHARE = "KILN_HOST_SHARE"  # how many jobs of a queue share this host (entrypoint.queue.run)
GIB = 2**30

# Precisions by speed (`python -m bench step`, docs/performance.md). Those that lose more than rounding come last. On
# AMD, FP8 has not been measured, so bf16 comes first.
_FASTEST = ("fp8", "bf16", "fp16", "int8", "int8-storage", "fp8-storage", "nf4")
_FASTEST_AMD = ("bf16", "fp8", "int8-storage", "fp8-storage", "nf4")
FIELDS = ("index", "compute_cap", "memory.total", "driver_version", "name")
QUERY = ("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits")
TOPOLOGY = ("nvidia-smi", "topo", "-p2p", "r")
DEVICE_FILES = ("/dev/nvidia*", "/dev/kfd", "/dev/dri/renderD*")  # what a program must be able to open
QUERY_TIMEOUT_S = 30.0  # without persistence mode the driver takes seconds to wake up
TORCH_BUILDS = {"nvidia": "cuda", "amd": "hip"}  # vendor → the attribute of torch.version that a build for it sets
# Major version of CUDA → the first driver that runs builds for all its minor versions (NVIDIA, "CUDA Compatibility").
MIN_DRIVERS = {12: 525, 13: 580}
# The architectures that torch's kernels are built for. torch.cuda.get_arch_list() gives the same, if a device answers.
PRINT_KERNELS = "import torch._C; print(torch._C._cuda_getArchFlags() or '')"
KERNELS_TIMEOUT_S = 60.0
# Those of the torch in our images (CUDA 13 and ROCm 7), for cards that are planned for on a machine with another torch.
IMAGE_KERNELS = (
    *("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"),
    *("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"),
)
_VIDEO_MEMORY = {"1", "2"}  # heap types of the kernel's topology: frame buffer visible to the CPU, and private


@dataclass(frozen=True)
class Hardware:
    """The devices that a job can train on. Tests make these up."""

    vendor: str  # a value of BACKENDS
    architecture: str  # compute capability (9.0), gfx name (gfx942), or the machine's type (x86_64)
    memory_gib: float  # of one device, the smallest if they differ; the host's where there is no accelerator
    count: int  # devices
    driver: str
    host_memory_gib: float
    cpu_count: int
    name: str = ""  # of the devices, as their driver has it; "" where it does not say, or they differ
    # How many, from the first on, read each other's memory. None: all, or it is not known, and the trainer tries.
    reading_each_other: int | None = None

    @property
    def device(self) -> str:
        """The torch device type, which is the same for both vendors of accelerators."""
        return "cpu" if self.vendor == "cpu" else "cuda"

    @property
    def backend(self) -> str:
        """The value of BACKEND that selects this hardware."""
        return next(name for name, vendor in BACKENDS.items() if vendor == self.vendor)

    @property
    def formats(self) -> tuple[str, ...]:
        """The values of PARAMS_PRECISION that this hardware supports, the fastest first."""
        if self.vendor == "cpu":
            return FORMATS
        if self.vendor == "nvidia":
            supported = supported_formats(nvidia=_version(self.architecture))
            by_speed: tuple[str, ...] = _FASTEST
        else:
            supported = supported_formats(amd=self.architecture)
            by_speed = _FASTEST_AMD
        measured = [name for name in by_speed if name in supported]
        others = [name for name in supported if name not in by_speed]
        return (*measured, *others)

    @property
    def auto_precisions(self) -> tuple[str, ...]:
        """The candidates for PARAMS_PRECISION=auto: the fastest; if that is too large, 8 bits; and last, 4 bits."""
        if self.vendor == "cpu":
            return self.formats[:1]
        candidates = [self.formats[0]]
        for name in self.formats:
            if PRECISIONS[name].bytes == 1:
                candidates.append(name)
                break
        if "nf4" in self.formats:
            candidates.append("nf4")
        return tuple(dict.fromkeys(candidates))

    @property
    def unquantized_precision(self) -> str:
        """The precision without quantised weights, for models that are too small to gain from quantisation."""
        return next(name for name in self.formats if name in ("bf16", "fp32"))

    @property
    def can_capture(self) -> bool:
        """Whether steps are captured as CUDA graphs (trainer.engine.cuda_graphs). Not tried on AMD."""
        return self.vendor == "nvidia"

    @property
    def runs_flash_4(self) -> bool:
        """Whether FlashAttention 4 (trainer.engine.attention.flash_attention_4) has kernels for both passes."""
        return self.vendor == "nvidia" and _version(self.architecture)[0] >= 9

    @property
    def fastest_attention(self) -> str:
        """The fastest PARAMS_ATTENTION that was measured: compute capability 9 only. "native": torch picks a kernel."""
        return "flash_4" if self.runs_flash_4 and _version(self.architecture)[0] == 9 else "native"

    def reach_each_other(self, count: int) -> bool:
        """Whether the first `count` devices read each other's memory, as far as their driver says."""
        return self.reading_each_other is None or count <= self.reading_each_other

    def activation_dtype(self, precision: str) -> str:
        """torch's name of the type of activations for this precision."""
        fixed = PRECISIONS[precision].dtype
        if fixed is not None:
            return fixed
        return "bfloat16" if self.vendor == "cpu" or "bf16" in self.formats else "float16"

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
    """The accelerators of this container; without any, its CPU. `root`: the folder of /proc, /sys and /dev.

    Raises UnreachableError if a driver is there but does not answer.
    """
    variables = os.environ if environ is None else environ
    visible = {name: variables.get(name) for name in VISIBLE}
    host = _host(root)
    nvidia = _nvidia(host, run=run, visible=visible["CUDA_VISIBLE_DEVICES"])
    if nvidia:
        return nvidia
    # AMD's runtime reads several such variables; the first that is set counts.
    return _amd(host, root=root, visible=next(filter(None, visible.values()), None)) or host


def select(detected: Hardware, backend: str) -> Hardware:
    """The hardware that BACKEND asks for, of what was found. Raises SettingsError if it is not there."""
    vendor = detected.vendor if backend == "auto" else BACKENDS[backend]
    if vendor == detected.vendor:
        return detected
    if vendor == "cpu":
        return dataclasses.replace(
            detected, vendor="cpu", architecture="host", memory_gib=detected.host_memory_gib, count=0, driver=""
        )
    raise SettingsError(
        f"BACKEND={backend!r}: this device was not found, only {detected}. Fix: give the container its GPUs "
        f"(for example docker run --gpus all, or --device /dev/kfd --device /dev/dri), or set BACKEND=auto."
    )


def torch_version() -> dict[str, Any]:
    """The contents of torch.version, read without importing torch; empty if torch is not installed."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return runpy.run_path(str(file)) if file and file.is_file() else {}


def check_torch(detected: Hardware, version: Mapping[str, Any]) -> None:
    """Raises SettingsError if torch is not built for this hardware, or the driver is too old for it.

    torch itself would only find no device, after everything has been downloaded.
    """
    if detected.vendor == "cpu" or not version:
        return
    built = version.get(TORCH_BUILDS[detected.vendor])
    if not built:
        raise SettingsError(
            f"torch {version.get('__version__')} is not built for {detected}. Fix: take the image for "
            f"{detected.backend} (its name ends in -{detected.backend}), or set BACKEND=cpu."
        )
    needed = MIN_DRIVERS.get(_version(built)[0]) if detected.vendor == "nvidia" else None
    if needed and _version(detected.driver) and _version(detected.driver)[0] < needed:
        raise SettingsError(
            f"The driver {detected.driver} of this machine is too old for torch {version['__version__']}, which needs "
            f"{needed} or newer. Fix: update the driver, or rent a machine with CUDA {built} or newer."
        )


class TorchKernels:
    """Asks torch in a process of its own which architectures its kernels are built for: the import takes seconds."""

    def __init__(self) -> None:
        environment = child_environment(os.environ)
        self._process = subprocess.Popen(  # noqa: S603 (our own interpreter)
            (sys.executable, "-c", PRINT_KERNELS),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def names(self) -> tuple[str, ...]:
        """Such as sm_90, compute_120 or gfx942. Waits for the answer; () where torch does not say."""
        try:
            printed, _ = self._process.communicate(timeout=KERNELS_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.stop()
            return ()
        return tuple(printed.split()) if self._process.returncode == 0 else ()

    def stop(self) -> None:
        """End the process, if it still runs."""
        self._process.kill()
        self._process.wait()


def check_kernels(detected: Hardware, kernels: Sequence[str]) -> None:
    """Raises SettingsError if none of torch's `kernels` runs on this hardware; () counts as unknown.

    Machine code (sm_XY) runs on its own major version, from its own minor version on; a name that ends in a letter, on
    exactly its version. PTX (compute_XY) runs on all that are newer (NVIDIA, CUDA programming guide, "Compute
    capabilities").
    """
    if detected.vendor == "cpu" or not kernels:
        return
    if detected.vendor == "amd":
        if detected.architecture in kernels:
            return
        built = ", ".join(name for name in kernels if name.startswith("gfx"))
    else:
        have = _version(detected.architecture)[:2]
        versions: list[tuple[int, int]] = []
        for kernel in kernels:
            match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", kernel)
            if match is None:
                continue
            version = (int(match[2]), int(match[3]))
            versions.append(version)
            if match[1] == "compute":
                runs = have >= version
            elif match[4]:
                runs = have == version
            else:
                runs = have[0] == version[0] and have[1] >= version[1]
            if runs:
                return
        built = ", ".join(f"{major}.{minor}" for major, minor in sorted(set(versions)))
    what = "compute capability" if detected.vendor == "nvidia" else "architecture"
    raise SettingsError(
        f"This torch has no kernels for {detected}: it is built for {what} {built}. Fix: take a card of one of these, "
        "or install a build of torch for this card."
    )


def _nvidia(
    host: Hardware, *, run: Callable[..., subprocess.CompletedProcess[str]], visible: str | None
) -> Hardware | None:
    """The GPUs that nvidia-smi lists, as far as CUDA_VISIBLE_DEVICES (`visible`) leaves them."""
    try:
        environment = child_environment(os.environ)
        answer = run(QUERY, env=environment, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False)
    except OSError:  # not installed
        return None
    except subprocess.TimeoutExpired as problem:
        raise UnreachableError(
            f"nvidia-smi did not answer in {QUERY_TIMEOUT_S:.0f} s: the driver is stuck."
        ) from problem
    rows: list[list[str]] = []
    if answer.returncode == 0:
        for line in answer.stdout.splitlines():
            cells = [cell.strip() for cell in line.split(",")]
            if len(cells) == len(FIELDS):
                rows.append(cells)
    rows = _visible(rows, visible)
    if not rows:
        return None
    memory_gib: list[float] = []
    for row in rows:
        if row[2].replace(".", "").isdecimal():
            memory_gib.append(float(row[2]) / 1024)
        else:
            memory_gib.append(host.host_memory_gib)  # a GPU that shares the host's memory prints [N/A]
    return dataclasses.replace(
        host,
        vendor="nvidia",
        architecture=min((row[1] for row in rows), key=_version),
        memory_gib=min(memory_gib),
        count=len(rows),
        driver=rows[0][3],
        name=rows[0][4] if len({row[4] for row in rows}) == 1 else "",
        reading_each_other=_reading_each_other([row[0] for row in rows], run) if len(rows) > 1 else None,
    )


def _reading_each_other(indices: Sequence[str], run: Callable[..., subprocess.CompletedProcess[str]]) -> int | None:
    """How many of these GPUs, from the first on, read each other's memory by nvidia-smi; None: all, or it does not say.

    It prints a matrix: a line for each GPU, with X for itself and OK, or why not (NS, CNS, GNS, TNS), for the others.
    """
    try:
        environment = child_environment(os.environ)
        answer = run(TOPOLOGY, env=environment, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = [f"GPU{index}" for index in indices]
    columns: list[str] = []
    cells_of: dict[str, dict[str, str]] = {}
    for line in answer.stdout.splitlines() if answer.returncode == 0 else ():
        # In terminals, the names are underlined.
        cells = re.sub(r"\x1b\[[0-9;]*m", "", line).split()
        if not columns and cells[:1] == ["GPU0"]:
            columns = cells
        elif columns and cells[:1]:
            cells_of[cells[0]] = dict(zip(columns, cells[1:], strict=False))
    for count, name in enumerate(names):
        for other in names[:count]:
            both_ways = (cells_of.get(name, {}).get(other, "OK"), cells_of.get(other, {}).get(name, "OK"))
            if both_ways != ("OK", "OK"):
                return count
    return None


def _visible(rows: list[list[str]], visible: str | None) -> list[list[str]]:
    """The devices (first cell: the index) that the variable leaves visible; None: all.

    It has a list of indices, which ends at the first impossible one, or of names. Of names only the number counts.
    """
    if visible is None:
        return rows
    names = [name.strip() for name in visible.split(",")]
    if not all(name.lstrip("-").isdecimal() for name in names):
        return rows[: len([name for name in names if name])]
    wanted: list[list[str]] = []
    for name in names:
        wanted += [row for row in rows if row[0] == name]
    return wanted if "-1" not in names else wanted[: names.index("-1")]


def _amd(host: Hardware, *, root: Path, visible: str | None) -> Hardware | None:
    """The GPUs of the kernel's topology. Without /dev/kfd they belong to the host, not to this container."""
    if not (root / "dev/kfd").exists():
        return None
    devices: list[tuple[str, float]] = []  # gfx name, GiB
    for node in sorted((root / "sys/class/kfd/kfd/topology/nodes").glob("*")):
        properties = _properties(node / "properties")
        if not int(properties.get("simd_count", 0)) or not int(properties.get("gfx_target_version", 0)):
            continue  # a CPU
        size = 0
        for path in node.glob("mem_banks/*/properties"):
            bank = _properties(path)
            if bank.get("heap_type") in _VIDEO_MEMORY:
                size += int(bank.get("size_in_bytes", 0))
        devices.append((_gfx(int(properties["gfx_target_version"])), size / GIB))
    indices = [[str(index)] for index in range(len(devices))]
    devices = [devices[int(index)] for (index,) in _visible(indices, visible)]
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
    """90402 → gfx942: two decimal digits for major, minor and stepping, the last two in hexadecimal."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _host(root: Path) -> Hardware:
    """The CPU and its memory, within the limits of the container's control group (v2 or v1)."""
    total = re.search(r"MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"))
    physical = int(total.group(1)) * 1024 if total else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes = [physical]
    for limit in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(root / limit)
        if text.isdecimal():  # else "max", or no such file
            sizes.append(int(text))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read(root / "sys/fs/cgroup/cpu.max").split()  # microseconds of CPU time in each period, or "max"; period
    if len(quota) == 2 and quota[0].isdecimal() and quota[1].isdecimal() and int(quota[1]):
        cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    share = os.environ.get(HOST_SHARE, "")
    jobs = int(share) if share.isdecimal() and int(share) else 1
    memory_gib = min(sizes) / GIB / jobs
    cores = max(1, cores // jobs)
    return Hardware("cpu", platform.machine(), memory_gib, 0, "", memory_gib, cores)


def _properties(path: Path) -> dict[str, str]:
    """A file of the topology: lines with a name and a value each."""
    values: dict[str, str] = {}
    for line in _read(path).splitlines():
        pair = line.split(maxsplit=1)
        if len(pair) == 2:
            values[pair[0]] = pair[1]
    return values


def _read(path: Path) -> str:
    """The text of one of the kernel's files; "" if this container does not have it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _version(text: str) -> tuple[int, ...]:
    """The numbers in a version, for comparisons: "9.0" → (9, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", text))
