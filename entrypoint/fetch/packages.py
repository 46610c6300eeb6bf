"""Install packages that the images lack: from the package index into the cache, once, by a lock with hashes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from entrypoint.system.environment import child_environment, package_index


def pip_install(lock: Path, place: Path, *, seconds: float) -> str:
    """Fill the folder `place` with the packages of a lock; returns why that failed, or "".

    No package brings others, none is built here, and none is taken whose hash is not in the lock.
    """
    # --compile: bytecode written at the first import would change the folder after it was recorded as complete.
    options = ("--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-cache-dir", "--compile")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *options, "--target", str(place)]
    command += ["-r", str(lock)]
    try:
        with tempfile.TemporaryDirectory(dir=place) as scratch:  # /tmp may be small
            own = child_environment(os.environ, network=True) | package_index(os.environ) | {"TMPDIR": scratch}
            done = subprocess.run(  # noqa: S603
                command,
                env=own,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return f"pip did not end in {seconds:.0f} s"
    if done.returncode == 0:
        return ""
    # pip first says that it retries, and last why it gives up.
    output = done.stderr.strip()
    return (output.partition("ERROR: ")[2] or output or f"pip: {done.returncode}")[:500]
