"""Slurm: a batch script, with pyxis or apptainer for the container.

The step gets SIGTERM before the limit of time (`--signal` without `B:`), and saves. The script then asks for the same
job again (`scontrol requeue`) where its exit code says that another try may do: after 75 with a pause, until the job
has been started again RESTARTS times. Slurm itself requeues after the loss of a node and after a preemption
(`--requeue`). `scancel` signals the script as well, which then asks for nothing.
https://slurm.schedmd.com/sbatch.html
"""

from __future__ import annotations

import shlex

from entrypoint.engines.again import IMAGE_VARIABLES, PAUSE_S, START
from entrypoint.engines.documents import GRACE_S, Document
from entrypoint.engines.request import STOPPED_EXIT_CODE, Request
from trainer.process.guard import KILLED_EXIT_CODE
from trainer.spec.errors import SettingsError

RESTARTS = 20  # many, since Slurm counts preemptions and limits of time too
NAMES: dict[str, object] = {}  # sites name their GPUs as they like


def make(request: Request, *, container: str, gres: str) -> Document:
    """The batch script. `container`: pyxis or apptainer. `gres`: what the site calls its GPUs."""
    if not request.storage:
        raise SettingsError(
            "Slurm needs --storage FOLDER: one that every node sees, which the job has at /workspace, with its images, "
            "models and results."
        )
    minutes = round(request.hours * 60)
    export = ",".join(request.secrets) or "NONE"
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={request.name}",
        f"#SBATCH --nodes={request.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --cpus-per-task={8 * request.count}",
        f"#SBATCH --gres={gres or 'gpu'}:{request.count}",
        f"#SBATCH --time={minutes}",
        f"#SBATCH --signal=TERM@{GRACE_S}",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={request.name}-%j.log",
        f"#SBATCH --export={export}",
        f"# A GPU with {request.least_memory_mib / 1024:.0f} GiB or more: the planner says that the job fits there.",
        "",
    ]
    for name, value in request.variables.items():
        lines.append(f"export {name}={shlex.quote(value)}")
    for name in ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME", "XDG_CACHE_HOME"):
        lines.append(f"export {name}={IMAGE_VARIABLES[name]}")
    # Without --export=ALL, srun would hand on what sbatch's --export says, and not what this script has set.
    lines += [
        "cancelled=",
        "trap 'cancelled=yes' TERM",
        f"{_step(request, container)} &",
        "step=$!",
        'wait "$step"; code=$?',
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done',
        *_again(request),
        'exit "$code"',
        "",
    ]
    file = f"{request.name}.sbatch"
    notes = [f"The image needs the driver of CUDA 13. {container}: docs/engines.md says how it gets the image."]
    return Document(file, "\n".join(lines), ("sbatch", file), "sbatch", "Slurm's own package", notes=tuple(notes))


def _again(request: Request) -> list[str]:
    """Lines that ask for the same job again. After 143 at once: the limit of time is near."""
    requeue = '[ -n "$cancelled" ] || scontrol requeue "$SLURM_JOB_ID"'
    lines = ['case "$code" in', f"  {KILLED_EXIT_CODE})"]
    lines += [
        f'    if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {RESTARTS} ]; then',
        f"      sleep {PAUSE_S} & wait $!",
        f"      {requeue}",
        "    fi ;;",
    ]
    if STOPPED_EXIT_CODE in request.again:
        lines.append(f"  {STOPPED_EXIT_CODE}) {requeue} ;;")
    return [*lines, "esac"]


def _step(request: Request, container: str) -> str:
    """The step that runs the container."""
    if container == "pyxis":
        words = ["srun", "--export=ALL", f"--container-image={_for_pyxis(request.image)}"]
        words += [f"--container-mounts={request.storage}:/workspace", "--container-workdir=/workspace"]
        names = [*request.variables, *request.secrets]
        words += [f"--container-env={','.join(names)}", "--no-container-mount-home", *START.split()]
        return shlex.join(words)
    words = ["srun", "--export=ALL", "apptainer", "exec", "--nv", "--no-home", "--pwd", "/workspace"]
    words += ["--bind", f"{request.storage}:/workspace", f"docker://{request.image}"]
    words += ["env", "PYTHONPATH=/opt/kiln", "PYTHONSAFEPATH=1", *START.split()]
    return shlex.join(words)


def _for_pyxis(image: str) -> str:
    """enroot writes REGISTRY#NAME for an image of another registry than Docker's."""
    registry, slash, name = image.partition("/")
    if slash and ("." in registry or ":" in registry):
        return f"{registry}#{name}"
    return image
