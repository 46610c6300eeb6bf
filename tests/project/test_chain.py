"""How images come to be: rules over the workflows, the Dockerfiles and the scripts, each with faults that it must find.

A rule is a function of all files, as texts by name; it lists what is wrong. `FAULTS` has, for each rule, changes of the
real files that it must notice: a rule without one does not count.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLACES = (
    ".github/workflows/*.yml",
    "Dockerfile.*",
    "runpod/Dockerfile",
    "build.sh",
    "entrypoint/start.sh",
    ".dockerignore",
)
FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for pattern in PLACES
    for path in sorted(ROOT.glob(pattern))
}
Files = Mapping[str, str]
RULES: dict[str, Callable[[Files], Iterator[str]]] = {}
IMAGES, CHECKS, AUDIT = (f".github/workflows/{name}.yml" for name in ("images", "checks", "audit"))
CUDA, ROCM, WORKER = "Dockerfile.cuda", "Dockerfile.rocm", "runpod/Dockerfile"
OF_GITHUB = "actions/"  # actions of GitHub itself; all others are of third parties
# Third parties' actions that may run beside rights to write, each for a reason.
WITH_RIGHTS = {
    "docker/setup-buildx-action": {"packages"},  # starts the builder that pushes
    "sigstore/cosign-installer": {"packages", "id-token"},  # installs what signs
}
IMAGE_FILES = (CUDA, ROCM)


def rule(function: Callable[[Files], Iterator[str]]) -> Callable[[Files], Iterator[str]]:
    RULES[function.__name__] = function
    return function


# ---- reading


def workflows(files: Files) -> dict[str, Any]:
    """The parsed workflows. YAML reads the key `on` as true."""
    names = [name for name in files if name.startswith(".github/workflows/")]
    return {name: yaml.safe_load(files[name]) for name in names}


def jobs(files: Files) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each job: its name with that of its workflow, itself, and all of its scripts."""
    for file, workflow in workflows(files).items():
        for name, job in workflow["jobs"].items():
            scripts = "\n".join(step.get("run", "") for step in job.get("steps", []))
            yield f"{file}: {name}", job, scripts


def steps(files: Files) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for name, job, _ in jobs(files):
        for step in job.get("steps", []):
            yield name, job, step


def action(step: Mapping[str, Any]) -> str:
    """The action that a step uses, without its version, or ""."""
    return str(step.get("uses", "")).partition("@")[0]


def rights(job: Mapping[str, Any]) -> set[str]:
    """What a job may write."""
    permissions = job.get("permissions")
    if not isinstance(permissions, dict):
        return {"everything"}
    return {name for name, level in permissions.items() if level == "write"}


def needed(of: Mapping[str, Any], name: str) -> set[str]:
    """The jobs that must have succeeded before the job `name` begins."""
    needs = of[name].get("needs", [])
    direct = {needs} if isinstance(needs, str) else set(needs)
    return direct.union(*(needed(of, other) for other in direct))


def image_jobs(files: Files) -> dict[str, Any]:
    return workflows(files)[IMAGES]["jobs"]


def with_text(files: Files, text: str) -> list[str]:
    """The jobs that make images and have `text` in a script, or in the name of an action."""
    found = []
    for name, job in image_jobs(files).items():
        if any(text in step.get("run", "") or text in action(step) for step in job["steps"]):
            found.append(name)
    return found


