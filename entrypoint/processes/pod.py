"""The pod that a job runs in: stop or terminate it through RunPod's API, and open SSH for its owner."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from entrypoint.fetch.http import RetryPolicy
from entrypoint.runpod.api import RunPod
from entrypoint.system.environment import child_environment
from trainer.spec.errors import KilnError, SettingsError

log = logging.getLogger(__name__)


def asked_to_end(action: str, pod: str, environ: Mapping[str, str], retries: RetryPolicy) -> bool:
    """Ask RunPod to stop or terminate this pod: by its REST API, the older GraphQL API, or the runpodctl in the pod."""
    try:
        api = RunPod.from_environment(environ, retries=retries)
    except SettingsError as problem:
        log.warning("%s", problem)
    else:
        for ask in (api.act, api.act_by_graphql):
            try:
                ask(pod, action)
                return True
            except KilnError as problem:
                log.warning("%s", problem)
    program = shutil.which("runpodctl")
    if program is None:
        return False
    words = {"stop": ("stop", "pod"), "terminate": ("remove", "pod")}[action]
    own = {**child_environment(environ, network=True), **{k: environ[k] for k in ("RUNPOD_API_KEY",) if k in environ}}
    done = subprocess.run(  # noqa: S603
        [program, *words, pod],
        env=own,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return done.returncode == 0


def how_to_fetch(out: Path, environ: Mapping[str, str], *, action: str, uploaded_to: str | None) -> str | None:
    """How the owner of this pod gets the results of a job that is done; None where this is no pod.

    `action`: what ON_FINISH does with the pod. `uploaded_to`: PUSH_TO_HUB, or UPLOAD_TO.
    """
    pod = environ.get("RUNPOD_POD_ID", "")
    if not pod:
        return None
    if action == "terminate":
        text = "ON_FINISH=terminate deletes this pod now, with its volume and everything on it but a network volume."
        if uploaded_to is None:
            return f"{text} Nothing was uploaded, since PUSH_TO_HUB is not set."
        on_the_hub = "" if "://" in uploaded_to else " on the Hub"
        return f"{text} The results are in {uploaded_to}{on_the_hub}."
    text = (
        f"To fetch the results: python -m entrypoint.runpod fetch {pod} on your computer, which starts the pod again "
    )
    text += (
        f"if it is stopped. Or in this pod: runpodctl send {out}, and on your computer the runpodctl receive that it "
    )
    return f"{text}prints. A pod that is started again after its job stays up half an hour for this."


def start_ssh(environ: Mapping[str, str]) -> None:
    """Start sshd with the public key that RunPod passes in, so that the pod's owner can use rsync and scp."""
    key, server = environ.get("PUBLIC_KEY", "").strip(), Path("/usr/sbin/sshd")
    if not key or not server.is_file() or os.geteuid() != 0:
        return
    try:
        folder = Path("/root/.ssh")
        folder.mkdir(mode=0o700, exist_ok=True)
        keys = folder / "authorized_keys"
        keys.write_text(f"{key}\n", encoding="utf-8")
        keys.chmod(0o600)
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for command in (["/usr/bin/ssh-keygen", "-A"], [str(server), "-o", "PasswordAuthentication=no"]):
            subprocess.run(  # noqa: S603
                command, env=child_environment(environ), stdin=subprocess.DEVNULL, check=True, capture_output=True
            )
        log.info("SSH accepts the keys of this RunPod account.")
    except (OSError, subprocess.CalledProcessError) as problem:
        log.warning("SSH could not be started: %s", problem)
