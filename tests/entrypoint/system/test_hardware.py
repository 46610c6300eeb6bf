"""What is found on made-up machines, and what BACKEND makes of it."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from entrypoint.settings.variables.engine import BACKENDS, FORMATS
from entrypoint.system.hardware import Hardware, TorchKernels, check_kernels, check_torch, detect, select, torch_version
from trainer.spec.errors import SettingsError, UnreachableError
from trainer.spec.weight_formats import PRECISIONS

ROOT = Path(__file__).resolve().parents[3]
CPU = Hardware("cpu", "x86_64", 32.0, 0, "", 32.0, 8)
NVIDIA = Hardware("nvidia", "9.0", 80.0, 2, "550.1", 500.0, 32)
AMD = Hardware("amd", "gfx942", 192.0, 8, "6.8", 1500.0, 96)


def answering(text: str, code: int = 0) -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda command, **_: subprocess.CompletedProcess(command, code, text, "")


def missing(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
    raise FileNotFoundError("nvidia-smi")


@pytest.fixture
def root(tmp_path) -> Path:
    """A machine with 64 GiB and no accelerator."""
    write(tmp_path, "proc/meminfo", "MemFree: 1 kB\nMemTotal:       67108864 kB\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def nodes(root: Path, *, version: int = 90402, gpus: int = 2) -> None:
    """The kernel's topology: a CPU and GPUs with 192 GiB each."""
    write(root, "dev/kfd", "")
    base = "sys/class/kfd/kfd/topology/nodes"
    write(root, f"{base}/0/properties", "cpu_cores_count 96\nsimd_count 0\ngfx_target_version 0\n")
    for i in range(1, gpus + 1):
        write(root, f"{base}/{i}/properties", f"cpu_cores_count 0\nsimd_count 1216\ngfx_target_version {version}\n")
        write(root, f"{base}/{i}/mem_banks/0/properties", f"heap_type 1\nsize_in_bytes {192 * 2**30}\n")
        write(root, f"{base}/{i}/mem_banks/1/properties", f"heap_type 4\nsize_in_bytes {2**40}\n")


QUERIED = "0, 9.0, 143771, 580.1, H200\n1, 9.0, 143771, 580.1, H200\n2, 9.0, 143771, 580.1, H200\n"
# As the driver prints it in a terminal, with the header underlined.
MATRIX = (
    " \t\x1b[4mGPU0\tGPU1\tGPU2\t\x1b[0m\n GPU0\tX\tOK\t{0}\t\n GPU1\tOK\tX\t{1}\t\n GPU2\t{0}\t{1}\tX\t\n"
    "\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n  NS   = Not supported\n"
)


@pytest.mark.parametrize(
    ("printed", "visible", "reach"),
    [
        (MATRIX.format("OK", "OK"), None, 3),
        (MATRIX.format("NS", "NS"), None, 2),  # GPU0 and GPU1 reach each other, and GPU2 is apart
        (MATRIX.format("OK", "CNS"), None, 2),
        (MATRIX.format("NS", "NS"), "2,0,1", 1),  # the first two that the job takes do not
        (MATRIX.format("OK", "CNS"), "0,2,1", 2),
        (MATRIX.format("OK", "CNS"), "0,1", 2),  # of those that the job sees
        (MATRIX.format("OK", "CNS"), "1,2", 1),
        (MATRIX.format("NS", "NS"), "2", 1),  # one alone
        ("Failed to query\n", None, 3),  # nobody knows: the trainer tries
        ("", None, 3),
    ],
)
def test_whether_gpus_read_each_others_memory_is_what_their_driver_says(root, printed, visible, reach):
    def run(command, **_):
        text = QUERIED if "topo" not in command else printed
        return subprocess.CompletedProcess(command, 0, text, "")

    environ = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    found = detect(run=run, root=root, environ=environ)
    for count in range(1, found.count + 1):
        assert found.reach_each_other(count) == (count <= reach)

    def without_topology(command, **options):
        if "topo" in command:
            raise subprocess.TimeoutExpired(command, 30)
        return run(command, **options)

    assert detect(run=without_topology, root=root, environ=environ).reach_each_other(3)


def test_without_an_accelerator_there_is_the_cpu(root):
    found = detect(run=missing, root=root, environ={})
    assert (found.vendor, found.memory_gib, found.host_memory_gib, found.count) == ("cpu", 64.0, 64.0, 0)
    assert found.cpu_count >= 1 and found.device == "cpu"


def test_a_container_has_no_more_memory_and_cores_than_it_may_use(root):
    write(root, "sys/fs/cgroup/memory.max", str(8 * 2**30))
    write(root, "sys/fs/cgroup/cpu.max", "100000 100000")
    found = detect(run=missing, root=root, environ={})
    assert (found.memory_gib, found.cpu_count) == (8.0, 1)


