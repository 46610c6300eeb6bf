"""Copy a pod's results to this machine over SSH, with the programs that are installed here."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from entrypoint.runpod.api import RunPod
from entrypoint.system.environment import child_environment
from trainer.network.addresses import problem_of
from trainer.spec.errors import SettingsError, UnreachableError
from trainer.spec.values import printable

READY_TIMEOUT_S = 600.0  # a pod that has to load its image again takes minutes
SSH_TIMEOUT_S = 60.0  # of a running pod: the address follows within seconds, where the owner has a public key
# A pod gets a new host key with each start, at an address that other pods had before.
SSH_OPTIONS = ("-o", "StrictHostKeyChecking=accept-new", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR")
SSH_VARIABLES = ("SSH_AUTH_SOCK", "SSH_ASKPASS", "DISPLAY")  # of the agent that holds the user's keys
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
ENDED_STATUSES = ("ERROR", "TERMINATED")


class SshHost(NamedTuple):
    """Where a pod's SSH server listens."""

    user: str
    host: str
    port: int


def ssh_host(pod: Mapping[str, Any]) -> SshHost | None:
    """The pod's direct SSH address; None where it has none (yet), or no public key of its owner."""
    ssh = pod.get("ssh")
    direct = ssh.get("direct") if isinstance(ssh, Mapping) else None
    if not direct:
        return None
    # Parts of a command: what begins with a hyphen would be an option of ssh, some of which run programs.
    match direct:
        case {"username": str(user), "host": str(host), "port": int(port)} if (
            USER.fullmatch(user)
            and HOST.fullmatch(host)
            and problem_of(f"ssh://{host}:{port}", schemes=("ssh",)) is None
        ):
            return SshHost(user, host, port)
    raise UnreachableError(f"RunPod's answer has an SSH address that is none: {printable(str(direct))}.")


def wait_for_ssh(api: RunPod, pod_id: str, *, timeout_s: float = READY_TIMEOUT_S) -> SshHost:
    """The pod's SSH address, as soon as it has one. Raises UnreachableError if it gets none."""
    deadline = time.monotonic() + timeout_s
    running = False
    while True:
        pod = api.pod(pod_id)
        host = ssh_host(pod)
        if host is not None:
            return host
        if pod["status"] in ENDED_STATUSES:
            raise SettingsError(f"{pod_id} is {pod['status']}: there is nothing to download.")
        if pod["status"] == "RUNNING" and not running:
            running = True
            deadline = min(deadline, time.monotonic() + SSH_TIMEOUT_S)
        if time.monotonic() > deadline:
            raise UnreachableError(
                f"{pod_id} ({pod['status']}) has no SSH address. Add your public key at "
                "https://console.runpod.io/user/settings and start the pod again, or use runpodctl: "
                f"`python -m entrypoint.runpod status {pod_id}` prints the commands."
            )
        time.sleep(api.retries.longest_wait)


def commands(host: SshHost, folder: str, target: Path) -> list[list[str]]:
    """The commands that copy `folder`, in order of preference. rsync continues where an earlier copy was cut off."""
    ssh = ["ssh", "-p", str(host.port), *SSH_OPTIONS]
    address = f"{host.user}@{host.host}:{folder}"
    # Files and folders alone (-rt, not -a): a link that the pod sends could lead out of the folder, and so could what
    # is written through it.
    rsync = ["rsync", "-rtv", "--partial", "-e", " ".join(ssh), "--", f"{address}/", f"{target}/"]
    scp = ["scp", "-r", "-P", str(host.port), *SSH_OPTIONS, "--", f"{address}/.", f"{target}/"]
    return [rsync, scp]


def copy(host: SshHost, folder: str, target: Path, *, environ: Mapping[str, str]) -> int:
    """Copy `folder` into `target` with the first program that is installed here; returns 0.

    Raises SettingsError without such a program, UnreachableError where it fails.
    """
    for command in commands(host, folder, target):
        program = shutil.which(command[0])
        if program is None:
            continue
        target.mkdir(parents=True, exist_ok=True)
        own = child_environment(environ) | {name: environ[name] for name in SSH_VARIABLES if name in environ}
        done = subprocess.run([program, *command[1:]], env=own, check=False)  # noqa: S603 (what the user asks for)
        if done.returncode:
            raise UnreachableError(f"{command[0]} ended with {done.returncode}. What was copied is kept: try again.")
        return 0
    raise SettingsError("Neither rsync nor scp is installed here. Install one, or use `runpodctl receive`.")
