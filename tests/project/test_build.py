"""build.sh with an engine that only records how it is called."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("torch.lock", "requirements.lock")
TORCH = next(line.split()[0] for line in (ROOT / "torch.lock").read_text().splitlines() if line.startswith("torch=="))


@pytest.fixture
def build(tmp_path):
    """`build(*arguments, free_gib=100, engine=True, **environment)`: exit code, output, calls of the engine."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "awk", "dirname", "head", "git", "sed"):
        if path := shutil.which(name):
            (tools / name).symlink_to(path)

    def start(*arguments, free_gib=100, engine=True, base=True, **environment):
        script(tools / "df", f"printf 'Filesystem 1024-blocks Used Available\\nx 1 1 {free_gib * 2**20}\\n'")
        if engine:
            stub = f'echo "$@" >> {tmp_path}/calls; case $1 in info) echo {tmp_path};; images) echo "1.5 GB";; '
            stub += "" if base else "inspect | pull) exit 125 ;; "
            stub += "esac"
            script(tools / "buildah", stub)
        done = subprocess.run(
            [str(ROOT / "build.sh"), *arguments],
            env={"PATH": str(tools), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        calls = tmp_path / "calls"
        return done.returncode, done.stdout, calls.read_text() if calls.exists() else ""

    return start


def script(path, text):
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(0o755)


def test_the_cpu_variant_comes_from_the_same_file(build):
    code, printed, calls = build("cpu", "--tag", "place:5000/kiln", "--platform", "linux/amd64", "--push")
    assert code == 0, printed
    assert (
        "--file Dockerfile.cuda" in calls
        and "--tag place:5000/kiln:0.1.0-cpu" in calls
        and "--platform linux/amd64" in calls
    )
    assert f"--build-arg TORCH={TORCH} --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu" in calls
    assert "push place:5000/kiln:0.1.0-cpu" in calls
    assert "1.5 GB" in printed and "--secret" not in calls


def test_cuda_is_the_default_and_the_environment_is_handed_on(build):
    code, printed, calls = build(BASE_IMAGE="base@sha256:0", PIP_CONF_SECRET="/x", BUILD_OPTIONS="--network host")
    assert code == 0, printed
    assert "--tag kiln:0.1.0-cuda" in calls and "BASE_IMAGE=base@sha256:0" in calls and "TORCH" not in calls
    assert "--secret id=pipconf,src=/x" in calls and "--network host" in calls and "push" not in calls


def test_another_build_of_torch_has_the_version_of_the_lock(build):
    code, printed, calls = build("cuda", TORCH_INDEX="https://place/cu128")
    assert code == 0 and f"--build-arg TORCH={TORCH} --build-arg TORCH_INDEX=https://place/cu128" in calls, printed


def test_what_the_image_installs_is_locked_with_hashes():
    """torch, its libraries for CUDA and its compiler in a lock of their own, all else in the other."""
    locks = {name: re.split(r"^(?=\S)", (ROOT / name).read_text(), flags=re.M)[1:] for name in LOCKS}
    for parts in locks.values():
        assert all(re.match(r"[\w.-]+==\S+ .*\\\n    --hash=sha256:[0-9a-f]{64}", part) for part in parts)
    torch, others = ({part.partition("==")[0] for part in locks[name]} for name in LOCKS)
    assert {"torch", "triton", "nvidia-cublas", "nvidia-cudnn-cu13"} <= torch and not torch & others
    assert all(re.match("torch$|triton$|nvidia-|cuda-", name) for name in torch)
    assert f"\nTORCH := {TORCH}\n" in (ROOT / "Makefile").read_text()


def test_tests_compile_with_the_triton_that_the_image_has():
    """Kernels are compiled for cards that are not there by the same compiler that compiles them on cards."""
    of_image, of_tests = (
        re.search(r"^triton==(\S+) ; (.*?) \\\n(( +--hash=sha256:\w+.*\n?)+)", (ROOT / name).read_text(), re.M)
        for name in ("torch.lock", "requirements-dev.lock")
    )
    assert of_image[1] == of_tests[1] and of_image[3].split() == of_tests[3].split()
    assert (
        "sys_platform == 'linux'" in of_tests[2] and f'"triton=={of_tests[1]};' in (ROOT / "pyproject.toml").read_text()
    )


def test_weights_are_baked_with_a_token_that_is_no_argument(build, tmp_path):
    (tmp_path / "token").write_text("hf_secret")
    code, printed, calls = build("cuda", free_gib=200, BAKE_MODEL="flux", HF_TOKEN_FILE=str(tmp_path / "token"))
    assert code == 0, printed
    assert "BAKE_MODEL=flux" in calls and "--tag kiln:0.1.0-cuda-flux" in calls and "hf_secret" not in calls + printed
    assert f"--secret id=hf_token,src={tmp_path}/token" in calls
    code, printed, _ = build("cuda", BAKE_MODEL="flux")
    assert code == 74 and "needs 125 GiB" in printed


@pytest.mark.parametrize(
    ("arguments", "options", "code", "hint"),
    [
        (["cuda"], {"free_gib": 24}, 74, "cuda needs 25 GiB in"),
        (["cuda"], {"engine": False}, 69, "No engine"),
        (["cpu"], {"base": False}, 69, "The base image docker.io/library/python:3.12-slim-bookworm cannot be pulled"),
        (["rcom"], {}, 64, "'rcom' is not known"),
        (["cuda", "--tag"], {}, 64, "--tag needs a value"),
        (["cuda", "--push-by-digest"], {}, 69, "--push-by-digest needs docker with buildx"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_built(build, arguments, options, code, hint):
    found, printed, calls = build(*arguments, **options)
    assert found == code and hint in printed and "bud" not in calls