def test_the_smallest_of_several_gpus_counts(root):
    text = "0, 9.0, 81559, 550.54.15, NVIDIA H100\n1, 8.0, 40960, 550.54.15, NVIDIA A100\n"
    found = detect(run=answering(text), root=root, environ={})
    assert (found.vendor, found.architecture, found.memory_gib) == ("nvidia", "8.0", 40.0)
    assert (found.count, found.driver, found.host_memory_gib, found.device) == (2, "550.54.15", 64.0, "cuda")
    assert found.name == ""  # two kinds have no name in common


def test_gpus_of_one_kind_have_its_name(root):
    run = answering("0, 8.9, 24564, 580.1, NVIDIA GeForce RTX 4090\n1, 8.9, 24564, 580.1, NVIDIA GeForce RTX 4090\n")
    assert detect(run=run, root=root, environ={}).name == "NVIDIA GeForce RTX 4090"


def test_architectures_are_compared_as_numbers(root):
    text = "0, 12.0, 32607, 580.1, NVIDIA GeForce RTX 5090\n1, 9.0, 32607, 580.1, NVIDIA H100\n"
    assert detect(run=answering(text), root=root, environ={}).architecture == "9.0"


def test_a_gpu_that_shares_the_hosts_memory_has_as_much(root):
    found = detect(run=answering("0, 12.1, [N/A], 580.1, NVIDIA GB10\n"), root=root, environ={})
    assert (found.vendor, found.memory_gib) == ("nvidia", 64.0)


@pytest.mark.parametrize(
    ("visible", "count"), [("0", 1), ("1,0", 2), ("", 0), ("-1", 0), ("0,-1,1", 1), ("7", 0), ("GPU-a", 1)]
)
def test_hidden_gpus_do_not_count(root, visible, count):
    run = answering("0, 9.0, 81559, 550.1, NVIDIA H100 80GB HBM3\n1, 9.0, 81559, 550.1, NVIDIA H100 80GB HBM3\n")
    assert detect(run=run, root=root, environ={"CUDA_VISIBLE_DEVICES": visible}).count == count


@pytest.mark.parametrize(
    ("visible", "count"), [({"HIP_VISIBLE_DEVICES": "1"}, 1), ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2), ({}, 2)]
)
def test_hidden_gpus_of_the_other_vendor_do_not_count(root, visible, count):
    nodes(root)
    assert detect(run=missing, root=root, environ=visible).count == count


@pytest.mark.parametrize(
    "answer", [answering("No devices were found\n", 6), answering(""), answering("what?\n"), missing]
)
def test_a_driver_without_gpus_is_none(root, answer):
    assert detect(run=answer, root=root, environ={}).vendor == "cpu"


def test_a_driver_that_hangs_is_worth_another_try(root):
    def hanging(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, 1)

    with pytest.raises(UnreachableError):
        detect(run=hanging, root=root, environ={})


@pytest.mark.parametrize(
    ("version", "name"), [(90402, "gfx942"), (90010, "gfx90a"), (90500, "gfx950"), (110000, "gfx1100")]
)
def test_the_kernel_tells_of_the_other_vendors_gpus(root, version, name):
    nodes(root, version=version)
    found = detect(run=missing, root=root, environ={})
    assert (found.vendor, found.architecture, found.memory_gib, found.count) == ("amd", name, 192.0, 2)
    assert found.device == "cuda"


def test_gpus_of_the_host_that_the_container_was_not_given_do_not_count(root):
    nodes(root)
    (root / "dev/kfd").unlink()
    assert detect(run=missing, root=root, environ={}).vendor == "cpu"


@pytest.mark.parametrize("found", [CPU, NVIDIA, AMD])
def test_auto_takes_what_there_is(found):
    assert select(found, "auto") == found == select(found, found.backend)


@pytest.mark.parametrize(("found", "backend"), [(CPU, "cuda"), (CPU, "rocm"), (NVIDIA, "rocm"), (AMD, "cuda")])
def test_a_backend_that_is_not_there_is_refused(found, backend):
    with pytest.raises(SettingsError, match=f"BACKEND='{backend}'"):
        select(found, backend)


@pytest.mark.parametrize("found", [CPU, NVIDIA, AMD])
def test_the_cpu_is_always_there(found):
    assert select(found, "cpu").device == "cpu" and select(found, "cpu").memory_gib == found.host_memory_gib


def test_the_formats_are_those_that_the_trainer_has():
    assert set(FORMATS) == PRECISIONS.keys()
    assert all(set(hardware.formats) <= set(FORMATS) for hardware in (CPU, NVIDIA, AMD))


