"""Which texts of an environment are secrets: tokens, passwords, and the keys in addresses.

Whatever a process prints passes `hidden`, which replaces them: also where another library has made the text.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from entrypoint.settings.variables import CONFIG_JSON, NAMES, SECRETS
from trainer.spec.messages.secrets import (
    MIN_CHARACTERS,
    HidingStream,
    Known,
    in_addresses,
    in_paths,
    without_secrets,
)
from trainer.storage.read import read_regular

# A variable of another program, or a key of JSON, with one of these words in its name holds a secret.
_WORDS = re.compile(
    r"(?i)(token(?!iz)|secret|passw|passphrase|credential|api_?key|access_?key|private_?key|authorization|connection_?string)"
    r"|(^|_|-)(pass|pwd|key|keys|auth|pat|dsn|jwt|bearer|signature|cookie|webhook)($|_|-)"
)
_NOT_SECRET = re.compile(r"(?i)(^(old)?pwd|_file|_path|_sock|_dir|_home)$")  # these hold places
_PAIR = re.compile(r"""(?<![\w-])["']?([A-Za-z_][\w-]{0,63})["']?\s*[:=]\s*["']?([^"'\s,}]{6,})""")
_PLAIN = re.compile(r"(?i)true|false|none|null|[0-9]{1,7}|/.*|auto")  # what a key of that name holds otherwise
BY_HOST = "DOWNLOAD_TOKENS"  # host=token pairs: each token is a secret of its own
MIN_KEY = 12  # characters of a key among pairs: shorter values are names and protocols
MAX_TOKEN_FILE_BYTES = 10_000


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret. Of our own variables, the table says it."""
    if name in NAMES:
        return name in SECRETS
    return bool(_WORDS.search(name)) and not _NOT_SECRET.search(name)


def known(environ: Mapping[str, str]) -> Known:
    """All secrets in `environ`, and the token in HF_TOKEN_FILE."""
    found: set[str] = set()
    for name, value in environ.items():
        found |= _secrets_of(name, value)
    with contextlib.suppress(OSError, ValueError):
        if file := environ.get("HF_TOKEN_FILE", "").strip():
            token = read_regular(Path(file).expanduser(), limit=MAX_TOKEN_FILE_BYTES)
            found |= _lines(token.decode("utf-8"))
    return Known(found)


def _secrets_of(name: str, value: str) -> set[str]:
    found = in_addresses(value) if "://" in value or ":\\/\\/" in value else set()
    if is_secret(name):
        found |= _lines(value) | in_paths(value)
        if name == BY_HOST or name.endswith("CONNECTION_STRING"):
            pairs = re.split("[,;]", value)
            found |= {key for key in (pair.partition("=")[2].strip() for pair in pairs) if len(key) >= MIN_KEY}
    if name == CONFIG_JSON:
        found |= _secrets_of_config(value)
    return found


def _lines(value: str) -> set[str]:
    """The lines of a secret: a key may have several, of which a library quotes one."""
    found = set()
    for line in (value, *value.splitlines()):
        text = line.strip().strip("\"'").strip()
        if len(text) >= MIN_CHARACTERS and not _PLAIN.fullmatch(text):
            found.add(text)
    return found


def _secrets_of_config(text: str) -> set[str]:
    """The secrets in the JSON of CONFIG_JSON, or in what looks like its pairs where it is none."""
    pairs: list[tuple[str, str]] = _PAIR.findall(text)
    with contextlib.suppress(ValueError, RecursionError):
        pairs += _pairs_of(json.loads(text))
    found: set[str] = set()
    for name, value in pairs:
        if name != CONFIG_JSON:
            found |= _secrets_of(name.upper(), value)
    return found


def _pairs_of(tree: Any) -> Iterator[tuple[str, str]]:
    """The texts of a tree, each with its key."""
    waiting = [("", tree)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(name, inner) for inner in value]
        elif isinstance(value, str):
            yield name, value


def shown(variables: Mapping[str, str]) -> dict[str, str]:
    """A copy of `variables` for people, such as the request of a dry run: with *** for each secret in it."""
    secrets = known(variables)
    return {name: _shown_value(name, value, secrets) for name, value in variables.items()}


def _shown_value(name: str, value: str, secrets: Known) -> str:
    if is_secret(name):
        return "***"
    if name != CONFIG_JSON:
        return without_secrets(secrets.hide(value))
    try:
        config = json.loads(value)
    except ValueError:
        return "***"
    if not isinstance(config, dict):
        return "***"
    inner = {key: text if isinstance(text, str) else json.dumps(text) for key, text in config.items()}
    return json.dumps(shown(inner))


@contextlib.contextmanager
def hidden(environ: Mapping[str, str]) -> Iterator[Known]:
    """Inside the context, what Python prints has *** in the place of the secrets of `environ`.

    Yields them, for the log: it shortens long lines, and should not cut a secret in two.
    """
    secrets = known(environ)
    with (
        contextlib.redirect_stdout(cast(TextIO, HidingStream(sys.stdout, secrets))),
        contextlib.redirect_stderr(cast(TextIO, HidingStream(sys.stderr, secrets))),
    ):
        yield secrets
