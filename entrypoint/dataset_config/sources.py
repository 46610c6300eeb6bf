"""What DATASET_NAME and a subset's image_dir name: a folder, an archive, its URL, or a dataset of the Hub."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from entrypoint.settings.checks import absolute, is_file, is_folder
from trainer.spec.values import show

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")  # what `entrypoint.fetch.archive` reads
OTHER_ARCHIVES = (".rar", ".7z", ".zst", ".gz", ".bz2", ".xz", ".lz4")
HUB_ID = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)  # org/name, or name; 96 characters at most each


def classify(location: str, *, hub: bool = True) -> tuple[str, str]:
    """The kind of a source (folder, archive or hub), and its absolute path, URL or Hub id.

    Without `hub`, a name that does not exist is a folder. Raises ValueError if it is none of them.
    """
    lower = location.lower()
    if not location:
        raise ValueError("an empty name. Allowed: a Hub dataset (org/name), a folder, an archive or its URL")
    if "://" in location:
        return "archive", _archive_url(location)
    if is_folder(location):
        return "folder", absolute(location)
    if lower.endswith(ARCHIVES):
        return "archive", absolute(location)
    if lower.endswith(OTHER_ARCHIVES):
        raise ValueError(f"{show(location)} is an archive of a format that is not read. Allowed: {', '.join(ARCHIVES)}")
    if is_file(location):
        raise ValueError(f"{show(location)} is a file, but not an archive. Allowed: a folder, or {', '.join(ARCHIVES)}")
    # A folder that does not exist yet may be mounted where the job runs: preflight looks for it.
    if not hub or location.startswith(("/", ".", "~")):
        return "folder", absolute(location)
    if HUB_ID.fullmatch(location):
        return "hub", location
    raise ValueError(f"{show(location)} is neither a Hub dataset (org/name), a folder, an archive nor a URL")


def _archive_url(location: str) -> str:
    """`location`, if it can be downloaded. Raises ValueError."""
    url = urlsplit(location)
    path = url.path.lower()
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"{show(location.split('@')[-1])} cannot be downloaded. Allowed: http and https URLs")
    if url.username or url.password:
        raise ValueError("a URL with a password in it would end up in plan.json. Fix: download the archive yourself")
    if re.fullmatch(r"/datasets/[^/]+/[^/]+/?", url.path) and url.hostname.endswith(("huggingface.co", "hf.co")):
        raise ValueError(f"{show(location)} is a page. Fix: name the dataset, {url.path.strip('/').split('/', 1)[1]}")
    if path.endswith(OTHER_ARCHIVES) and not path.endswith(ARCHIVES):
        raise ValueError(f"{show(location)} is an archive of a format that is not read. Allowed: {', '.join(ARCHIVES)}")
    return location
