"""The scripts that CI calls, with tools that only record how they are called."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "sh", "cat", "sed", "tee", "grep", "mktemp", "rm", "mkdir", "dirname", "timeout", "tar", "tail")
ALLOWED = {
    "nothing": {},
    "no right to install": {"id": "echo 1000", "apt-get": "exit 9"},
    "no packages": {"id": "echo 0", "apt-get": "exit 100"},
    "no base": {"id": "echo 1000", "podman": "exit 125"},
    "no containers": {"id": "echo 1000", "podman": 'case "$*" in run*) exit 126 ;; esac'},
}
REASONS = {
    "nothing": "apt-get cannot install one",
    "no right to install": "apt-get cannot install one",
    "no packages": "apt-get could not install one",
    "no base": "debootstrap cannot make another",
    "no containers": "podman cannot run a container here",
}


@pytest.fixture
def start(tmp_path):
    """`start(script, **tools)`: run a script of this project where only these tools are; exit code and output.

    Names in capitals are variables.
    """
    tree, tools = tmp_path / "tree", tmp_path / "bin"

    def run(name, **stubs_and_variables):
        stubs = {key: value for key, value in stubs_and_variables.items() if not key.isupper()}
        variables = {key: value for key, value in stubs_and_variables.items() if key.isupper()}
        shutil.rmtree(tools, ignore_errors=True)
        tools.mkdir()
        for tool in set(TOOLS) - stubs.keys():
            (tools / tool).symlink_to(shutil.which(tool))
        script = tree / name
        script.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, script)
        for file in ("Dockerfile.cuda", "torch.lock"):
            shutil.copy(ROOT / file, tree)
        stubs = {"id": "echo 1000", **stubs}
        for place, text in [(tools / tool, text) for tool, text in stubs.items()] + [
            (tree / ".venv/bin/pytest", 'echo "pytest $*, because: ${KILN_NO_CONTAINER:-}"')
        ]:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(f"#!{shutil.which('bash')}\n{text}\n")
            place.chmod(0o755)
        environment = {
            "PATH": str(tools),
            "KILN_CONTAINERS": str(tmp_path / "store"),
            "TMPDIR": str(tmp_path),
            **variables,
        }
        done = subprocess.run(
            [script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize(("code", "because"), [(124, "did not build the image in 7 minutes"), (1, "")])
def test_a_machine_that_is_too_slow_is_no_failure_and_a_build_that_fails_is(start, code, because):
    """The second is left to the tests, which build it again."""
    quick = {"KILN_QUICK": "yes", "PIP_CONF_SECRET": "x", "timeout": f"exit {code}", "podman": "echo 3.11"}
    printed = start("tests/container/run.sh", **quick)[1]
    command, reason = printed.splitlines()[-1].split(", because: ")
    assert command.endswith("-m container and not slow tests/container")
    assert because in reason and bool(because) is bool(reason)


@pytest.mark.parametrize("case", ALLOWED)
def test_without_a_builder_the_container_tests_are_skipped_loudly(start, case):
    code, printed = start("tests/container/run.sh", **ALLOWED[case])
    assert code == 0 and "SKIPPED: NO CONTAINER IS TESTED: " in printed
    assert printed.splitlines()[-1].startswith("pytest -rs -m container tests/container, because: ")
    assert REASONS[case] in printed.splitlines()[-1]


def test_a_daemon_of_docker_needs_nothing_else(start):
    code, printed = start("tests/container/run.sh", docker="", podman="exit 9")
    assert (code, printed) == (0, "pytest -rs -m container tests/container, because: \n")


def test_the_reason_skips_every_test_of_a_container():
    environment = {**os.environ, "KILN_NO_CONTAINER": "the moon is full"}
    words = [sys.executable, "-m", "pytest", "-rs", "-m", "container", "tests/container"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "NO CONTAINER WAS TESTED: the moon is full" in done.stdout
    closing = done.stdout.splitlines()[-1]
    assert " skipped in " in closing and "passed" not in closing and "failed" not in closing


MAKE = """
case $1 in
  test) printf '2 files already formatted\\n5 passed, 1 skipped in 3.00s\\nrubbish\\n3 passed in 0.20s\\n'; exit TEST ;;
  container) echo "quick: $KILN_QUICK"; printf '2 failed, 7 passed in 99s (0:01)\\nmake: *** Error 1\\n'; exit 2 ;;
esac
"""


@pytest.mark.parametrize(("test", "last"), [("0", 3), ("1", 2)])
def test_the_last_lines_say_how_each_run_of_pytest_ended(start, test, last):
    code, printed = start(".ci/run", make=MAKE.replace("TEST", test))
    closing = ["5 passed, 1 skipped in 3.00s", "3 passed in 0.20s", "2 failed, 7 passed in 99s (0:01)"][:last]
    assert code == (2 if test == "0" else 1) and printed.splitlines()[-last:] == closing
    assert ("quick: yes" in printed) is (test == "0")  # the container waits for the rest