def test_every_backend_has_a_vendor_of_its_own():
    assert len(set(BACKENDS.values())) == len(BACKENDS)


@pytest.mark.parametrize(
    ("vendor", "architecture", "first"),
    [
        ("cpu", "x86_64", "fp32"),
        ("nvidia", "9.0", "fp8"),
        ("nvidia", "8.9", "fp8"),
        ("nvidia", "8.0", "bf16"),
        ("nvidia", "12.0", "fp8"),
        ("nvidia", "7.5", "fp16"),
        ("nvidia", "7.0", "fp32"),
        ("amd", "gfx942", "bf16"),
    ],
)
def test_the_first_format_is_the_best(vendor, architecture, first):
    assert Hardware(vendor, architecture, 16.0, 1, "", 32.0, 8).formats[0] == first


def torch_for(**version: str | None) -> dict[str, str | None]:
    return {"__version__": "2.13.0", "cuda": None, "hip": None, **version}


@pytest.mark.parametrize(
    ("found", "version", "hint"),
    [
        (NVIDIA, torch_for(cuda="13.0"), "driver 550.1 .* needs 580 or newer.*rent a machine with CUDA 13.0"),
        (NVIDIA, torch_for(), "image for cuda"),
        (NVIDIA, torch_for(hip="7.14"), "ends in -cuda"),
        (AMD, torch_for(cuda="13.0"), "ends in -rocm"),
    ],
)
def test_a_torch_that_would_see_no_device_is_refused(found, version, hint):
    with pytest.raises(SettingsError, match=hint):
        check_torch(found, version)


@pytest.mark.parametrize(
    ("found", "version"),
    [
        (NVIDIA, torch_for(cuda="12.8")),
        (dataclasses.replace(NVIDIA, driver="580.65.06"), torch_for(cuda="13.2")),
        (AMD, torch_for(hip="7.14")),
        (CPU, torch_for()),
    ],
)
def test_a_torch_that_fits_is_not(found, version):
    check_torch(found, version)


def test_torchs_version_is_read_without_importing_it():
    code = "import sys; from entrypoint.system.hardware import torch_version; print(torch_version()['__version__'])"
    code += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == torch_version()["__version__"], done.stderr
    assert {"cuda", "hip"} <= torch_version().keys()


def test_a_job_asks_before_it_fetches_anything(tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '0, 9.0, 81559, 550.54.15, NVIDIA H100 80GB HBM3'\n")
    smi.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "BASE_MODEL": "flux", "DATASET_NAME": "org/pictures"}
    environment |= {name: str(tmp_path / name) for name in ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME")}
    code = "import sys; from entrypoint import __main__ as m\nfrom entrypoint.system import hardware\n"
    code += "hardware.torch_version = lambda: {'__version__': '2.13.0', 'cuda': '13.0'}\nsys.exit(m.main(['check']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 78 and "needs 580 or newer" in done.stderr, done.stderr


# ---- kernels

BUILT = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"])
def test_machine_code_runs_on_its_own_major_version(capability):
    check_kernels(Hardware("nvidia", capability, 24.0, 1, "580", 64.0, 8), BUILT)


@pytest.mark.parametrize(
    ("capability", "kernels"),
    [
        ("6.1", BUILT),
        ("7.0", BUILT),
        ("11.0", BUILT),
        ("12.0", ("sm_50", "sm_80", "sm_90")),  # a build for CUDA 12.6 on a card that is newer
        ("9.1", ("sm_90a",)),
        ("8.6", ("compute_90",)),
    ],
)
def test_a_card_that_torch_has_no_kernels_for_is_refused(capability, kernels):
    with pytest.raises(SettingsError, match=f"no kernels for 1 × nvidia {re.escape(capability)}"):
        check_kernels(Hardware("nvidia", capability, 24.0, 1, "580", 64.0, 8), kernels)


def test_ptx_runs_on_newer_cards():
    check_kernels(Hardware("nvidia", "12.0", 24.0, 1, "580", 64.0, 8), ("sm_80", "compute_90"))


def test_other_vendors_need_their_own_architecture():
    card = Hardware("amd", "gfx942", 192.0, 1, "6", 512.0, 64)
    check_kernels(card, ("gfx90a", "gfx942"))
    with pytest.raises(SettingsError, match="built for architecture gfx90a, gfx1100"):
        check_kernels(card, ("gfx90a", "gfx1100"))


def test_kernels_that_torch_does_not_name_refuse_nothing():
    """This machine's torch may be built without a GPU: then the real question gets no answer, or names."""
    kernels = TorchKernels().names()
    assert all(name.startswith(("sm_", "compute_", "gfx")) for name in kernels)
    check_kernels(Hardware("nvidia", "3.0", 2.0, 1, "580", 8.0, 2), ())
