"""The two trees: a commit, and the working tree as it stands. Each is copied to the same place before it is recorded.

So no path differs between the two (states and plans contain paths), and edits during a run change nothing.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class NoSuchCommitError(Exception):
    """BASE names no commit."""


def commit(name: str) -> str:
    """The full hash of a commit. Raises NoSuchCommitError."""
    ran = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise NoSuchCommitError(f"BASE={name} is no commit of this repository.")
    return ran.stdout.strip()


def copy_commit(sha: str, target: Path) -> None:
    """The files of a commit, without a worktree that git would have to forget again."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", sha], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(target, filter="tar")


def copy_working_tree(target: Path) -> None:
    """All files that are tracked, or could be, with their changes."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for name in listed.stdout.split("\0"):
        source = ROOT / name
        if name and (source.is_file() or source.is_symlink()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
