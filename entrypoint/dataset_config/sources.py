"""What DATASET_NAME and a subset's image_dir name: a folder, an archive, its URL, or a dataset of the Hub.

People paste what they have: the address of a dataset's page, a path of Windows, a link that shares a file. What can
only mean one thing is taken, with a note; everything else is refused with the fix.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from entrypoint.settings.checks import absolute, is_file, is_folder
from trainer.network import addresses
from trainer.spec.plan import public
from trainer.spec.values import printable, show, similar

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")  # what `entrypoint.fetch.archive` reads
OTHER_ARCHIVES = re.compile(r"\.(rar|7z|zst|gz|bz2|xz|lz4|iso|z\d\d|part\d+)$|\.(zip|tar|7z|rar)\.\d+$", re.IGNORECASE)
HUB_ID = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)  # org/name, or name; 96 characters at most each
AT_REVISION = re.compile(rf"({HUB_ID.pattern})@([\w./-]+)", re.ASCII)
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
BUCKETS = ("s3", "gs", "gcs", "az", "azure")  # schemes of addresses in buckets
DRIVE_HOSTS = ("drive.google.com", "docs.google.com")
_SHARED_FOLDER = re.compile(r"/drive(?:/u/\d+)?/folders/([\w-]{10,100})/?")
_RESOURCE_KEY = re.compile(r"(?:^|&)(resourcekey=[\w-]{1,100})(?=&|$)")
SHARING_HOSTS = {  # services whose links open a page in a browser and give programs no file
    "photos.app.goo.gl": "Google Photos",
    "photos.google.com": "Google Photos",
    "onedrive.live.com": "OneDrive",
    "1drv.ms": "OneDrive",
    "mega.nz": "MEGA",
    "we.tl": "WeTransfer",
    "wetransfer.com": "WeTransfer",
    "icloud.com": "iCloud",
    "www.icloud.com": "iCloud",
    "www.mediafire.com": "MediaFire",
}
IMAGE_NAME = re.compile(r"\.(jpe?g|png|webp|bmp|gif|tiff?|avif|heic)$", re.IGNORECASE)
MOST_NEAR = 3  # names of folders that a message suggests


@dataclass(frozen=True)
class Place:
    """Where images are."""

    kind: str  # folder | archive | bucket | hub
    location: str  # absolute path, URL or Hub id
    revision: str | None = None  # of the Hub dataset, where its name has one
    note: str | None = None  # how the name was understood, if not as it is written


def classify(location: str, *, hub: bool = True) -> Place:
    """What a source is. Without `hub`, a name that does not exist is a folder.

    Raises ValueError, with the fix, if it can be none of them.
    """
    if not location.strip():
        raise ValueError("an empty name. Allowed: a Hub dataset (owner/name), a folder, an archive or its URL")
    if is_folder(location):
        return Place("folder", absolute(location))
    if location.lower().startswith("hf://buckets/"):
        return _in_hub_bucket(location)
    if page := _hub_page(location):
        return page
    if location.lower().startswith("file:"):
        return _file_url(location)
    if "://" in location:
        return _archive_url(location)
    if WINDOWS_PATH.match(location) or "\\" in location:
        return _windows_path(location)
    if place := _archive(location):
        return place
    if is_file(location):
        raise ValueError(_not_a_folder(location))
    # A folder that does not exist yet may be mounted where the job runs: preflight looks for it.
    if not hub or location.startswith(("/", ".", "~")):
        return Place("folder", absolute(location))
    if HUB_ID.fullmatch(location):
        return Place("hub", location)
    if with_revision := AT_REVISION.fullmatch(location):
        name, revision = with_revision[1], with_revision[3]
        return Place("hub", name, revision, f"{location} is the revision {revision} of the Hub dataset {name}")
    if location.endswith("/"):  # nobody writes a dataset's name so
        return Place("folder", absolute(location))
    if "," in location or re.search(r"[*{}\[\]]", location):
        raise ValueError(
            f"{show(location)} names several places. Fix: put all images below one folder, or give each place a subset "
            "of its own in dataset.json (DATASET_CONFIG)"
        )
    raise ValueError(f"{show(location)} is neither a Hub dataset (owner/name), a folder, an archive nor a URL")


def no_such_folder(location: str, *, from_root: bool = True) -> str:
    """That there is no folder `location`, and what similar names there are beside it. For the end of a message.

    `from_root`: whether to say that it is a folder if it is meant from the root, which tells what there is.
    """
    path = Path(absolute(location))
    above = path.parent
    while not is_folder(str(above)):  # which is False for a name too long, and for links in a circle
        path, above = above, above.parent
    try:
        folders = sorted(entry.name for entry in os.scandir(above) if entry.is_dir())
    except OSError:
        folders = []
    near = similar(path.name, folders, most=MOST_NEAR)
    said = f"there is no folder {printable(path.name)} in {printable(str(above))}"
    if near:
        said += f", but {', '.join(near)}"
    if from_root and not location.startswith("/") and is_folder(f"/{location}"):
        said += f"; there is /{location.strip('/')}"
    return said


# ---- forms of a name


def _archive(location: str) -> Place | None:
    if location.lower().endswith(ARCHIVES) and not re.search(r"[*{}]", location):
        return Place("archive", absolute(location))
    if OTHER_ARCHIVES.search(location) and not location.lower().endswith(ARCHIVES):
        raise ValueError(_other_archive(location))
    return None


def _other_archive(location: str) -> str:
    return (
        f"{show(location)} is an archive of a format that is not read. Fix: unpack it and name the folder, or pack it "
        f"again. Allowed: {', '.join(ARCHIVES)}"
    )


def _not_a_folder(location: str) -> str:
    if IMAGE_NAME.search(location):
        return f"{show(location)} is one image. Fix: name its folder, {Path(absolute(location)).parent}"
    if location.lower().endswith((".json", ".toml", ".yaml", ".yml")):
        return (
            f"{show(location)} is a file, but not an archive. Fix: set DATASET_CONFIG to it, if it describes datasets"
        )
    return f"{show(location)} is a file, but not an archive. Allowed: a folder, or {', '.join(ARCHIVES)}"


def _windows_path(location: str) -> Place:
    """A path with backslashes, or with a drive. Raises ValueError unless the folder is here under another spelling."""
    path = location.replace("\\", "/")
    drive = re.match(r"([A-Za-z]):/", path)
    if drive:  # Windows' own Linux has its drives there
        path = f"/mnt/{drive[1].lower()}/{path[3:]}"
    if is_folder(path) or (is_file(path) and path.lower().endswith(ARCHIVES)):
        kind = "folder" if is_folder(path) else "archive"
        return Place(kind, absolute(path), note=f"{location} is read as {path}")
    if drive or location.startswith("\\\\"):
        raise ValueError(
            f"{show(location)} is a path of Windows, which does not exist where Kiln runs. Fix: mount the folder "
            f'(docker run -v "{location.rstrip("/" + chr(92))}:/data" ...) and name /data'
        )
    raise ValueError(f"{show(location)} has backslashes. Fix: write {path}, and mount the folder where Kiln runs")


def _file_url(location: str) -> Place:
    url = _split(location)
    if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
        raise ValueError(f"{show(location)} is not a path on this machine. Fix: write the path without file:")
    path = unquote(url.path)
    found = classify(path, hub=False)
    return Place(found.kind, found.location, note=f"{location} is the path {path}")


def _split(location: str) -> SplitResult:
    try:
        return urlsplit(location)
    except ValueError as problem:
        raise ValueError(f"{show(public(location))} is no address: its host is not written as one") from problem


def _hub_page(location: str) -> Place | None:
    """A dataset named by the address of its page, or by hf://. Raises ValueError for pages of something else."""
    address = public(location)
    bare = re.sub(r"^https?://", "", location, flags=re.IGNORECASE)
    host, _, path = bare.partition("/")
    if location.lower().startswith("hf://"):
        path = location[5:]
    elif host.lower() not in HUB_HOSTS:
        if not re.match(r"datasets/[^/]+/[^/]+$", location) or "://" in location:
            return None
        path = location
    parts = [unquote(part) for part in re.split(r"[?#]", path)[0].split("/") if part]
    if len(parts) >= 3 and parts[0] == "buckets":
        raise ValueError(f"{show(address)} is a page about a bucket. Fix: write {_bucket_of_page(parts)}")
    if len(parts) < 3 or parts[0] != "datasets":
        if len(parts) == 2 and parts[0] == "datasets" and HUB_ID.fullmatch(parts[1]):
            return Place("hub", parts[1], note=f"{address} is the Hub dataset {parts[1]}")
        raise ValueError(f"{show(address)} is not the page of a dataset. Fix: name the dataset as owner/name")
    owner, last, *rest = parts[1:]
    last, _, revision = last.partition("@")
    name = f"{owner}/{last}"
    if rest[:1] == ["resolve"] or (rest[:1] == ["blob"] and location.lower().endswith(ARCHIVES)):
        if "://" not in location:
            location = f"https://{location}"
        return Place("archive", location.replace("/blob/", "/resolve/", 1))
    if not HUB_ID.fullmatch(name):
        raise ValueError(f"{show(address)} is not the page of a dataset. Fix: name the dataset as owner/name")
    if rest[:1] == ["tree"] and len(rest) >= 2:
        revision = "/".join(rest[1:]) if rest[1] == "refs" else rest[1]
        rest = [] if rest[1] == "refs" else rest[2:]
    if rest and rest[0] not in ("viewer", "tree", "discussions", "settings"):
        raise ValueError(
            f"{show(address)} is a part of the Hub dataset {name}. Fix: name the dataset, and choose with "
            "DATASET_SUBSET and DATASET_SPLIT, or download that part and name its folder"
        )
    note = f"{address} is the Hub dataset {name}"
    if rest[:1] == ["viewer"] and len(rest) > 1:
        note += "; DATASET_SUBSET and DATASET_SPLIT choose what the rest of the address shows"
    revision = "" if revision == "main" else revision
    return Place("hub", name, revision or None, note)


