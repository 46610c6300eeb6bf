"""A folder for the temporary files of one job, in a place that works.

TMPDIR, or /tmp, may be missing, full, read-only or somebody else's. Then the job's cache folder is used: if nothing can
be written there, the job cannot run anyway. All processes of the job inherit the folder as TMPDIR, and when it ends,
however it ends, the folder is removed (`guard`).
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from trainer.process.vitals import Vitals

log = logging.getLogger(__name__)
VARIABLES = ("TMPDIR", "TEMP", "TMP")  # in the order in which Python looks
USUAL = ("/tmp", "/var/tmp")  # noqa: S108 # nosec B108 (used only through _try)
PROBE_BYTES = 2**20  # more than the plan and the stacks of all processes
NAME = "tmp"  # below the cache folder


@contextmanager
def folder(environment: MutableMapping[str, str], cache: Path) -> Iterator[Path]:
    """Inside, TMPDIR in `environment` is a new folder of this job. Raises OSError where no place can be written."""
    made = _make(environment, cache)
    before = environment.get("TMPDIR")
    environment["TMPDIR"] = str(made)
    tempfile.tempdir, remembered = str(made), tempfile.tempdir
    try:
        yield made
    finally:
        tempfile.tempdir = remembered
        if before is None:
            del environment["TMPDIR"]
        else:
            environment["TMPDIR"] = before
        shutil.rmtree(made, ignore_errors=True)


def _make(environment: Mapping[str, str], cache: Path) -> Path:
    """A new folder in the first place that can be written."""
    named = [(f"{name}={environment[name]}", environment[name]) for name in VARIABLES if environment.get(name)]
    refused = []
    for what, name in [*named, *((usual, usual) for usual in USUAL)]:
        try:
            made = _try(Path(name), environment)
        except OSError as problem:
            refused.append(f"{what} cannot be used ({problem.strerror or problem})")
            continue
        if refused:
            log.warning("%s: temporary files go to %s.", "; ".join(refused), name)
        return made
    place = cache / NAME
    place.mkdir(parents=True, exist_ok=True)
    made = _try(place, environment)
    log.warning("%s: temporary files go to the cache folder, %s.", "; ".join(refused), place)
    return made


def _try(place: Path, environment: Mapping[str, str]) -> Path:
    """A new folder in `place`, closed to others. Raises OSError if it cannot be made, or takes no megabyte."""
    made = Path(os.path.abspath(place)) / f"kiln-{secrets.token_hex(8)}"  # noqa: PTH100 (no links followed)
    vitals = Vitals.of(environment)
    if vitals is not None:  # before it is there: a stop at any moment leaves no folder that the parent does not know
        vitals.write_scratch(str(made))
        vitals.close()
    made.mkdir(mode=0o700)
    try:
        probe = made / "probe"
        probe.write_bytes(bytes(PROBE_BYTES))
        probe.unlink()
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return made
