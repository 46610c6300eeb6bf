"""How a job is tried again inside its container, on engines that try again after every exit code or after none.

Exit code 75 says that another try may do (no network, no memory left, a hang): the job resumes from its last save.
Every other code ends the container with it. A signal is handed on to the job, which then saves and ends with 143.
"""

from __future__ import annotations

from trainer.process.guard import KILLED_EXIT_CODE

TRIES = 5
PAUSE_S = 60
# The same as the image's own start. Written out, since some engines start a shell in the image by SSH, without its
# ENTRYPOINT and without the variables that it sets.
START = "/opt/venv/bin/python -m entrypoint.unprivileged train"
IMAGE_VARIABLES = {
    "PYTHONPATH": "/opt/kiln",
    "PYTHONSAFEPATH": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONUNBUFFERED": "1",
    "PATH": "/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "XDG_CACHE_HOME": "/workspace/.cache",
    "OUTPUT_PATH": "/workspace/output",
    "CACHE_PATH": "/workspace/cache",
    "HF_HOME": "/workspace/hf",
}


def loop(start: str = START, *, tries: int = TRIES, pause_s: int = PAUSE_S) -> str:
    """A script for any POSIX shell: `start`, again while it exits with 75, `tries` times at most.

    `wait` returns when a signal arrives, before the job has ended: so it is asked until the job is gone. A signal that
    arrives before the shell knows the job's number is handed on as soon as it does.
    """
    return "\n".join(
        (
            "stopped= tries=0 job=",
            'trap \'stopped=yes; [ -z "$job" ] || kill -TERM "$job"\' TERM INT HUP',
            "while :; do",
            "  job=",
            f"  {start} &",
            "  job=$!",
            '  [ -z "$stopped" ] || kill -TERM "$job"',
            '  wait "$job"; code=$?',
            '  while kill -0 "$job" 2>/dev/null; do wait "$job"; code=$?; done',
            "  tries=$((tries + 1))",
            f'  if [ "$code" != {KILLED_EXIT_CODE} ] || [ -n "$stopped" ] || [ "$tries" -ge {tries} ]; then',
            '    exit "$code"',
            "  fi",
            f'  sleep {pause_s} & job=$!; wait "$job"; [ -z "$stopped" ] || exit 143',
            "done",
            "",
        )
    )


def with_image_variables(start: str = START) -> str:
    """`start` where the image's own variables are not set."""
    names = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONNOUSERSITE", "PYTHONUNBUFFERED", "PATH", "XDG_CACHE_HOME")
    words = [f"{name}={IMAGE_VARIABLES[name]}" for name in names]
    return f"env {' '.join(words)} {start}"
