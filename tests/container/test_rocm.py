"""Dockerfile.rocm on stand-ins for its base, which has 30 to 50 GB: a torch for HIP in either of the places where the
real one has been, and another Python first on the path. The libraries are the few that the entrypoint itself needs."""

import hashlib
import os
import re
import shutil
import subprocess
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = [pytest.mark.container, pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).resolve().parents[2]
PYTHON_IMAGE = os.environ.get("BASE_IMAGE", "docker.io/library/python:3.12-slim-bookworm")
# What the entrypoint imports until it has read its variables.
LIBRARIES = ("charset-normalizer", "environs", "json5", "marshmallow", "pillow", "python-dotenv", "safetensors")
LIBRARIES += ("typing-extensions",)
PLACES = {"venv": "/opt/venv", "conda": "/opt/conda/envs/py_3.12"}
KEPT = "--constraint /tmp/kept.txt"
LOOK = "import torch; print('torch', torch.__version__, torch.version.hip, torch.__file__)"


@pytest.fixture(scope="module")
def engine():
    for name in ("buildah", "podman"):
        if shutil.which(name) and shutil.which("podman"):
            return name
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        return "docker"
    pytest.skip("NO IMAGE FOR ROCM WAS TESTED: neither a docker daemon nor podman is here")


@pytest.fixture(scope="module", params=PLACES)
def base(request, engine, tmp_path_factory):
    """A stand-in for rocm/pytorch."""
    folder, where = tmp_path_factory.mktemp(request.param), PLACES[request.param]
    name = f"localhost/kiln-test/rocm-{request.param}"
    (folder / "Dockerfile").write_text(f"""
FROM {PYTHON_IMAGE}
COPY torch /tmp/torch
RUN python3 -m venv --without-pip {where} && cp -r /tmp/torch {where}/lib/python3.*/site-packages/
""")
    torch_package(folder / "torch", "2.11.0+rocm7.14", hip="7.14")
    command = {"docker": ["docker", "build"], "podman": ["podman", "build"], "buildah": ["buildah", "bud"]}[engine]
    subprocess.run([*command, *options(), "--tag", name, folder], check=True, capture_output=True)
    return name


def torch_package(folder, version, *, hip):
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("from torch import version\nfrom torch.version import __version__\n")
    (folder / "version.py").write_text(f"__version__ = {version!r}\nhip = {hip!r}\n")


def options():
    return os.environ.get("BUILD_OPTIONS", "").split()


@pytest.fixture
def index(tmp_path):
    """The address of a folder with a wheel of torch for CUDA, and the wheel's hash."""
    folder = tmp_path / "wheels"
    torch_package(folder / "torch", "2.13.0+cu132", hip=None)
    wheel = folder / "torch-2.13.0+cu132-py3-none-any.whl"
    about = "torch-2.13.0+cu132.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        for path in (folder / "torch").iterdir():
            file.write(path, f"torch/{path.name}")
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0+cu132\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", hashlib.sha256(wheel.read_bytes()).hexdigest()
    server.shutdown()


@pytest.fixture
def checkout(tmp_path):
    """This project with a short lock and without weights."""
    folder = tmp_path / "checkout"
    unneeded = shutil.ignore_patterns("*.safetensors", "__pycache__")
    for name in ("entrypoint", "trainer"):
        shutil.copytree(ROOT / name, folder / name, ignore=unneeded)
    for name in ("Dockerfile.rocm", "build.sh", ".dockerignore", "LICENSE", "dataset.json", "prompts.txt"):
        shutil.copy(ROOT / name, folder)
    blocks = re.split(r"^(?=\S)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    short = [b for b in blocks if b.partition("==")[0] in LIBRARIES]
    assert len(short) == len(LIBRARIES)
    (folder / "requirements.lock").write_text("".join(short))
    return folder


@pytest.fixture
def build(checkout, tmp_path):
    """`build(base, find_links=None)`: exit code of ./build.sh rocm and what it printed."""

    def start(base, find_links=None):
        environment = {
            **os.environ, "BASE_IMAGE": base, "PYTHON_IMAGE": PYTHON_IMAGE, "ROCM_ROOM_GIB": "3",
            "BUILD_OPTIONS": " ".join((*options(), *([] if "--network" in options() else ["--network", "host"]))),
        }  # fmt: skip
        if find_links:
            given = os.environ.get("PIP_CONF_SECRET")
            text = Path(given).read_text() if given else "[global]\n"
            text = re.sub(r"(?m)^find-links = .*\n", "", text) + f"find-links = {find_links}\n"
            (tmp_path / "pip.conf").write_text(text)
            environment["PIP_CONF_SECRET"] = str(tmp_path / "pip.conf")
        done = subprocess.run(
            ["./build.sh", "rocm", "--tag", "localhost/kiln-test/kiln:stub"],
            cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout

    return start


def run(engine, *arguments):
    program = "docker" if engine == "docker" else "podman"
    quiet = [] if engine == "docker" else ["--no-healthcheck"]
    done = subprocess.run(
        [program, "run", "--rm", "--network", "none", *quiet, "localhost/kiln-test/kiln:stub-rocm", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout


def test_the_bases_torch_is_kept(engine, base, build):
    code, printed = build(base)
    assert code == 0 and "kept: torch 2.11.0+rocm7.14" in printed, printed[-3000:]
    python = "/opt/kiln/entrypoint/start.sh"
    code, printed = run(engine, "shell", "-c", f'{python} -c "{LOOK}"')
    is_kept = "torch 2.11.0+rocm7.14 7.14 /opt/" in printed and "/opt/kiln" not in printed
    assert code == 0 and is_kept, printed[-1500:]
    code, printed = run(engine)
    assert code == 78 and "BASE_MODEL is not set" in printed


def with_torch(checkout, digest):
    lock = checkout / "requirements.lock"
    lock.write_text(lock.read_text() + f"torch==2.13.0+cu132 --hash=sha256:{digest}\n")


@pytest.mark.parametrize("base", ["venv"], indirect=True)
def test_a_lock_with_torch_is_refused(base, build, checkout, index):
    with_torch(checkout, index[1])
    code, printed = build(base, find_links=index[0])
    assert code != 0 and re.search(r"torch.*(conflict|constraint)", printed, re.DOTALL), printed[-3000:]


@pytest.mark.parametrize("base", ["venv"], indirect=True)
def test_without_the_constraints_the_base_would_lose_it(engine, base, build, checkout, index):
    """What the constraints and the two assertions are for; the last of them stands in the image itself."""
    with_torch(checkout, index[1])
    file = checkout / "Dockerfile.rocm"
    text = file.read_text()
    assert KEPT in text
    file.write_text(text.replace(KEPT, ""))
    code, printed = build(base, find_links=index[0])
    assert code != 0 and "torch would hide the base's" in printed, printed[-3000:]

    file.write_text(file.read_text().replace("for name in torch ", "for name in "))
    code, printed = build(base, find_links=index[0])
    assert code != 0 and "No Python here has a torch that is built for HIP" in printed, printed[-3000:]

    file.write_text(file.read_text().replace("RUN /opt/kiln/entrypoint/start.sh", "RUN true"))
    code, printed = build(base, find_links=index[0])
    assert code == 0, printed[-3000:]
    code, printed = run(engine)
    assert code == 78 and "built for HIP" in printed
