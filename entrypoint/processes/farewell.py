"""The last line and status.json of a job that was stopped, or killed, before it could say so itself.

The parent of the program (trainer/process/guard.py) calls `say` in a process of its own, when all others have ended. So
nothing here may need what the program had loaded.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from entrypoint import DEFAULT_OUTPUT_PATH
from entrypoint.nodes import cluster
from entrypoint.system.raw_value import raw_value
from trainer.process import guard
from trainer.process.guard import Ending
from trainer.storage.json_files import read_object

GO_ON = "Start the same command again to go on: it resumes automatically."
JOB_ARGUMENTS = frozenset({"train", "-v", "--verbose"})  # any other is of a command that has no status.json


def say(ending: Ending) -> None:
    """Print the last line and complete status.json, so far as the program has not done both."""
    is_job = JOB_ARGUMENTS.issuperset(sys.argv[1:])
    # Of machines that train together the first one alone writes status.json, and knows how far training has come.
    if not is_job or cluster.is_another(raw_value(os.environ, "NODES", is_number=True), os.environ):
        guard.say(ending)
        return
    status_path = output_path(os.environ) / "status.json"
    status = read_object(status_path) or {}
    is_own = isinstance(status.get("started"), float) and status["started"] >= ending.started
    message = ending.cause or f"{ending.stopped_how}{_where(status, is_own=is_own)}."
    has_said = is_own and status.get("phase") in ("stopped", "failed")
    is_stop = ending.stop is not None and ending.exit_code == 128 + ending.stop
    if (is_stop or ending.cause) and not has_said:
        level = "ERROR" if ending.cause else "INFO"
        guard.print_text(f"{time.strftime('%H:%M:%S')} {level} {message} {GO_ON} [exit {ending.exit_code}]")
    if ending.exit_code != 0 and not has_said:
        _write(status_path, status, ending, message, is_own=is_own)


def output_path(environ: Mapping[str, str]) -> Path:
    """OUTPUT_PATH, even if other settings are invalid."""
    return Path(raw_value(environ, "OUTPUT_PATH") or DEFAULT_OUTPUT_PATH).expanduser()


def _where(status: Mapping[str, Any], *, is_own: bool) -> str:
    """What the job was doing."""
    if not is_own:
        return " before training began"
    if status.get("phase") == "done":
        return " after training: the LoRA is complete"
    saved = f"; the newest state is that of step {status['saved_step']}" if status.get("saved_step") else ""
    return f" in the phase '{status.get('phase')}'{saved}"


def _is_held(lock: IO[str]) -> bool:
    """Whether another process holds the folder; else this one does now. On volumes without locks nobody does."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _write(path: Path, status: Mapping[str, Any], ending: Ending, message: str, *, is_own: bool) -> None:
    """Replace status.json, unless another job holds the folder."""
    ended = {"phase": "failed" if ending.cause else "stopped", "exit_code": ending.exit_code, "message": message}
    values = {**status, **ended, "updated": round(time.time(), 3)}
    if not is_own:  # of what an earlier start wrote, its run and step still hold
        values["started"] = values["job_started"] = round(ending.started, 3)
    temporary = path.with_name(".status.kiln.tmp.json")  # as trainer.storage.atomic names it, which removes it
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / ".lock").open("a+", encoding="utf-8") as lock:  # as trainer.storage.locks has it
            if _is_held(lock):
                return
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
