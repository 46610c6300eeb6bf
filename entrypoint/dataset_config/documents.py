"""DATASET_CONFIG and SAMPLE_PROMPTS → text, then a JSON or TOML tree.

Each is a path, an http(s) URL, or the JSON itself.
"""

from __future__ import annotations

import http.client
import time
import tomllib
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from entrypoint.settings.checks import absolute, load_json
from trainer.spec.errors import UnreachableError
from trainer.spec.values import Problems

MAX_BYTES = 2**20  # of dataset.json or prompts.txt, which people write by hand: a larger file is another one
DOWNLOAD_TIMEOUT_S = 10.0
PIECE_BYTES = 2**16
TRANSIENT_STATUS = (408, 425, 429)  # answers that another try may change, as may 500 and above
FORMAT_BY_SUFFIX = {".json": "json", ".toml": "toml"}
INLINE = ("{", "[")  # a value that begins like this is the JSON itself


def label(value: str, variable: str) -> str:
    """How messages name a document. What follows ? in a URL may be a key that gives access to it."""
    return variable if value.startswith(INLINE) else f"{variable} {value.split('?')[0]}"


def read_text(
    value: str, variable: str, problems: Problems, *, default_format: str, open_url: Callable[..., Any]
) -> tuple[str | None, str]:
    """The text, and its format: json, toml, or `default_format` where the name has another suffix.

    The text is None, with a line in `problems`, if it cannot be read. Raises UnreachableError if another try may help.
    """
    if value.startswith(INLINE):
        return value, "json"
    try:
        url = urlsplit(value)
        is_remote = url.scheme in ("http", "https")
        suffix = Path(url.path if is_remote else value).suffix.lower()
        data = _download(value, open_url) if is_remote else _load(value)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
        return data.decode("utf-8-sig"), FORMAT_BY_SUFFIX.get(suffix, default_format)
    except UnicodeDecodeError:
        problems.add(f"{label(value, variable)}: it is not UTF-8 text.")
    except (ValueError, OSError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        fix = "give the path of a file, an http(s) URL, or the JSON itself"
        problems.add(f"{label(value, variable)}: it cannot be read: {reason}. Fix: {fix}.")
    return None, default_format


def _load(path: str) -> bytes:
    if "://" in path:
        raise ValueError("only http and https URLs can be read")
    with Path(absolute(path)).open("rb") as file:
        return file.read(MAX_BYTES + 1)


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
        raise UnreachableError(f"{url.split('?')[0]}: the server answers {problem.code}.") from problem
    except (OSError, http.client.HTTPException) as problem:
        raise UnreachableError(f"{url.split('?')[0]} cannot be reached: {problem}.") from problem


def parse_text(text: str, *, text_format: str, origin: str, problems: Problems) -> Any:
    """The tree of JSON or TOML text; None, with a line in `problems`, if it is neither."""
    try:
        return load_json(text) if text_format == "json" else tomllib.loads(text)
    except RecursionError:
        problems.add(f"{origin}: it is nested too deeply.")
    except ValueError as problem:
        problems.add(f"{origin}: it is not {text_format.upper()}: {problem}.")
    return None