def stages(text: str) -> list[str]:
    """The stages of a Dockerfile, with continued lines joined and without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return re.split(r"^(?=FROM )", joined, flags=re.MULTILINE)


def environment(stage: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in re.findall(r"^ENV (.*)$", stage, re.MULTILINE):
        found |= dict(word.split("=", 1) for word in shlex.split(line))
    return found


# ---- workflows


@rule
def actions_are_pinned_by_hash(files: Files) -> Iterator[str]:
    for name, text in files.items():
        for line in text.splitlines() if name.startswith(".github/") else ():
            is_use = re.search(r"^\s*(?:- )?uses:", line)
            if is_use and not re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line):
                yield f"{name}: {line.strip()}"


@rule
def no_job_has_rights_that_it_was_not_given(files: Files) -> Iterator[str]:
    for name, workflow in workflows(files).items():
        if workflow.get("permissions") != {}:
            yield f"{name}: permissions are not empty by default"
    for name, job, _ in jobs(files):
        if not isinstance(job.get("permissions"), dict):
            yield f"{name}: its permissions are not listed"


@rule
def nobody_elses_text_becomes_a_command(files: Files) -> Iterator[str]:
    for name, _, step in steps(files):
        if "${{" in step.get("run", ""):
            yield f"{name}: an expression in a script"
        if action(step) == "actions/github-script" and "${{" in str(step.get("with", "")):
            yield f"{name}: an expression in a script"


@rule
def strangers_start_nothing_that_has_rights(files: Files) -> Iterator[str]:
    allowed = {"push", "pull_request", "schedule", "workflow_dispatch"}
    for name, workflow in workflows(files).items():
        triggers = workflow[True]
        for trigger in set(triggers) - allowed:
            yield f"{name}: {trigger} runs with the repository's rights"
        for job in workflow["jobs"].values() if "pull_request" in triggers else ():
            if rights(job):
                yield f"{name}: a pull request gets rights to write"


@rule
def secrets_are_in_no_workflow(files: Files) -> Iterator[str]:
    """The run's own token is the only one, and it stands in the environment of the step that needs it."""
    for name, workflow in workflows(files).items():
        if re.search(r"\bsecrets\b", files[name]):
            yield f"{name}: a secret"
        if "github.token" in str(workflow.get("env", "")):
            yield f"{name}: the token is everywhere"


@rule
def checkouts_leave_no_token(files: Files) -> Iterator[str]:
    for name, _, step in steps(files):
        if action(step) == "actions/checkout" and step.get("with", {}).get("persist-credentials") is not False:
            yield f"{name}: the token stays in .git"


@rule
def releases_take_nothing_from_a_cache(files: Files) -> Iterator[str]:
    """A cache that a run of another branch can write to would put its layers or packages into a release."""
    for name, job, step in steps(files):
        if "cache" in action(step) or any("cache" in str(key) for key in step.get("with", {})):
            yield f"{name}: {action(step)} with a cache"
        script = step.get("run", "")
        if rights(job) and (
            re.search(r"--cache-(from|to)|type=gha", script) or ("build.sh" in script and "--no-cache" not in script)
        ):
            yield f"{name}: a build with a cache"


@rule
def third_parties_run_without_rights(files: Files) -> Iterator[str]:
    for name, job, step in steps(files):
        used = action(step)
        if used and not used.startswith(OF_GITHUB) and not rights(job) <= WITH_RIGHTS.get(used, set()):
            yield f"{name}: {used} may write {', '.join(sorted(rights(job)))}"


@rule
def the_scanner_gets_nothing_but_the_list(files: Files) -> Iterator[str]:
    for name, job in image_jobs(files).items():
        for step in job["steps"]:
            if "scan" in action(step) and job["permissions"] != {}:
                yield f"{name}: the scanner has rights"
        if any("scan" in action(step) for step in job["steps"]) and any("run" in step for step in job["steps"]):
            yield f"{name}: a script runs beside the scanner"


@rule
def images_are_scanned_before_they_are_signed_or_named(files: Files) -> Iterator[str]:
    scanning, signing = with_text(files, "scan-action"), with_text(files, "cosign sign")
    naming, releasing = with_text(files, "imagetools create"), with_text(files, "gh release create")
    if not (len(scanning) == len(signing) == 1 and naming == signing and releasing):
        yield "one job scans, and another one signs and names"
        return
    all_jobs = image_jobs(files)
    for name in (*signing, *releasing):
        if not {*scanning} <= needed(all_jobs, name):
            yield f"{name} does not wait for the scan"
    script = "\n".join(step.get("run", "") for step in all_jobs[signing[0]]["steps"])
    if not 0 <= script.find("cosign sign") < script.find("imagetools create"):
        yield "an image gets its name before it is signed"
    for name in with_text(files, "build.sh"):
        script = "\n".join(step.get("run", "") for step in all_jobs[name]["steps"])
        if "--push-by-digest" not in script or re.search(r"--push(?!-by-digest)|docker push|imagetools create", script):
            yield f"{name} pushes under a name"
    scans = [step["with"] for step in all_jobs[scanning[0]]["steps"] if "scan" in action(step)]
    if not all(scan.get("fail-build") is True and scan.get("severity-cutoff") for scan in scans):
        yield "a scan that finds something passes"


