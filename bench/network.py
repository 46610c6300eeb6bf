"""Several machines, as far as the network sees them: network namespaces, joined by a bridge, on this one.

Each has its own interface `eth0` with an address of its own, its own loopback device and ports; `cut` takes the cable
out. Files and processes are those of this machine. Needs a kernel that allows namespaces to this user.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

VARIABLE = "KILN_TEST_MACHINE"  # in inside_network/sitecustomize.py as well
SITE = Path(__file__).parent / "inside_network"

# In a user namespace of its own, where we may do everything to networks: a bridge, and for each machine a process that
# holds its network namespace. The last word is the processes' numbers.
SETUP = """
set -e
ip link set lo up
ip link add bridge0 type bridge
ip link set bridge0 up
pids=""
for k in $(seq 0 $(($1 - 1))); do
    unshare -n sleep infinity &
    pid=$!
    until [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.01; done
    ip link add veth$k type veth peer name eth0 netns $pid
    ip link set veth$k master bridge0 up
    nsenter -t $pid -n ip link set lo up
    nsenter -t $pid -n ip addr add 10.77.0.$((k + 1))/24 dev eth0
    nsenter -t $pid -n ip link set eth0 up
    pids="$pids $pid"
done
echo $$ $pids
read -r _
kill $pids
"""
TOOLS = ("unshare", "nsenter", "ip")


class Network:
    """`count` machines; a context."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> Network:
        self._holder = subprocess.Popen(
            ["unshare", "-rn", "bash", "-c", SETUP, "network", str(self.count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout
        self._bridge, *self._machines = self._holder.stdout.readline().split()
        assert len(self._machines) == self.count
        return self

    def __exit__(self, *_problem: object) -> None:
        assert self._holder.stdin
        self._holder.stdin.close()
        self._holder.wait(timeout=10)

    @staticmethod
    def address(machine: int) -> str:
        return f"10.77.0.{machine + 1}"

    def variables(self, machine: int) -> dict[str, str]:
        """What puts a Python program onto that machine, with all that it starts."""
        return {"PYTHONPATH": str(SITE), VARIABLE: self._machines[machine]}

    def cut(self, machine: int) -> None:
        """Nothing gets to this machine any more, and nothing from it."""
        self._ip("link", "set", f"veth{machine}", "down")

    def mend(self, machine: int) -> None:
        self._ip("link", "set", f"veth{machine}", "up")

    def _ip(self, *arguments: str) -> None:
        inside = ["nsenter", "--preserve-credentials", "-U", "-n", "-t", self._bridge]
        subprocess.run([*inside, "ip", *arguments], check=True)


def why_not() -> str:
    """Why there can be no such network here; "" if there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (util-linux, iproute2)"
    tried = subprocess.run(
        ["unshare", "-rn", "ip", "link", "add", "bridge0", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        return f"this kernel allows no network of one's own: {tried.stderr.strip()} (user {os.getuid()})"
    return ""