def _bucket_of_page(parts: list[str]) -> str:
    """What a page about a bucket of the Hub shows: a file of it, or all of it."""
    bucket = "/".join(parts[1:3])
    if parts[3:4] == ["resolve"] and len(parts) > 4:
        return printable(f"hf://buckets/{bucket}/{'/'.join(parts[4:])}")
    return printable(f"hf://buckets/{bucket}") + ", with a path behind it if not all of it is meant"


def _archive_url(location: str) -> Place:
    """`location`, if it can be downloaded. Raises ValueError."""
    shown = show(public(location))
    is_web = location.lower().startswith(("http://", "https://"))
    if is_web and (problem := addresses.problem_of(location)):
        raise ValueError(f"{shown} is no address: {problem}. Fix: copy it again")
    url = _split(location)
    host = (url.hostname or "").lower()
    if url.scheme.lower() not in ("http", "https", *BUCKETS) or not url.hostname:
        raise ValueError(
            f"{shown} cannot be downloaded. Allowed: http and https URLs, s3://, gs://, az:// and hf://buckets/. Fix: "
            "download it, and name the folder or the archive"
        )
    if url.scheme.lower() in BUCKETS and url.hostname:
        return _in_bucket(location)
    if url.username or url.password:
        raise ValueError("a URL with a password in it would end up in plan.json. Fix: download the archive yourself")
    if host in DRIVE_HOSTS and (shared := _SHARED_FOLDER.fullmatch(url.path)):
        key = _RESOURCE_KEY.search(
            url.query
        )  # some folders are closed without it; who shared it, and how, says nothing
        behind = f"?{key[1]}" if key else ""
        return Place("bucket", f"https://drive.google.com/drive/folders/{shared[1]}{behind}")
    if host in SHARING_HOSTS:
        raise ValueError(
            f"{shown} is a page of {SHARING_HOSTS[host]}, from which programs cannot download. Fix: download the "
            "files, and name their folder or archive"
        )
    if OTHER_ARCHIVES.search(url.path) and not url.path.lower().endswith(ARCHIVES):
        raise ValueError(_other_archive(public(location)))
    if host == "github.com" and "/blob/" in url.path:
        raw = location.replace("/blob/", "/raw/", 1)
        return Place("archive", raw, note=f"the GitHub page is read as its file, {public(raw)}")
    return Place("archive", location)


def _in_hub_bucket(location: str) -> Place:
    """All files below a name in a bucket of the Hub, or an archive in one."""
    if not re.fullmatch(r"(?i)hf://buckets/[\w.-]+/[\w.-]+(/[^?#@]*)?", location) or ".." in location.split("/"):
        raise ValueError(f"{show(public(location))} is not written as hf://buckets/OWNER/BUCKET/PATH. Fix: correct it")
    return _in_bucket(location)


def _in_bucket(location: str) -> Place:
    """An archive in a bucket, or all files below a name in it."""
    if re.search(r"[?#@]", location):
        raise ValueError(f"{show(public(location))} has more than a bucket and a path. Fix: keys go into variables")
    if location.lower().endswith(ARCHIVES):
        return Place("archive", location)
    if OTHER_ARCHIVES.search(location):
        raise ValueError(_other_archive(location))
    return Place("bucket", location)