@rule
def what_is_signed_is_what_was_built(files: Files) -> Iterator[str]:
    """Every job of a run may replace its artefacts: they are compared with a hash that came as an output."""
    for name in with_text(files, "cosign sign"):
        job = image_jobs(files)[name]
        matrix = job["strategy"]["matrix"]["include"]
        if not all("needs.build.outputs." in row[key] for row in matrix for key in ("digest", "sbom")):
            yield f"{name}: a digest that is no output of the build"
        script = "\n".join(step.get("run", "") for step in job["steps"])
        if "sha256sum --check --strict" not in script or "^sha256:[0-9a-f]{64}$" not in script:
            yield f"{name}: what it signs is not checked"


@rule
def a_release_needs_the_checks_of_its_commit(files: Files) -> Iterator[str]:
    gates = with_text(files, "workflows/checks.yml/runs")
    if len(gates) != 1:
        yield "no job asks for the checks"
        return
    (gate,) = gates
    all_jobs = image_jobs(files)
    for name in set(all_jobs) - {gate}:
        if gate not in needed(all_jobs, name):
            yield f"{name} does not wait for the gate"
    (step,) = [step for step in all_jobs[gate]["steps"] if "checks.yml/runs" in step.get("run", "")]
    if step.get("if") != "github.event_name == 'push'":
        yield "the checks are asked for in some pushes only"
    for wanted in ("head_sha=$GITHUB_SHA", "event=push", "branch=main", "status=success", "compare/main...$GITHUB_SHA"):
        if wanted not in step["run"]:
            yield f"the gate does not ask for {wanted}"
    checks = workflows(files)[CHECKS]
    if checks[True].get("push") != {"branches": ["main"]}:
        yield "main is not checked"
    if checks["concurrency"]["cancel-in-progress"] is True:
        yield "the checks of a commit of main may be cancelled"


@rule
def a_failure_stops_what_comes_after(files: Files) -> Iterator[str]:
    for name, job, _ in jobs(files):
        for part in (job, *job.get("steps", [])):
            if "continue-on-error" in part:
                yield f"{name}: a failure is ignored"
            if re.search(r"always|cancelled|failure", str(part.get("if", ""))):
                yield f"{name}: it also runs after a failure"
        if job.get("timeout-minutes", 1000) > 180:
            yield f"{name}: without an end"


@rule
def only_machines_of_github_are_used(files: Files) -> Iterator[str]:
    for name, job, _ in jobs(files):
        if not re.fullmatch(r"ubuntu-\d\d\.\d\d", str(job.get("runs-on"))):
            yield f"{name}: runs on {job.get('runs-on')}"


# ---- images


