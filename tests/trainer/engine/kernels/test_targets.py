"""The Triton kernels on accelerators that are not here: compiled for each, and computed in Triton's interpreter."""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.targets.limits import TARGETS, Usage, fault

ROOT = Path(__file__).resolve().parents[4]
TRAINED_ON = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"}
WITHOUT_FP8 = {"sm_80", "sm_86"}
KERNEL = re.compile(r"@triton\.jit\ndef _(\w+)\(.*?(?=\n@|\n#|\ndef |\Z)", re.S)
# Kernels that write FP8, and so have no work where there is none.
OF_FP8 = {"append_adapter_columns", "norm_rows", "gelu_rows", "swiglu_rows"}
# Relative errors: bf16 rounds a number by at most 2**-8, on average by 0.17 %; FP8 by 2**-4, on average by 2.6 %.
# A term in adapter columns is a little less precise than bf16.
ALLOWED_16_BITS, ALLOWED_8_BITS, ALLOWED_COLUMNS = 3e-3, 0.03, 8e-3


def run_python(*arguments, **variables):
    """What the command prints, as rows of JSON; its exit code and errors."""
    if importlib.util.find_spec("triton") is None:
        message = (
            "NOT COMPILED, NOT COMPUTED: triton is not installed; `make test` installs it from requirements-dev.lock"
        )
        if (sys.platform, platform.machine()) == ("linux", "x86_64"):
            pytest.fail(message)
        pytest.skip(f"{message}, and there is none for {sys.platform} on {platform.machine()}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment | variables, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return rows, done.returncode, done.stderr


def all_kernels():
    """The kernels that are launched: the others are parts of these and do not ask which program they are."""
    found = set()
    for file in (ROOT / "trainer").rglob("*.py"):
        for match in KERNEL.finditer(file.read_text()):
            if "tl.program_id" in match[0]:
                found.add(match[1])
    return found


def check(rows, code, errors):
    assert rows, errors[-3000:]
    assert code == 0, [row["fault"] for row in rows if "fault" in row]
    compiled = {target: {row["kernel"] for row in rows if row["target"] == target} for target in TRAINED_ON}
    for target, kernels in compiled.items():
        assert kernels == (all_kernels() - OF_FP8 if target in WITHOUT_FP8 else all_kernels()), target
    assert all(row["spills"] <= TARGETS[row["target"]].spills and row["registers"] > 0 for row in rows)


@pytest.mark.timeout(600)
def test_each_kernel_compiles_for_each_target_and_fits_it():
    assert set(TARGETS) == TRAINED_ON and len(all_kernels()) == 16
    check(*run_python("-m", "bench", "targets"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_kernel_compiles_with_all_constants_of_every_model():
    rows, code, errors = run_python("-m", "bench", "targets", "--all")
    check(rows, code, errors)
    assert sum(row["launches"] for row in rows) > 500


def test_in_the_interpreter_each_kernel_computes_what_float64_does():
    rows, code, errors = run_python("-m", "tests.support.interpreted_kernels", TRITON_INTERPRET="1")
    assert code == 0, errors[-3000:]
    (errors_of,) = rows
    for name, error in errors_of.items():
        if "8 bits" in name:
            allowed = ALLOWED_8_BITS
        elif "append_adapter_columns" in name:
            allowed = ALLOWED_COLUMNS
        elif any(part in name for part in ("16 bits", "gradient", "rotate: q", "rotate: k", "residual")):
            allowed = 0 if name.endswith((": rows", ": left")) else ALLOWED_16_BITS
        else:
            allowed = 0
        assert error <= allowed, (name, error)
    for kernel in all_kernels():
        assert any(kernel in name for name in errors_of), kernel


def check_blocks(rows, code, errors, count):
    """Fused blocks on the kernels are as far from full precision as on plain torch: FP8 is what both have."""
    assert code == 0 and len(rows) == count, errors[-3000:]
    for row in rows:
        assert row["other_gradients"] == 0, row
        assert row["kernels"]["output"] < 0.5 * row["plain"]["output"], row
        assert row["kernels"]["median"] < 0.8 * row["plain"]["median"] < 0.2, row
        assert row["ours"]["median"] < 1.3 * row["plain"]["median"], row
        assert row["ours"]["most"] < 2 * row["plain"]["most"] < 1, row


@pytest.mark.timeout(600)
@pytest.mark.parametrize("base", ["flux2-klein-4b", "krea2", "qwen-image"])
def test_in_the_interpreter_fused_blocks_of_captions_of_other_lengths_compute_what_plain_torch_does(base):
    arguments = ("-m", "tests.support.interpreted_blocks", base, "--case", "three images, one with one token")
    check_blocks(*run_python(*arguments, TRITON_INTERPRET="1"), count=1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("base", ["flux2-klein-4b", "krea2", "qwen-image"])
def test_in_the_interpreter_fused_blocks_compute_what_plain_torch_does(base):
    found = run_python("-m", "tests.support.interpreted_blocks", base, TRITON_INTERPRET="1")
    check_blocks(*found, count=7)


@pytest.mark.parametrize(
    ("usage", "words"),
    [
        (Usage(256, 64, 0, 99 * 1024), None),
        (Usage(256, 64, 0, 99 * 1024 + 1), "shared memory"),
        (Usage(2048, 16, 0, 0), "2048 threads"),
        (Usage(1024, 65, 0, 0), "in all"),
        (Usage(32, 256, 0, 0), "256 registers a thread"),
        (Usage(32, 64, 1, 0), "1 spilled"),
    ],
)
def test_what_a_target_has_not_is_a_fault(usage, words):
    found = fault(TARGETS["sm_86"], usage)
    assert (words in found) if words else found is None
