"""DATASET_CONFIG and SAMPLE_PROMPTS → text, then a tree (see `trainer.spec.documents.forms`).

Each is a path, an http(s) URL, or the text itself.
"""

from __future__ import annotations

import errno
import http.client
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from entrypoint.settings.checks import absolute
from trainer.spec.documents.forms import MAX_BYTES, decode, format_of
from trainer.spec.errors import UnreachableError
from trainer.spec.plan import public
from trainer.spec.values import Problems
from trainer.storage.read import read_regular

DOWNLOAD_TIMEOUT_S = 10.0
PIECE_BYTES = 2**16
TRANSIENT_STATUS = (408, 425, 429)  # answers that another try may change, as may 500 and above
INLINE = ("{", "[")  # a value that begins like this is the text itself, and so is one of several lines


def is_inline(value: str) -> bool:
    """Whether a value is the document itself and not its place."""
    return value.lstrip().startswith(INLINE) or "\n" in value.strip()


def label(value: str, variable: str) -> str:
    """How messages name a document, without what in its URL gives access to it."""
    return variable if is_inline(value) else f"{variable} {public(value)[:200]}"


def read_text(
    value: str, variable: str, problems: Problems, *, default_format: str, open_url: Callable[..., Any]
) -> tuple[str | None, str]:
    """The text, and its form: json, yaml, toml, or `default_format` where the name has another suffix.

    The text is None, with a line in `problems`, if it cannot be read. Raises UnreachableError if another try may help.
    """
    if is_inline(value):
        return value, "json" if value.lstrip().startswith(INLINE) else default_format
    try:
        url = urlsplit(value)
        is_remote = url.scheme in ("http", "https")
        text_format = format_of(url.path if is_remote else value, default_format)
        data = _download(value, open_url) if is_remote else _load(value)
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


def _download(url: str, open_url: Callable[..., Any]) -> bytes:
    """Up to MAX_BYTES, and one piece more if there is more.

    Raises UnreachableError if another try may help, ValueError if the URL is wrong.
    """
    # The timeout of urlopen is for each read: a server that sends a byte now and then would hold the job for ever.
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
    data = b""
    try:
        with open_url(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            while len(data) <= MAX_BYTES and (piece := response.read(PIECE_BYTES)):
                data += piece
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it takes longer than {DOWNLOAD_TIMEOUT_S:.0f} s")
        return data
    except http.client.InvalidURL as problem:
        raise ValueError("it is not a URL") from problem
    except urllib.error.HTTPError as problem:
        if problem.code < 500 and problem.code not in TRANSIENT_STATUS:
            raise ValueError(f"the server answers {problem.code} {problem.reason}") from problem
        raise UnreachableError(f"{public(url)}: the server answers {problem.code}.") from problem
    except (OSError, http.client.HTTPException) as problem:
        raise UnreachableError(f"{public(url)} cannot be reached: {problem}.") from problem
