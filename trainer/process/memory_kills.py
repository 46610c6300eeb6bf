"""Whether the kernel ended a process because memory ran out.

A process that is killed for memory cannot say so, and its exit code (137) is that of any SIGKILL. But the kernel counts
such kills: in each control group (a container is one) and for the whole machine. `count` reads the counters before,
`explain` compares afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

GROUPS = "/sys/fs/cgroup"
KIB, GIB = 2**10, 2**30
NO_LIMIT = 2**60  # version 1 writes "none" as a number near 2^63
FIX = (
    "Fix: give the container or the machine more memory (docker run --memory, a pod with more RAM), end other "
    "programs, or need less: a smaller PARAMS_BATCH_SIZE or PARAMS_RESOLUTION, or PARAMS_OFFLOAD=none where the card "
    "has room."
)


class Counts(NamedTuple):
    """How many processes the kernel has killed for memory; None where it does not say."""

    group: int | None
    machine: int | None


def count(groups: str = GROUPS, proc: str = "/proc") -> Counts:
    """The counters now: of this process's control group (version 2 or 1), and of the machine."""
    group = None
    for folder in _folders(groups, proc):
        for name in ("memory.events", "memory.oom_control"):
            if group is None:
                group = _field(f"{folder}/{name}", "oom_kill")
    return Counts(group, _field(f"{proc}/vmstat", "oom_kill"))


def limit(groups: str = GROUPS, proc: str = "/proc") -> int | None:
    """The most memory that this control group may take, in bytes; None where it has no limit."""
    limits = []
    for folder in _folders(groups, proc):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(f"{folder}/{name}").strip()
            if text.isdecimal() and int(text) < NO_LIMIT:
                limits.append(int(text))
    return min(limits, default=None)


def explain(before: Counts, used: Mapping[str, int] | None = None, *, groups: str = GROUPS, proc: str = "/proc") -> str:
    """What ended a process that SIGKILL ended, in words that follow its name.

    `before`: the counters at its start. `used`: names of the job's processes → the most bytes that each was seen
    to hold.
    """
    now = count(groups, proc)
    most = limit(groups, proc)
    machine = f"{(_field(f'{proc}/meminfo', 'MemTotal:') or 0) * KIB / GIB:.1f} GiB"
    if _has_grown(before.group, now.group) and most is not None:
        what = f"was killed by the kernel for memory: the container's limit of {most / GIB:.1f} GiB was reached"
    elif _has_grown(before.group, now.group) or _has_grown(before.machine, now.machine):
        what = f"was killed by the kernel for memory: the machine's {machine} were used up"
    else:
        allowed = f", of which the container may use {most / GIB:.1f} GiB" if most is not None else ""
        what = "was killed (SIGKILL): by someone, or probably for memory, although the kernel does not say so. The "
        what += f"machine has {machine}{allowed}"
    if used:
        held = ", ".join(f"{name} {size / GIB:.1f} GiB" for name, size in used.items())
        what += f"; the most that was seen in use: {held}"
    return f"{what}. {FIX}"


def resident(number: int, proc: str = "/proc") -> int:
    """The memory of a process and its children in bytes; 0 if it is gone."""
    total = _field(f"{proc}/{number}/status", "VmRSS:") or 0
    for task in _read(f"{proc}/{number}/task/{number}/children").split():
        total += resident(int(task), proc) // KIB
    return total * KIB


def _has_grown(before: int | None, now: int | None) -> bool:
    return now is not None and now > (before or 0)


def _folders(groups: str, proc: str) -> list[str]:
    """The folders of this process's control group, the most specific first.

    Inside a container the path in /proc/self/cgroup may be the host's; then the group is at the root.
    """
    found = []
    for line in _read(f"{proc}/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            tops = [groups, f"{groups}/unified"]
        elif "memory" in controllers.split(","):
            tops = [f"{groups}/memory"]
        else:
            continue
        for top in tops:
            for folder in (f"{top}{path.rstrip('/')}", top):
                if os.path.isdir(folder) and folder not in found:  # noqa: PTH112 (pathlib is slow to import)
                    found.append(folder)
    return found


def _field(path: str, name: str) -> int | None:
    """The number after `name` in a file of the kernel's."""
    for line in _read(path).splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123 (as above)
            return file.read()
    except OSError:
        return ""
