"""Folders whose files are run: nobody else may be able to write there.

The compilers of torch and triton load libraries from their caches, and Python imports FlashAttention 4 from CACHE_PATH.
None of them asks who wrote what it loads. On a shared volume, or below /tmp, somebody else could put a library of his
own there, which would run with the rights of the job. So such a folder is used only if it belongs to this user, and if
no one else can write to it, to what it holds, or to a folder above it, where it could be replaced.
"""

from __future__ import annotations

import grp
import logging
import os
import pwd
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)
PRIVATE = 0o700
ROOT = 0
# The caches of compiled code, by the variable that names their folder; and the folder below CACHE_PATH/kernels where it
# is not set, or cannot be used. By default it would be below HOME, or a name in /tmp that anybody can guess. Those with
# None have places of their own.
CACHES: dict[str, str | None] = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": None,
    "MIOPEN_USER_DB_PATH": None,
    "MIOPEN_CUSTOM_CACHE_DIR": None,
}


def make_private(place: Path) -> Path | None:
    """Make the folder, if it is not there; returns its real path. None where others can change what it holds."""
    try:
        place.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        real = place.resolve(strict=True)  # a link could lead elsewhere later
        status = real.lstat()
        is_ours = status.st_uid == os.geteuid() and not _others_write(status) and os.access(real, os.W_OK | os.X_OK)
        if is_ours and all(map(_is_safe_above, real.parents)) and _holds_nothing_of_others(real):
            return real
    except (OSError, RuntimeError, ValueError):  # read-only, or a loop of links
        pass
    return None


def _is_safe_above(folder: Path) -> bool:
    """Whether others cannot put another folder in the place of one in this one. The sticky bit forbids it (/tmp)."""
    status = folder.lstat()
    is_sticky = bool(status.st_mode & stat.S_ISVTX)
    return status.st_uid in (ROOT, os.geteuid()) and (is_sticky or not _others_write(status))


def _others_write(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_own_group(status.st_gid)


def _is_own_group(gid: int) -> bool:
    """Whether a group has one member, this user: many systems give each user one, with the same number."""
    if gid == ROOT or gid != os.geteuid():
        return False
    try:
        return set(grp.getgrgid(gid).gr_mem) <= {pwd.getpwuid(gid).pw_name}
    except KeyError:  # a number without a name, as in a container
        return True


def _holds_nothing_of_others(folder: Path) -> bool:
    """Whether all files belong to this user: the folder may have been open to others in the past."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(place, name))  # noqa: PTH118 (there may be many)
            is_link = stat.S_ISLNK(status.st_mode)
            if status.st_uid not in (ROOT, os.geteuid()) or (_others_write(status) and not is_link):
                return False
    return True


def compile_caches(environment: Mapping[str, str], cache: Path, *, scratch: Path) -> dict[str, str]:
    """The variables of the caches of compiled code, with folders that are private and can be written.

    `cache`: CACHE_PATH. `scratch`: a folder of this job's own, for the cache that has no other place; it is empty at
    each start.
    """
    own = {}
    instead = {}  # variable → the place that is not used
    for variable, below in CACHES.items():
        asked = environment.get(variable, "")
        if not asked and below is None:
            continue
        places = [Path(asked)] if asked else []
        places.append(cache / "kernels" / (below or variable.lower()))
        private = next(filter(None, map(make_private, places)), None) or _fresh(places[0], scratch)
        if str(private) != os.path.realpath(places[0]):
            instead[variable] = str(places[0])
        own[variable] = str(private)
    if instead:
        log.warning(
            "Compiled kernels go to %s instead of %s: there nothing can be written, or others can write too, and what "
            "such a folder holds is run. Fix: set %s to a folder that this user alone can write to.",
            ", ".join(dict.fromkeys(str(Path(own[variable]).parent) for variable in instead)),
            ", ".join(dict.fromkeys(instead.values())),
            ", ".join(instead),
        )
    return own


def _fresh(place: Path, scratch: Path) -> Path:
    """A new folder with a name that nobody can guess: in `scratch`, unless no program may be run from there."""
    parent = scratch
    with suppress(OSError, AttributeError):
        if os.statvfs(scratch).f_flag & os.ST_NOEXEC and os.access(place, os.W_OK):
            parent = place
    return Path(tempfile.mkdtemp(prefix="compiled-", dir=parent))
