"""What was found in the images that a command has read already, for the next of its jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trainer.data.compact.examined import FileInfo

MOST = 200_000  # files that are remembered, with some hundred bytes each
Version = tuple[int, ...]


class SeenFiles:
    """Images by their paths, each as long as its file has not changed."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Version, FileInfo | str]] = {}

    def examined(
        self, files: Sequence[Path], examine: Callable[[Sequence[Path]], Iterator[FileInfo | str]]
    ) -> Iterator[FileInfo | str]:
        """What is in each of the `files`, in order. Those that are not known are examined."""
        versions = [_version(file) for file in files]
        new = []
        for file, version in zip(files, versions, strict=True):
            if self._known(file, version) is None:
                new.append(file)
        found = examine(new) if new else iter(())
        for file, version in zip(files, versions, strict=True):
            info = self._known(file, version)
            if info is None:
                info = next(found)
                if version is not None and len(self._seen) < MOST:
                    self._seen[str(file)] = (version, info)
            yield info

    def _known(self, file: Path, version: Version | None) -> FileInfo | str | None:
        of_file = self._seen.get(str(file))
        return of_file[1] if of_file is not None and of_file[0] == version else None


def _version(file: Path) -> Version | None:
    """What changes with the file; None where it is not there."""
    try:
        status = file.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
