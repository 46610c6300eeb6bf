"""DATASET_CONFIG and SAMPLE_PROMPTS → text, then a tree (see `trainer.spec.documents.forms`).

Each is a path, an http(s) URL, or the text itself.
"""

from __future__ import annotations

import errno
from pathlib import Path
from urllib.parse import urlsplit

from entrypoint.settings.checks import absolute
from trainer.network import addresses
from trainer.network.errors import HopelessError, TransientError
from trainer.spec.documents.forms import MAX_BYTES, decode, format_of
from trainer.spec.errors import UnreachableError
from trainer.spec.plan import public
from trainer.spec.values import Problems
from trainer.storage.read import read_regular

DOWNLOAD_TIMEOUT_S = 10.0
TRANSIENT_STATUS = (408, 425, 429)  # answers that another try may change, as may 500 and above
INLINE = ("{", "[")  # a value that begins like this is the text itself, and so is one of several lines


def is_inline(value: str) -> bool:
    """Whether a value is the document itself and not its place."""
    return value.lstrip().startswith(INLINE) or "\n" in value.strip()


def label(value: str, variable: str) -> str:
    """How messages name a document, without what in its URL gives access to it."""
    return variable if is_inline(value) else f"{variable} {public(value)[:200]}"


def read_text(value: str, variable: str, problems: Problems, *, default_format: str) -> tuple[str | None, str]:
    """The text, and its form: json, yaml, toml, or `default_format` where the name has another suffix.

    The text is None, with a line in `problems`, if it cannot be read. Raises UnreachableError if another try may help.
    """
    if is_inline(value):
        return value, "json" if value.lstrip().startswith(INLINE) else default_format
    try:
        url = urlsplit(value)
        is_remote = url.scheme in ("http", "https")
        text_format = format_of(url.path if is_remote else value, default_format)
        data = _download(value) if is_remote else _load(value)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
        return decode(data), text_format
    except UnicodeDecodeError:
        problems.add(f"{label(value, variable)}: it is not UTF-8 text. Fix: save it as UTF-8.")
    except (ValueError, OSError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        fix = "give the path of a file, an http(s) URL, or the text itself"
        problems.add(f"{label(value, variable)}: it cannot be read: {reason}. Fix: {fix}.")
    return None, default_format


def _load(path: str) -> bytes:
    if "://" in path:
        raise ValueError("only http and https URLs can be read")
    try:
        return read_regular(Path(absolute(path)), limit=MAX_BYTES)
    except OSError as problem:
        if problem.errno != errno.EFBIG:
            raise
        raise ValueError(f"it is {problem.strerror}") from problem


def _download(url: str) -> bytes:
    """Up to MAX_BYTES, and a piece more if there is more.

    Raises UnreachableError if another try may help, ValueError if the URL is wrong.
    """
    from trainer.network import client

    try:
        status, data = client.read(url, most=MAX_BYTES, seconds=DOWNLOAD_TIMEOUT_S)
    except HopelessError as problem:
        if issubclass(problem.kind, UnreachableError):
            raise problem.about(addresses.shown(url)) from problem
        raise ValueError(str(problem).rstrip(".")) from problem
    except TransientError as problem:
        raise UnreachableError(f"{addresses.shown(url)} cannot be reached: {problem}.") from problem
    if status >= 500 or status in TRANSIENT_STATUS:
        raise UnreachableError(f"{addresses.shown(url)}: the server answers {status}.")
    if status != 200:
        raise ValueError(f"the server answers {status}")
    return data