@rule
def nothing_on_the_volume_is_imported(files: Files) -> Iterator[str]:
    for name in IMAGE_FILES:
        found = environment(stages(files[name])[-1])
        wanted = {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1", "PIP_CONFIG_FILE": "/dev/null"}
        for variable, value in wanted.items():
            if found.get(variable) != value:
                yield f"{name}: {variable}={found.get(variable)}"
        if not found.get("HOME", "").startswith("/home/"):
            yield f"{name}: the home is on the volume"
        for variable in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH"):
            entries = found.get(variable, "/").split(":")
            if any(not entry.startswith(("/opt/", "/usr/", "/bin", "/sbin")) for entry in entries if entry != "/"):
                yield f"{name}: {variable} leads out of the image"
        if {"LD_PRELOAD", "PYTHONSTARTUP", "BASH_ENV", "ENV", "PYTHONHOME"} & found.keys():
            yield f"{name}: a variable that runs a file"
    start = files["entrypoint/start.sh"]
    if "export PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1\n" not in start.partition("for python in")[0]:
        yield "start.sh looks for torch in the current folder"


@rule
def root_is_given_up(files: Files) -> Iterator[str]:
    for name in IMAGE_FILES:
        last = stages(files[name])[-1]
        entry = re.findall(r"^ENTRYPOINT (.*)$", last, re.MULTILINE)
        if len(entry) != 1 or '"-m", "entrypoint.unprivileged"' not in entry[0]:
            yield f"{name}: {entry}"
        if re.search(r"^USER (root|0)\b", last, re.MULTILINE):
            yield f"{name}: root"


@rule
def the_health_is_checked(files: Files) -> Iterator[str]:
    for name in IMAGE_FILES:
        if not re.search(r'^HEALTHCHECK .*"entrypoint.health"\]$', stages(files[name])[-1], re.MULTILINE):
            yield name


@rule
def bases_have_a_digest_when_an_image_is_pushed(files: Files) -> Iterator[str]:
    known = {"scratch", "${BASE_IMAGE}", "${PYTHON_IMAGE}", "${KILN_IMAGE}"}
    for name in (*IMAGE_FILES, WORKER):
        own = re.findall(r"^FROM \S+ AS (\S+)$", files[name], re.MULTILINE)
        for base in re.findall(r"^FROM (\S+)", files[name], re.MULTILINE):
            if base not in {*known, *own}:
                yield f"{name}: {base} is no argument, so build.sh cannot give it a digest"
        for source in re.findall(r"^COPY .*--from=(\S+)", files[name], re.MULTILINE):
            if source not in own:
                yield f"{name}: copies from {source}"
    if "for argument in BASE_IMAGE PYTHON_IMAGE; do" not in files["build.sh"]:
        yield "build.sh does not look up the digest of each base"


@rule
def secrets_are_in_no_layer(files: Files) -> Iterator[str]:
    for name in (*IMAGE_FILES, WORKER):
        for line in re.findall(r"^(?:ARG|ENV) .*$", "\n".join(stages(files[name])), re.MULTILINE):
            if re.search(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_KEY|INDEX_URL=", line):
                yield f"{name}: {line}"
        last = stages(files[name])[-1]
        if re.search(r"--mount=type=secret|^ADD |curl|wget|git clone", last, re.MULTILINE):
            yield f"{name}: the last stage has a secret, or brings something unpinned"
        if re.search(r"\.netrc|/root/\.|auth\.json|docker/config", "\n".join(stages(files[name]))):
            yield f"{name}: credentials"


@rule
def packages_have_hashes(files: Files) -> Iterator[str]:
    for name in (*IMAGE_FILES, WORKER):
        text = "\n".join(stages(files[name]))
        text = text.replace("$TORCH", dict(re.findall(r'^ARG (TORCH)="(.*)"$', text, re.MULTILINE)).get("TORCH", ""))
        for command in re.findall(r"pip install[^;&|]*", text):
            if "--require-hashes" not in command or "--no-deps" not in command or "--extra-index-url" in command:
                yield f"{name}: {command.strip()}"


@rule
def the_image_holds_no_tools_that_nobody_needs(files: Files) -> Iterator[str]:
    allowed = {"tini", "ca-certificates", "openssh-server", "rsync", "$COMPILER"}
    for name in (*IMAGE_FILES, WORKER):
        for stage in stages(files[name]):
            for command in re.findall(r"apt-get install ([^;&]*)", stage):
                extra = {word for word in command.split() if not word.startswith("-")} - allowed
                if extra or "--no-install-recommends" not in command:
                    yield f"{name}: {command.strip()}"
            if "apt-get install" in stage and "rm -rf /var/lib/apt/lists/*" not in stage:
                yield f"{name}: apt's lists stay"
            if "openssh-server" in stage and "rm -f /etc/ssh/ssh_host_*" not in stage:
                yield f"{name}: every container would have the same host key"
    if 'ARG COMPILER="gcc libc6-dev"' not in files[CUDA]:
        yield "the compiler that triton needs is another one"


@rule
def only_named_files_go_into_the_image(files: Files) -> Iterator[str]:
    lines = [line for line in files[".dockerignore"].splitlines() if line and not line.startswith("#")]
    if lines[0] != "*":
        yield ".dockerignore lists what is left out, and not what goes in"
    for line in lines[1:]:
        if re.search(r"!.*(\.git|\.env|\.venv|tests|\.ssh|\*)", line):
            yield line


# Rule → changes of a file that it must notice.
FAULTS: dict[str, list[tuple[str, str, str]]] = {
    "actions_are_pinned_by_hash": [
        (IMAGES, "@e1165082ffb1fe366ebaf02d8526e7c4989ea9d2 # v7.4.0", "@v7"),
        (IMAGES, " # v4.1.2", ""),
    ],
    "no_job_has_rights_that_it_was_not_given": [
        (IMAGES, "permissions: {}\nconcurrency", "permissions: read-all\nconcurrency"),
        (IMAGES, "    permissions: {} # the scanner", "    # the scanner"),
    ],
    "nobody_elses_text_becomes_a_command": [
        (IMAGES, "tag=$version-${GITHUB_SHA:0:7}", "tag=${{ github.head_ref }}"),
    ],
    "strangers_start_nothing_that_has_rights": [
        (CHECKS, "  pull_request:\n", "  pull_request_target:\n"),
        (IMAGES, "  workflow_dispatch:\n", "  workflow_run: {workflows: [checks]}\n"),
        (IMAGES, "  workflow_dispatch:\n", "  pull_request:\n"),
    ],
    "secrets_are_in_no_workflow": [
        (IMAGES, "${{ github.token }}", "${{ secrets.PAT }}"),
        (CHECKS, "env:\n", "env:\n  T: ${{ github.token }}\n"),
    ],
    "checkouts_leave_no_token": [
        (IMAGES, "persist-credentials: false", "persist-credentials: true"),
        (AUDIT, "persist-credentials: false", "fetch-depth: 1"),
    ],
    "releases_take_nothing_from_a_cache": [
        (IMAGES, "--no-cache --provenance", "--cache-from type=gha --provenance"),
        (IMAGES, "--no-cache --provenance", "--provenance"),
        (CHECKS, 'python-version: "3.12"', "cache: pip"),
    ],
    "third_parties_run_without_rights": [
        (IMAGES, "permissions: {} # the scanner", "permissions: {packages: write} # the"),
        (IMAGES, "contents: read # to check the code out\n      packages", "id-token: write\n      packages"),
    ],
    "the_scanner_gets_nothing_but_the_list": [
        (IMAGES, "permissions: {} # the scanner", "permissions: {contents: read} # the"),
    ],
    "images_are_scanned_before_they_are_signed_or_named": [
        (IMAGES, "needs: [gate, build, scan]", "needs: [gate, build]"),
        (IMAGES, "needs: sign\n", "needs: build\n"),
        (IMAGES, '--push-by-digest --tag "$NAME"', '--push --tag "$NAME"'),
        (IMAGES, "fail-build: true", "fail-build: false"),
        (IMAGES, "          severity-cutoff: critical\n", ""),
        (
            IMAGES,
            "          [[ $DIGEST =~",
            "          docker buildx imagetools create --tag x y\n          [[ $DIGEST =~",
        ),
    ],
    "what_is_signed_is_what_was_built": [
        (IMAGES, "digest: ${{ needs.build.outputs.cuda }}", "digest: latest"),
        (IMAGES, "| sha256sum --check --strict", ""),
        (IMAGES, "[[ $DIGEST =~ ^sha256:[0-9a-f]{64}$ ]]", "true"),
    ],
    "a_release_needs_the_checks_of_its_commit": [
        (IMAGES, "head_sha=$GITHUB_SHA", "per_page=1"),
        (IMAGES, "&branch=main", ""),
        (IMAGES, "&status=success", ""),
        (IMAGES, "compare/main...$GITHUB_SHA", "commits/$GITHUB_SHA"),
        (IMAGES, "    needs: gate\n", ""),
        (IMAGES, "        if: github.event_name == 'push'\n", "        if: false\n"),
        (CHECKS, "branches: [main]", "branches: [next]"),
        (CHECKS, "${{ github.event_name == 'pull_request' }}", "true"),
    ],
    "a_failure_stops_what_comes_after": [
        (IMAGES, "    needs: sign\n", "    needs: sign\n    continue-on-error: true\n"),
        (IMAGES, "    if: github.event_name == 'push'\n    runs-on", "    if: always()\n    runs-on"),
        (AUDIT, "    timeout-minutes: 15\n", ""),
    ],
    "only_machines_of_github_are_used": [
        (IMAGES, "runs-on: ubuntu-24.04", "runs-on: self-hosted"),
    ],
    "nothing_on_the_volume_is_imported": [
        (CUDA, "    PYTHONNOUSERSITE=1 \\\n", ""),
        (CUDA, "    PYTHONSAFEPATH=1 \\\n", "    PYTHONSAFEPATH= \\\n"),
        (CUDA, "    PIP_CONFIG_FILE=/dev/null \\\n", ""),
        (CUDA, "HOME=/home/kiln", "HOME=/workspace"),
        (CUDA, "HOME=/home/kiln", "HOME=/home/kiln LD_PRELOAD=/workspace/x.so"),
        (CUDA, "PYTHONPATH=/opt/kiln \\\n", "PYTHONPATH=:/opt/kiln \\\n"),
        (CUDA, "PYTHONPATH=/opt/kiln \\\n", "PYTHONPATH=/workspace:/opt/kiln \\\n"),
        (ROCM, "    PYTHONNOUSERSITE=1 \\\n", ""),
        (ROCM, "    PYTHONSAFEPATH=1 \\\n", "    PYTHONSAFEPATH= \\\n"),
        (ROCM, "    PIP_CONFIG_FILE=/dev/null \\\n", ""),
        (ROCM, "HOME=/home/kiln", "HOME=/workspace"),
        (ROCM, "HOME=/home/kiln", "HOME=/home/kiln LD_PRELOAD=/workspace/x.so"),
        (ROCM, ":/opt/kiln-libraries \\\n", ":/opt/kiln-libraries: \\\n"),
        (ROCM, ":/opt/kiln-libraries \\\n", ":/workspace/libraries \\\n"),
        ("entrypoint/start.sh", "export PYTHONSAFEPATH=1", "export OTHER=1"),
    ],
    "root_is_given_up": [
        (CUDA, '"entrypoint.unprivileged"', '"entrypoint"'),
        (ROCM, '"entrypoint.unprivileged"', '"entrypoint"'),
        (CUDA, "ENTRYPOINT", "USER root\nENTRYPOINT"),
        (ROCM, "ENTRYPOINT", "USER root\nENTRYPOINT"),
    ],
    "the_health_is_checked": [
        (CUDA, "HEALTHCHECK ", "# "),
        (ROCM, "HEALTHCHECK ", "# "),
    ],
    "bases_have_a_digest_when_an_image_is_pushed": [
        (ROCM, "FROM ${PYTHON_IMAGE} AS build", "FROM python:3.12 AS build"),
        (CUDA, "COPY --from=build /opt/venv", "COPY --from=other/image /opt/venv"),
        ("build.sh", "for argument in BASE_IMAGE PYTHON_IMAGE", "for argument in BASE_IMAGE"),
    ],
    "secrets_are_in_no_layer": [
        (CUDA, 'ARG BAKE_MODEL=""', 'ARG BAKE_MODEL=""\nARG HF_TOKEN'),
        (ROCM, "ENV PIP_NO_CACHE_DIR=1", "ENV PIP_INDEX_URL=https://a:b@c/ PIP_NO_CACHE_DIR=1"),
        (WORKER, "RUN python3", "RUN curl -sf https://x | sh; python3"),
        (WORKER, "RUN python3", "RUN --mount=type=secret,id=x python3"),
    ],
    "packages_have_hashes": [
        (CUDA, 'ARG TORCH="--no-deps --require-hashes', 'ARG TORCH="--no-deps'),
        (ROCM, "--no-deps --require-hashes", "--no-deps"),
        (WORKER, "--require-hashes -r", "--extra-index-url https://x --require-hashes -r"),
    ],
    "the_image_holds_no_tools_that_nobody_needs": [
        (CUDA, "rsync $COMPILER", "rsync git curl $COMPILER"),
        (CUDA, "    && rm -f /etc/ssh/ssh_host_* \\\n", ""),
        (CUDA, 'ARG COMPILER="gcc libc6-dev"', 'ARG COMPILER="build-essential"'),
        (ROCM, "&& rm -rf /var/lib/apt/lists/* \\", "\\"),
    ],
    "only_named_files_go_into_the_image": [
        (".dockerignore", "\n*\n", "\n.git\n"),
        (".dockerignore", "!LICENSE", "!LICENSE\n!.git"),
    ],
}


@pytest.mark.parametrize("name", RULES)
def test_the_rule_holds(name):
    assert list(RULES[name](FILES)) == []


EACH_FAULT = [(name, *fault) for name, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize(
    ("name", "file", "old", "new"), EACH_FAULT, ids=[f"{f[0]}-{n}" for n, f in enumerate(EACH_FAULT)]
)
def test_a_fault_turns_the_rule_red(name, file, old, new):
    assert old in FILES[file], "the fault is no longer possible in this way"
    assert list(RULES[name]({**FILES, file: FILES[file].replace(old, new, 1)})) != []


def test_each_rule_has_a_fault_that_it_finds():
    assert FAULTS.keys() == RULES.keys()


# ---- the same for real, as far as a Python that is here can show it

PLANT = "open({marker!r}, 'w').close()\n"


@pytest.fixture
def planted(tmp_path):
    """A home and a current folder in which every file that Python may pick up leaves a mark; `planted.marks()`."""

    class Planted:
        home, folder, image = tmp_path / "home", tmp_path / "workspace", tmp_path / "image"

        def marks(self):
            return sorted(path.name for path in tmp_path.glob("mark-*"))

    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = Planted.home / ".local/lib" / version / "site-packages"
    for folder in (site, Planted.folder, Planted.image / "torch"):
        folder.mkdir(parents=True)
    for folder, kind in ((site, "user"), (Planted.folder, "current")):
        for name in ("torch", "json", "sitecustomize", "usercustomize", "runpy", "importlib"):
            (folder / f"{name}.py").write_text(PLANT.format(marker=str(tmp_path / f"mark-{kind}-{name}")))
    (site / "x.pth").write_text(f"import os; {PLANT.format(marker=str(tmp_path / 'mark-user-pth'))}")
    (Planted.image / "torch/__init__.py").write_text("")
    (Planted.image / "torch/version.py").write_text("hip = '7.0'\n")
    return Planted()


def python_variables():
    last = environment(stages(FILES[ROCM])[-1])
    return {name: value for name, value in last.items() if name.startswith("PYTHON") and name != "PYTHONPATH"}


def run_planted(planted, *command, **variables):
    return subprocess.run(
        command,
        cwd=planted.folder, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(planted.home), "PYTHONPATH": str(planted.image), **variables},
    )  # fmt: skip


BASE_PYTHON = getattr(sys, "_base_executable", sys.executable)  # outside a virtual environment, as in the image for AMD
IMPORT = ("-c", "import json, torch; print(torch.__file__)")


def test_nothing_that_lies_on_the_volume_is_run(planted):
    done = run_planted(planted, BASE_PYTHON, *IMPORT, **python_variables())
    assert done.stdout == f"{planted.image}/torch/__init__.py\n" and planted.marks() == []


@pytest.mark.parametrize(("left_out", "kind"), [("PYTHONNOUSERSITE", "user"), ("PYTHONSAFEPATH", "current")])
def test_without_one_of_the_variables_it_would_be(planted, left_out, kind):
    variables = {name: value for name, value in python_variables().items() if name != left_out}
    run_planted(planted, BASE_PYTHON, *IMPORT, **variables)
    assert any(mark.startswith(f"mark-{kind}") for mark in planted.marks())


def test_the_start_of_the_image_for_amd_imports_nothing_of_the_volume(planted, tmp_path):
    """Even without the image's variables, as `docker run --env PYTHONSAFEPATH=` would have it."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python3").symlink_to(BASE_PYTHON)
    done = run_planted(
        planted, "sh", str(ROOT / "entrypoint/start.sh"), *IMPORT, PATH=f"{tools}:/usr/bin:/bin", PYTHONSAFEPATH="",
    )  # fmt: skip
    assert done.stdout == f"{planted.image}/torch/__init__.py\n", done.stderr
    assert planted.marks() == []
