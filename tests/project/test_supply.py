"""What comes along: licences of what the image installs, and no secret in any file of the repository.

What bandit finds, `make lint` tells as well, beside those of its rules that ruff has.
"""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Licences that let anybody pass the image on without conditions on other work.
FREE = re.compile(r"Apache|\bMIT|\bBSD|\b0BSD|\bISC|MPL.2\.0|Mozilla Public|PSF|Zlib|CC0|CNRI|3-Clause", re.IGNORECASE)
UNSAID = {"torchao": "BSD 3-Clause"}  # says it in its LICENSE file alone
SECRETS = {
    "a token of the Hub": r"\bhf_[A-Za-z0-9]{30,}",
    "a key of RunPod": r"\brpa_[A-Z0-9]{30,}",
    "a token of GitHub": r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{40,})",
    "a key of AWS": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a token of PyPI": r"\bpypi-[A-Za-z0-9_-]{50,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=]{20,}",
    "a password in an address": r"https?://[^\s/:@\"'{}<>$]{2,}:(?!password@)[^\s/:@\"'{}<>$]{8,}@[\w-]+\.\w",
}


def licence(name):
    """What a package says of its licence, or None if it is not here."""
    try:
        about = metadata(name)
    except PackageNotFoundError:
        return None
    if name in UNSAID:
        return UNSAID[name]
    classifiers = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License")]
    return about.get("License-Expression") or "; ".join([(about.get("License") or "").split("\n")[0], *classifiers])


def test_the_licences_of_the_image_let_it_be_passed_on():
    """`pytest -s` prints the list."""
    lock = (ROOT / "requirements.lock").read_text()
    names = sorted(set(re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)))
    licences = {name: text for name in names if (text := licence(name)) is not None}
    for name, text in licences.items():
        print(f"{name:28} {text}")
    assert len(licences) > 0.9 * len(names)
    assert {name: text for name, text in licences.items() if not FREE.search(text) or "GPL" in text} == {}


def bandit(*paths):
    command = [sys.executable, "-m", "bandit", "-q", "-ll", "-c", str(ROOT / "pyproject.toml"), "-r", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


def test_bandit_finds_nothing_here_and_something_where_there_is(tmp_path):
    run = bandit(*(ROOT / name for name in ("entrypoint", "trainer", "runpod")))
    assert run.returncode == 0, run.stdout
    (tmp_path / "loads.py").write_text("import pickle, torch\npickle.loads(b'')\ntorch.load('weights.pt')\n")
    run = bandit(tmp_path)
    assert run.returncode == 1 and "B301" in run.stdout and "B614" in run.stdout


def kinds_of_secrets(text):
    return [kind for kind, pattern in SECRETS.items() if re.search(pattern, text)]


def test_no_file_holds_a_secret():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and not name.endswith((".safetensors", ".png"))]
    assert len(files) > 100
    secrets = {}
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if kinds := kinds_of_secrets(text):
            secrets[str(path.relative_to(ROOT))] = kinds
    assert secrets == {}


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("a token of the Hub", ("hf_", "A1b2" * 9)),
        ("a key of RunPod", ("rpa_", "A1B2" * 10)),
        ("a token of GitHub", ("ghp_", "a1B2" * 9)),
        ("a key of AWS", ("AKIA", "A1B2" * 4)),
        ("a token of PyPI", ("pypi-", "A1b2" * 20)),
        ("a private key", ("-----BEGIN OPENSSH ", "PRIVATE KEY-----\n", "b3Bl" * 10)),
        ("a password in an address", ("https://someone:", "s3cr3tpass@", "example.org/x")),
    ],
)
def test_a_secret_would_be_found(kind, parts):
    assert kinds_of_secrets(f"x = '{''.join(parts)}'\n") == [kind]
