"""`python -m entrypoint.unprivileged`: how a container starts. Gives up root where the job can do without it.

An image cannot know which user may write to the volume that it will be given, and a volume that root alone can write to
is usual on rented machines. So the images start as root, and this program looks: if a user who is not root can write to
the job's folders and open its devices, it becomes that user, and then runs `python -m entrypoint`. Else it goes on as
root, and says why. `docker run --user` decides otherwise; `shell`, `sample` and `export` run as the container started.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from entrypoint import DEFAULT_OUTPUT_PATH
from entrypoint.settings.variables import NAMES
from entrypoint.system.hardware import DEVICE_FILES
from trainer.process import streams
from trainer.spec.log_lines import safe_lines
from trainer.storage.folders import nearest_existing

USER, GROUP = 10001, 0  # where the volume is root's: any number that nobody has, and the group of the image's folders
WRITTEN = ("OUTPUT_PATH", "CACHE_PATH", "HF_HOME")
SEARCHED = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
AS_STARTED = ("shell", "sample", "export")  # they write where their arguments say
LONGEST_ANSWER = 4096  # bytes: a pipe takes them at once


@dataclass(frozen=True)
class Identity:
    """The user to become."""

    uid: int
    gid: int
    groups: tuple[int, ...]  # those of --group-add, which AMD's devices need

    def take(self) -> None:
        """Become this user, for good. Raises OSError where the container may not change its user."""
        os.setgroups([*self.groups])
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)


def main(arguments: Sequence[str]) -> None:
    """Replace this process by the entrypoint."""
    is_pod = bool(os.environ.get("RUNPOD_POD_ID"))  # one tenant's own machine, which is entered as root by SSH
    stays = is_pod or os.geteuid() != 0 or (bool(arguments) and arguments[0] in AS_STARTED)
    why = "" if stays else give_up_root(os.environ)
    if why:
        print(safe_lines(f"This container goes on as root: {why} (docs/docker.md)"), file=sys.stderr)  # noqa: T201
    words = [sys.executable, "-m", "entrypoint", *arguments]
    os.execve(sys.executable, words, without_current_folder(os.environ))  # noqa: S606 (a program of ours)


def without_current_folder(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ`, in which no list of folders has an empty or relative entry: it would mean one on the volume."""
    own = dict(environ)
    for name in SEARCHED:
        if name in own:
            own[name] = os.pathsep.join(place for place in own[name].split(os.pathsep) if place.startswith("/"))
    return own


def give_up_root(environ: Mapping[str, str]) -> str:
    """Become the owner of the volume, or `USER` where that is root; returns why this process is still root, or ""."""
    written = [nearest_existing(Path(environ.get(name, "").strip() or DEFAULT_OUTPUT_PATH)) for name in WRITTEN]
    status = written[0].stat()
    uid, gid = (status.st_uid, status.st_gid) if status.st_uid else (USER, GROUP)
    identity = Identity(uid, gid, tuple(group for group in os.getgroups() if group != 0))
    named = [value for name, value in environ.items() if name in NAMES and value.startswith("/")]
    read = [Path(value) for value in named if os.path.exists(value)]  # noqa: PTH110 (never raises)
    devices = [path for pattern in DEVICE_FILES for path in sorted(Path("/").glob(pattern.removeprefix("/")))]
    if refused := _refused(identity, written=[*written, *devices], read=read):
        return f"user {uid} {refused}. Fix: give it to that user, or start the container with --user."
    try:
        identity.take()
    except OSError as problem:
        return f"it may not become user {uid} ({problem.strerror})."
    return ""


def _refused(identity: Identity, *, written: Sequence[Path], read: Sequence[Path]) -> str:
    """What this user may not do, or "". Only the kernel knows, so a child becomes that user and tries."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = "may not be taken here"
        try:
            identity.take()
            answer = _first_refused(written, read)
        except OSError as problem:
            answer = f"cannot be taken ({problem.strerror})"
        finally:
            os.write(writer, answer.encode("utf-8", "replace")[:LONGEST_ANSWER])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        answer = answers.read().decode("utf-8", "replace")
    os.waitpid(child, 0)
    return answer


def _first_refused(written: Sequence[Path], read: Sequence[Path]) -> str:
    for place in written:
        needed = os.R_OK | os.W_OK
        if place.is_dir():
            needed |= os.X_OK
        if not os.access(place, needed):
            return f"cannot write to {place}"
    for place in read:
        if not os.access(place, os.R_OK):
            return f"cannot read {place}"
    return ""


if __name__ == "__main__":
    streams.protect()
    main(sys.argv[1:])
