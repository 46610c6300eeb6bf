"""The image for the CPU, built and run for real: `make container`. KILN_IMAGE names a built one; see build.sh for more.

Nothing here goes to the network but the build.
"""

import json
import os
import re
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.support.hub import Hub, read_folder
from trainer.spec.family import get_family

pytestmark = [pytest.mark.container, pytest.mark.timeout(3000)]
ROOT = Path(__file__).resolve().parents[2]
IMAGE = "kiln:0.1.0-cpu"  # what ./build.sh cpu makes
CONCEPT = "/opt/kiln/trainer/families/miniatures/concept"
SHORT = {"BASE_MODEL": "mini-flux", "DATASET_NAME": CONCEPT, "OUTPUT_NAME": "x", "PARAMS_NETWORK_DIM": "4"}
NO_ENGINE, NO_ROOM = 69, 74  # of build.sh
HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--user=10001:0")


@pytest.fixture(scope="session")
def engine():
    """docker, where its daemon answers, or podman."""
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0:
        return "docker"
    if shutil.which("podman"):
        return "podman"
    pytest.skip("NO CONTAINER WAS TESTED: neither a docker daemon nor podman is here")


@pytest.fixture(scope="session")
def image(engine):
    if named := os.environ.get("KILN_IMAGE"):
        return named
    built = subprocess.run(["./build.sh", "cpu"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if built.returncode in (NO_ENGINE, NO_ROOM):
        pytest.skip(f"NO CONTAINER WAS TESTED: {built.stdout.strip()}")
    assert built.returncode == 0, built.stdout[-4000:]
    print(built.stdout.splitlines()[-1])
    return IMAGE


@pytest.fixture
def volume(tmp_path):
    """What lies at /workspace: root's, writable for gid 0."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    os.chown(folder, -1, 0) if os.geteuid() == 0 else None
    folder.chmod(0o777)
    return folder


@pytest.fixture
def run(engine, image, volume):
    """`run(*arguments, options=(), named=None, **environment)`: exit code, and all that was printed."""

    def start(*arguments, options=(), named=None, **environment):
        words = ["--rm", *options, "--volume", f"{volume}:/workspace", *variables(environment), named or image]
        command = [*base(engine), *words]
        done = subprocess.run(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
        )
        return done.returncode, done.stdout

    return start


def base(engine):
    # podman asks systemd to run health checks, which is not everywhere.
    return [engine, "run", "--network", "none", *(["--no-healthcheck"] if engine == "podman" else [])]


def variables(environment):
    return [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]


def status(volume):
    return json.loads((volume / "output" / "status.json").read_text())


def steps(volume):
    path = volume / "output" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["step"] for row in rows if "loss" in row]


def test_variables_alone_train_a_lora(run, volume):
    """Those of the template that people have, with its paths."""
    template = {
        "DATASET_CONFIG": "/opt/sd-scripts/dataset.json",
        "SAMPLE_PROMPTS": "/opt/sd-scripts/prompts.txt",
        "OUTPUT_PATH": "/workspace/output",
        "PARAMS_MAX_STEPS": "4",
        "PARAMS_RESOLUTION": "128",
        "PARAMS_SAMPLE_EVERY_N_STEPS": "4",
    }
    code, printed = run(**SHORT, **template)
    assert code == 0, printed
    assert status(volume)["phase"] == "done" and steps(volume) == [1, 2, 3, 4]
    with safe_open(volume / "output" / "x.safetensors", "np") as file:
        assert file.metadata()["ss_steps"] == "4" and len(list(file.keys())) > 0
    assert (volume / "output" / "sample" / "contact-sheet.png").is_file()

    started = time.monotonic()
    code, printed = run(**SHORT, **template)
    assert code == 0 and "This job is done" in printed
    assert time.monotonic() - started < 60


def test_sigterm_leaves_a_state_that_goes_on(engine, image, run, volume):
    environment = {**SHORT, "PARAMS_MAX_STEPS": "80", "PARAMS_SAMPLE_EVERY_N_STEPS": "0"}
    name = f"kiln-test-{uuid.uuid4().hex[:8]}"
    words = ["--name", name, "--volume", f"{volume}:/workspace", *variables(environment)]
    container = subprocess.Popen(
        [*base(engine), "--rm", *words, image], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 240
        while len(steps(volume)) < 3:
            assert container.poll() is None, container.stdout.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        healthy = subprocess.run([engine, "exec", name, "python", "-m", "entrypoint.health"], capture_output=True)
        assert healthy.returncode == 0, healthy.stderr
        first = subprocess.run([engine, "exec", name, "cat", "/proc/1/comm"], capture_output=True, text=True)
        assert first.stdout.strip() == "tini"
        stopped = time.monotonic()
        subprocess.run([engine, "kill", "--signal", "TERM", name], check=True, capture_output=True)
        printed, _ = container.communicate(timeout=60)
        print(f"stopped {time.monotonic() - stopped:.1f} s after SIGTERM")
    finally:
        subprocess.run([engine, "rm", "--force", name], capture_output=True)
    assert container.returncode == 143, printed.decode()
    assert status(volume)["phase"] == "stopped" and status(volume)["exit_code"] == 143
    reached = steps(volume)[-1]

    # max_steps decides which weights come out, so the rest runs to its end under the same settings.
    code, printed = run(**environment)
    assert code == 0, printed
    assert steps(volume) == list(range(1, 81)) and 3 <= reached < 80
    assert re.search(r"[Rr]esum", printed), printed


def test_a_container_that_is_restarted_for_ever_trains_once(engine, image, volume):
    """As RunPod does with every container that exits."""
    environment = {**SHORT, "PARAMS_MAX_STEPS": "2", "PARAMS_SAMPLE_EVERY_N_STEPS": "0"}
    name = f"kiln-test-{uuid.uuid4().hex[:8]}"
    words = ["--detach", "--restart=always", "--name", name, "--volume", f"{volume}:/workspace"]
    subprocess.run([*base(engine), *words, *variables(environment), image], check=True, capture_output=True)

    def printed():
        done = subprocess.run([engine, "logs", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.stdout

    try:
        deadline = time.monotonic() + 300
        while printed().count("This job is done") < 2:
            assert time.monotonic() < deadline, printed()
            time.sleep(1)
        assert steps(volume) == [1, 2] and printed().count("step 2/2") == 1
    finally:
        subprocess.run([engine, "rm", "--force", "--time", "1", name], capture_output=True)


def test_the_owner_of_a_pod_can_fetch_results_by_rsync(run):
    script = (
        "set -e; test ! -e /etc/ssh/ssh_host_ed25519_key; ssh-keygen -q -t ed25519 -N '' -f /tmp/key\n"
        'export PUBLIC_KEY="$(cat /tmp/key.pub)"\n'
        "python -c 'import os; from entrypoint.processes.supervise import start_ssh; start_ssh(os.environ)'\n"
        "rsync -e 'ssh -i /tmp/key -o StrictHostKeyChecking=no' root@127.0.0.1:/opt/kiln/LICENSE /tmp/fetched\n"
        "cmp /tmp/fetched /opt/kiln/LICENSE && echo fetched"
    )
    code, printed = run("shell", "-c", script)
    assert code == 0 and "fetched" in printed, printed


def test_a_read_only_root_and_another_user(run, volume):
    code, printed = run(options=HARDENED, **SHORT, PARAMS_MAX_STEPS="2", PARAMS_SAMPLE_EVERY_N_STEPS="0")
    assert code == 0, printed
    lora = volume / "output" / "x.safetensors"
    assert lora.is_file()
    if os.geteuid() == 0:
        assert lora.stat().st_uid == 10001


@pytest.mark.skipif(os.geteuid() != 0, reason="gives the volume to somebody")
def test_the_results_belong_to_the_owner_of_the_volume(run, volume):
    os.chown(volume, 12345, 12345)
    volume.chmod(0o755)
    code, printed = run(**SHORT, PARAMS_MAX_STEPS="2", PARAMS_SAMPLE_EVERY_N_STEPS="0")
    assert code == 0 and "goes on as root" not in printed, printed
    assert (volume / "output" / "x.safetensors").stat().st_uid == 12345


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a volume that is root's alone")
def test_a_volume_that_is_roots_alone_is_explained(run, volume):
    volume.chmod(0o755)
    code, printed = run("check", **SHORT)
    assert code == 0 and "This container goes on as root: user 10001 cannot write to /workspace" in printed, printed


def test_without_a_volume_another_user_still_can(engine, image):
    command = [*base(engine), "--rm", "--user", "10001:0", image, "shell", "-c", "touch /workspace/x && echo written"]
    assert "written" in subprocess.run(command, capture_output=True, text=True).stdout


def test_wrong_settings_and_commands(run, volume):
    code, printed = run(**{**SHORT, "PARAMS_NETWORK_DIM": "many", "BASE_MODEL": "fluks"})
    assert code == 78 and "PARAMS_NETWORK_DIM='many'" in printed and "fluks" in printed
    assert not (volume / "output").exists()
    assert run("trian", **SHORT)[0] == 64
    code, printed = run("check", **SHORT)
    assert code == 0 and "this job can run" in printed
    assert not (volume / "output" / "x.safetensors").exists()


def test_a_full_size_model_is_refused_without_a_gpu(run):
    code, printed = run(**{**SHORT, "BASE_MODEL": "flux"})
    assert code == 75 and "--gpus all" in printed


def test_training_that_stands_still_is_unhealthy(engine, image, run, volume):
    script = (
        "sleep 1; mkdir -p output\n"
        'echo "{\\"phase\\": \\"training\\", \\"updated\\": $(date +%s)}" > output/status.json\n'
        "python -m entrypoint.health && sleep 2 && HEALTH_PATIENCE_MINUTES=0.01 python -m entrypoint.health"
    )
    code, printed = run("shell", "-c", script)
    assert code == 1 and "healthy" in printed and "No step for" in printed
    about = subprocess.run([engine, "image", "inspect", image], capture_output=True, text=True).stdout
    assert "entrypoint.health" in about and '"org.opencontainers.image.licenses": "Apache-2.0"' in about
    if not os.environ.get("KILN_IMAGE"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert f'"org.opencontainers.image.revision": "{commit}"' in about


def test_nothing_that_lies_on_the_volume_is_run(run, volume):
    """As a package, a module, a start file, or settings of pip or the shell."""
    for name in ("torch", "json", "sitecustomize", "usercustomize"):
        (volume / f"{name}.py").write_text("raise SystemExit(9)\n")
    for version in ("3.11", "3.12", "3.13"):
        site = volume / f".local/lib/python{version}/site-packages"
        site.mkdir(parents=True)
        (site / "usercustomize.py").write_text("raise SystemExit(9)\n")
        (site / "x.pth").write_text("import os; os._exit(9)\n")
    (volume / ".bashrc").write_text("exit 9\n")
    (volume / ".config/pip").mkdir(parents=True)
    (volume / ".config/pip/pip.conf").write_text("[global]\nindex-url = https://example.invalid/\n")
    code, printed = run("check", **SHORT)
    assert code == 0 and "this job can run" in printed, printed
    code, printed = run("shell", "-i", "-c", "python -m pip config list; echo home: $HOME; ls -A $HOME")
    assert code == 0 and "example.invalid" not in printed and printed.rstrip().endswith("home: /home/kiln"), printed


def test_the_build_leaves_nothing_of_its_own(run):
    """No package configuration, certificates of others or pip cache; and what lies in /workspace is no module."""
    look = (
        "set -e; test ! -e /etc/pip.conf; test ! -e /run/secrets/cabundle; test ! -e /root/.cache\n"
        "test -s /etc/ssl/certs/ca-certificates.crt; test -s /licenses/LICENSE; test ! -e /opt/kiln/tests\n"
        "echo 'raise SystemExit(1)' > torch.py; python -c 'import torch, diffusers, bitsandbytes'"
    )
    code, printed = run("shell", "-c", look)
    assert code == 0, printed


def forget_downloads(engine, image, folder, repository):
    """Take a repository out of what the engine keeps of the Hub from one build to the next.

    A build that is refused uses what is there, so that a second run of a test would not be refused; and nobody shall
    take a miniature for the model later.
    """
    place = f"/hf/hub/models--{repository.replace('/', '--')}"
    (folder / "Dockerfile").write_text(f"FROM {image}\nUSER 0\nRUN --mount=type=cache,target=/hf rm -rf {place}\n")
    subprocess.run([engine, "build", "--no-cache", folder], check=True, capture_output=True)


@pytest.mark.slow
def test_weights_are_baked_in_and_the_token_is_not(engine, image, run, tmp_path):
    """From a local stand-in for the Hub, which gives them to the token alone.

    They are those of a miniature. Z-Image's differs from Z-Image in what no config must say (numbers of layers and
    heads), so that it is accepted; those of other families have another width of their texts, and are refused.
    """
    if os.environ.get("KILN_IMAGE"):
        pytest.skip("a named image is tested, and none is built")
    token, name = f"hf_{uuid.uuid4().hex}", f"{image}-z-image"
    (tmp_path / "token").write_text(f"{token}\n")
    options = os.environ.get("BUILD_OPTIONS", "")
    options += "" if "--network" in options else " --network host"
    facts = get_family("z_image").FACTS.models
    source, scratch = facts["z-image"].source, tmp_path / "scratch"
    scratch.mkdir()
    forget_downloads(engine, image, scratch, source)
    with Hub() as hub:
        hub.granted.add(token)
        hub.add("model", source, read_folder(Path(facts["mini-z-image"].source)), gated=True)
        environment = {**os.environ, "BAKE_MODEL": "z-image", "HF_ENDPOINT": hub.endpoint, "BUILD_OPTIONS": options}
        refused = subprocess.run(["./build.sh", "cpu"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert refused.returncode != 0 and "licence" in refused.stdout + refused.stderr, refused.stderr[-2000:]
        environment["HF_TOKEN_FILE"] = str(tmp_path / "token")
        built = subprocess.run(["./build.sh", "cpu"], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert built.returncode == 0 and token not in built.stdout + built.stderr, built.stderr[-4000:]
    forget_downloads(engine, image, scratch, source)
    words = {**SHORT, "BASE_MODEL": "z-image", "BACKEND": "cpu", "PARAMS_RESOLUTION": "128", "PARAMS_MAX_STEPS": "2"}
    code, printed = run(named=name, **words, PARAMS_SAMPLE_EVERY_N_STEPS="0")
    assert code == 0, printed
    fetched = [line.partition("To fetch")[2] for line in printed.splitlines() if "To fetch" in line]
    assert fetched == [" for the model: nothing. /opt/kiln-models/Tongyi-MAI--Z-Image is here."]
    code, printed = run("shell", "-c", f"grep -rlF {token} /opt/kiln* /etc /root /run /tmp /home /var", named=name)
    assert code == 1 and printed == ""
    about = subprocess.run([engine, "history", "--no-trunc", name], capture_output=True, text=True)
    inspected = subprocess.run([engine, "image", "inspect", name], capture_output=True, text=True)
    assert about.returncode == 0 and token not in about.stdout + inspected.stdout


@pytest.mark.slow
def test_the_lines_of_the_document(engine, image, tmp_path):
    """Every block of docs/docker.md that is marked sh, in order; what needs a GPU or the network is marked text."""
    text = (ROOT / "docs" / "docker.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    bin_, work = tmp_path / "bin", tmp_path / "work"
    bin_.mkdir()
    work.mkdir()
    flags, program = " ".join(base(engine)[2:]), shutil.which(engine)
    script(bin_ / "docker", f'if [ "$1" = run ]; then shift; exec {program} run {flags} "$@"; fi; exec {program} "$@"')
    script(work / "build.sh", f'PATH="{os.environ["PATH"]}" exec "{ROOT}/build.sh" "$@"')
    done = subprocess.run(
        ["bash", "-c", "set -euxo pipefail\n" + "\n".join(blocks)],
        cwd=work,
        env={**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for folder in ("workspace", "other"):
        assert (work / folder / "output" / "spots.safetensors").is_file()


def script(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
