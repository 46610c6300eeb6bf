"""F3, H1, H2, H3: what users put into variables stays where it belongs."""

import base64
import getpass
import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.parse
import zipfile
from pathlib import Path

import pytest
from safetensors import safe_open

from entrypoint.settings.variables import ROWS
from tests.support import faults
from tests.support.hub import Hub

HERE = Path(__file__).resolve().parent
SECRETS = {
    "HF_TOKEN": "hf_" + "cAnary/1+" * 4,
    "HF_WRITE_TOKEN": "hf_" + "cAnary/6+" * 4,
    "RUNPOD_API_KEY": "rpa_" + "cAnary/2+" * 4,
    "WANDB_API_KEY": "cAnary/3+" * 4,
    "GITHUB_TOKEN": "ghp_" + "cAnary/4+" * 4,
    "AWS_SECRET_ACCESS_KEY": "cAnary/5+" * 4,
    "DB_PASS": "cAnary/7+" * 4,
    "MY_SERVICE": f"https://me:{'cAnary%2F8%2B' * 4}@host/",
}


def forms(secret):
    plain = secret.encode()
    inner = base64.b64encode(plain)[: len(plain) // 3 * 4 - 4]
    return [plain, inner, urllib.parse.quote(secret, safe="").encode()]


def hits(data):
    return [name for name, secret in SECRETS.items() for form in forms(secret) if form in data]


def found_in(folder, printed):
    everything = {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    assert len(everything) > 3
    return {
        place: names for place, data in {**everything, "printed": printed.encode()}.items() if (names := hits(data))
    }


FAILURES = {
    "well": ({"PARAMS_MAX_STEPS": "2"}, None, 0),
    "a bug": ({}, {"kind": "crash", "step": 3, "times": 9}, 70),
    "bad numbers": ({}, {"kind": "loss", "step": 3, "times": 99, "factor": "nan"}, 70),
    "a full disk": ({}, {"kind": "system", "calls": ["fsync"], "errno": "ENOSPC", "step": 3, "times": 999}, 74),
    "a hang": ({"PARAMS_STEP_TIMEOUT": "3"}, {"kind": "sleep", "step": 3, "seconds": 99}, 75),
    "a signal": ({}, {"kind": "signals", "step": 3, "signals": [signal.SIGTERM]}, 143),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_secrets_come_out_nowhere(job, tmp_path, name):
    """H1: however the job ends; plain, base64 or in an address."""
    changes, fault, expected = FAILURES[name]
    if fault:
        fired = str(tmp_path / "fired.txt")
        changes = {**changes, "PYTHONPATH": faults.PLACE, "KILN_FAULT": json.dumps({**fault, "fired": fired})}
    code, printed = job.run(**SECRETS, **changes)
    assert code == expected, printed
    assert not fault or os.path.getsize(fired)
    assert found_in(tmp_path, printed) == {}


def processes_of(leader):
    """The arguments and the environment of each process that `leader` has started, by way of others too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == leader:
                found.append([(folder / name).read_bytes() for name in ("cmdline", "environ")])
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.slow
def test_no_process_that_a_job_starts_has_a_secret(job):
    """Trainers, processes that read images, probes. The entrypoint itself was started with all of them."""
    process = job.start(own_interpreter=True, **SECRETS, PARAMS_MAX_STEPS="2")
    programs = set()
    while process.poll() is None:
        for arguments, environment in processes_of(process.pid):
            assert hits(arguments) == []
            if b"entrypoint" not in arguments.split(b"\0"):
                programs.add(arguments)
                assert hits(environment) == [], arguments
        time.sleep(0.02)
    assert process.returncode == 0, process.printed()
    assert any(b"trainer" in arguments for arguments in programs) and hits(process.printed().encode()) == []


@pytest.mark.slow
def test_the_signature_of_an_address_is_nowhere_and_may_be_renewed(job, tmp_path, images):
    """H1: an archive's address may be signed. Its name is in plan.json, in the report and in the LoRA's header."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(images.iterdir()):
            archive.writestr(path.name, path.read_bytes())
    with Hub() as hub:
        hub.plain["/pictures.zip"] = packed.getvalue()
        address, private = f"{hub.endpoint}/pictures.zip", tmp_path / "private"
        private.mkdir()
        for signature in ("cAnarySIGNATUREone", "cAnarySIGNATUREtwo"):
            code, printed = job.run(
                DATASET_NAME=f"{address}?signature={signature}", PARAMS_MAX_STEPS="2", CACHE_PATH=str(private)
            )
            assert code == 0, printed
            everything = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} | {"": printed.encode()}
            assert [p for p, data in everything.items() if signature.encode() in data] == []
        assert "is done" in printed
    with safe_open(job.out / "x.safetensors", "pt") as opened:
        assert '"pictures.zip"' in opened.metadata()["ss_dataset_dirs"]


def test_a_secret_that_is_there_is_found(tmp_path):
    """The search above can fail."""
    for form in forms(SECRETS["HF_TOKEN"]):
        for i in range(5):
            (tmp_path / str(i)).write_bytes(b"some text " + form)
        assert len(found_in(tmp_path, "")) == 5


def test_processes_of_the_trainer_are_given_no_secret():
    from entrypoint.system.environment import child_environment

    signed = {"DATASET_NAME": f"https://host/x.zip?signature={SECRETS['HF_TOKEN']}", "PARAMS_SEED": "1"}
    given = child_environment({**SECRETS, **signed, "PATH": "/bin", "HF_HOME": "/hf"})
    assert hits(json.dumps(given).encode()) == [] and not signed.keys() & given.keys()
    assert given["PATH"] == "/bin" and given["HF_HOME"] == "/hf"


@pytest.mark.slow
def test_nothing_in_a_variable_becomes_a_command(job, tmp_path):
    """F3: in every variable that takes text, one after the other and all at once."""
    texts = [r.name for r in ROWS.values() if r.kind in ("text", "path", "name", "names", "pairs", "choice", "secret")]
    attacks = ["$(touch {})", "`touch {}`", "; touch {}", "\ntouch {}\n", "| touch {} #", "${{IFS}}&&touch {}"]
    for i, attack in enumerate(attacks):
        text = attack.format(tmp_path / "made")
        changes = {"CONFIG_JSON": text} | {n: text for n in texts if n not in ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME")}
        code, printed = job.run("--check", **changes)
        assert code == 78 and "Traceback" not in printed, printed
        code, printed = job.run(
            "--check", TRIGGER_WORD=text, OUTPUT_PATH=str(tmp_path / str(i) / text.replace("/", ""))
        )
        is_unexpanded = "${" in text  # a variable of a shell in a path is refused as it stands
        assert code == (78 if is_unexpanded else 0), printed
    assert not list(tmp_path.rglob("made")) and not os.path.exists("made")


@pytest.mark.slow
def test_a_pickle_by_another_name_is_refused(job, tmp_path):
    """H2: as the LoRA to start from. (As a model: tests/entrypoint/planning/test_preflight.py; as a cache or state:
    test_data.py.)
    """
    import pickle

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "unpickled",)

    for name in ("x.safetensors", "x.pt", "x.ckpt", "x.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        code, printed = job.run("--check", PARAMS_RESUME_FROM=str(tmp_path / name))
        assert code == 78 and "PARAMS_RESUME_FROM" in printed, printed
    assert not (tmp_path / "unpickled").exists()


def test_files_do_not_tell_where_they_were_made(tiny, tmp_path):
    """H3. That two folders give the same bytes, `tiny` itself compares."""
    private = {str(tiny.base), str(tiny.base.parent), socket.gethostname(), str(Path.home()), str(HERE)}
    private |= {f"/{getpass.getuser()}/"}
    for file in sorted((tiny.base / "first").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            header = json.dumps(opened.metadata())
        assert len(header) > 500 and [p for p in private if p in header] == []


def test_no_script_prints_the_environment():
    """In no script of the repository: neither `env`, `printenv` nor `set -x`."""
    import re

    root = HERE.parents[1]
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    scripts = [root / p for p in listed if p.endswith((".sh", "Makefile")) or "Dockerfile" in p or p.startswith(".ci/")]
    assert scripts
    bad = re.compile(r"^\s*(?:RUN\s+)?(?:set -\w*x|printenv|env\s*$)", re.M)
    assert [p.name for p in scripts if p.is_file() and bad.search(p.read_text(errors="replace"))] == []
