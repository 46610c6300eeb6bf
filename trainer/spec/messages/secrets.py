"""Texts without the secrets in them. Standard library only: the serverless handler imports it too.

There are two lines of defence:

- `without_secrets` knows what secrets look like: logins and queries of addresses, tokens of well-known services.
  Values in messages pass it (`trainer.spec.values.show`), and so does every line of a log.
- `Known` knows the very secrets of a process, which `entrypoint.system.secrets` finds in its environment, and replaces
  them in whatever the process prints, in each form in which libraries write them.

`address` shows an address that is known to be one: without login, query and fragment.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator
from typing import TextIO
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
MIN_CHARACTERS = 6  # of a secret: shorter texts occur everywhere, and no service gives such a key
MIN_PASSWORD_CHARACTERS = 4  # of the password in an address, which is one without doubt
WHOLE_WORD_CHARACTERS = 12  # a shorter secret is only replaced where it is not a part of a word
MIN_UNKNOWN_CHARACTERS = 20  # of a parameter's value that counts as a key although the parameter's name tells nothing

# https://user:password@host/path?query#fragment, also with the escaped slashes of JSON, and as what was taken for a
# path: https:/host/path.
_ADDRESS = re.compile(
    r"""((?:[A-Za-z][A-Za-z0-9+.-]{0,20}:(?:\\?/){2}|(?:https?|s3|ftp|hf):\\?/))([^\s"'<>`]+)""", re.IGNORECASE
)
_END_OF_SENTENCE = ")]}.,;:!?"
# What follows gives everybody the right to write there. ntfy's topics are no less secret, but look like any path.
_WEBHOOK = re.compile(
    r"(?i)((?:discord(?:app)?\.com(?:\\?/)+api(?:(?:\\?/)+v\d+)?(?:\\?/)+webhooks|hooks\.slack(?:-gov)?\.com(?:\\?/)+\w+|"
    r"ntfy\.sh)(?:\\?/)+)[^\s\"'<>`]+"
)
# user:password@host without a scheme. An image's digest (name:tag@sha256:...) is none.
_LOGIN = re.compile(r"""(?<![\w@/.+%~-])[\w.+%~-]{1,100}:[^\s/@:"'<>]{1,200}@(?!sha\d+:)(?=[\w\[])""")
# A login further on in an address, where somebody has put another scheme in front of it.
_LOGIN_INSIDE = re.compile(r"(?<=/)[^/\s:@]{1,100}:[^\s@]{1,200}@(?!sha\d+:)")
# &token=... and the like, in what is no whole address, such as the line of a request.
_PARAMETER = re.compile(r"""([?&][\w.%\[\]-]{1,64}=)[^\s&"'<>#;)]+""")
_PARAMETER_NAMES = (
    r"token|(?:access|api|auth|hf|hub|id|refresh|session)[_-]?token|sig|signature|passw(?:or)?d|pwd|secret|client_secret|"
    r"api[_-]?key|x-amz-[\w-]+|x-goog-[\w-]+|policy|key-pair-id|awsaccesskeyid|googleaccessid"
)
_ASSIGNED = re.compile(rf"""(?i)((?<![\w-])(?:--)?(?:{_PARAMETER_NAMES})=)[^\s&"'<>#;,)]+""")
_SECRET_PARAMETER = re.compile(rf"(?i){_PARAMETER_NAMES}|.*(token|secret|key|sig|auth|pass|cred|hash).*")
# The beginnings that services give their tokens, by which people find them in logs: those stay. hf_hub_download, which
# tracebacks name, is none.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:(hf_|api_org_)(?!transfer)[A-Za-z0-9]{6,}[A-Za-z0-9_-]*"
    r"|(rpa_|rps_|gh[pousr]_|github_pat_|glpat-|xox[abps]-|sk-|AKIA|ASIA)[A-Za-z0-9_-]{12,})"
)
_HEADER = re.compile(r"(?i)\b(bearer\s+)[^\s\"',;]{6,}|\b(basic\s+)[a-z0-9+/]{16,}={0,2}")
_WEB_TOKEN = re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.?[\w-]*")


# ---- what secrets look like


def without_secrets(text: str) -> str:
    """`text` with *** for all in it that looks like a secret."""
    text = _ADDRESS.sub(lambda found: found[1] + _without_login_and_query(found[2]), text)
    text = _WEBHOOK.sub(rf"\g<1>{HIDDEN}", text)
    text = _LOGIN.sub(f"{HIDDEN}@", text)
    text = _PARAMETER.sub(rf"\g<1>{HIDDEN}", text)
    text = _ASSIGNED.sub(rf"\g<1>{HIDDEN}", text)
    text = _TOKEN.sub(lambda found: (found[1] or found[2]) + HIDDEN, text)
    text = _WEB_TOKEN.sub(HIDDEN, text)
    return _HEADER.sub(lambda found: (found[1] or found[2]) + HIDDEN, text)


def address(url: str) -> str:
    """`url` without user, password, query and fragment. It never raises, whatever `url` is."""
    scheme, separator, rest = url.strip().partition("://")
    if not separator:
        return without_secrets(url)
    _, rest = _split_login(rest)
    return f"{scheme.lower()}://{re.split('[?#]', rest, maxsplit=1)[0]}"


def _without_login_and_query(rest: str) -> str:
    """The rest of an address in a sentence: with *** for its login, its query and for the values of its fragment."""
    inner = rest.rstrip(_END_OF_SENTENCE)
    after = rest[len(inner) :]
    login, place = _split_login(inner)
    before = f"{HIDDEN}@" if login else ""
    if login and not place:
        return f"{HIDDEN}{after}"
    place = _LOGIN_INSIDE.sub(f"{HIDDEN}@", place)
    place, question, query = place.partition("?")
    if question and query:
        return f"{before}{place}?{HIDDEN}{after}"
    place, sharp, fragment = place.partition("#")
    if sharp and "=" in fragment:
        return f"{before}{place}#{HIDDEN}{after}"
    return f"{before}{place}{sharp}{fragment}{after}"


def _split_login(rest: str) -> tuple[str, str]:
    """The login and what follows it, of an address without its scheme.

    A password may hold characters that should be escaped: `user:a/b@host` has no port "a".
    """
    authority = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    if "@" in authority:
        login, _, host = authority.rpartition("@")
        return login, host + rest[len(authority) :]
    port = authority.rpartition("]")[2].partition(":")[2]
    if port and not port.isdecimal():
        login, _, place = rest.rpartition("@")
        return (login, place) if login else (rest, "")
    return "", rest


# ---- known secrets


class Known:
    """Secrets by their text. `hide` replaces them; it changes no text in which none of them is."""

    def __init__(self, secrets: Iterable[str]) -> None:
        every = {form for secret in secrets for form in forms(secret)}
        by_length = sorted(every, key=lambda form: (-len(form), form))
        # Not a pattern: the compiler of patterns takes seconds for a token of a megabyte.
        self._long = [form for form in by_length if len(form) >= WHOLE_WORD_CHARACTERS]
        words = "|".join(re.escape(form) for form in by_length if len(form) < WHOLE_WORD_CHARACTERS)
        self._words = re.compile(rf"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])") if words else None

    def hide(self, text: str) -> str:
        for form in self._long:
            text = text.replace(form, HIDDEN)
        return self._words.sub(HIDDEN, text) if self._words else text


def forms(secret: str) -> list[str]:
    """A secret as libraries may write it: as it is, escaped for JSON, Python, HTML and addresses, and in base64."""
    found = [secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1]]
    found += [html.escape(secret), secret.encode("unicode_escape").decode("ascii")]
    with_surrogates = secret.encode("utf-8", "surrogatepass")
    for escaped in (quote(with_surrogates, safe=""), quote(with_surrogates), quote_plus(with_surrogates)):
        found += [escaped, re.sub("%..", lambda match: match[0].lower(), escaped)]
    if len(with_surrogates) >= MIN_CHARACTERS:
        found += _in_base64(with_surrogates)
    return sorted(dict.fromkeys(found), key=len, reverse=True)


def _in_base64(secret: bytes) -> Iterator[str]:
    """What base64 makes of a text with `secret` in it, wherever it begins there: without the letters at both ends,
    which hold bits of its neighbours too.
    """
    for before in range(3):
        usable = (len(secret) + before) // 3 * 3 - before
        encoded = base64.b64encode(b"\0" * before + secret[:usable])[4 if before else 0 :]
        if len(encoded) >= MIN_CHARACTERS:
            yield encoded.decode("ascii")
            yield encoded.decode("ascii").replace("+", "-").replace("/", "_")


def in_addresses(text: str) -> set[str]:
    """The logins, passwords and keys in the addresses of a text. A text that is one address may hold spaces."""
    found: set[str] = set()
    whole = re.fullmatch(r"\s*([A-Za-z][A-Za-z0-9+.-]{0,20}://)(.*)", text, re.DOTALL)
    rests = [whole[2]] if whole else []
    rests += [match[2] for match in _ADDRESS.finditer(text)]
    for rest in rests:
        login, place = _split_login(rest.replace("\\/", "/"))
        _, _, password = login.partition(":")
        for part in (login, password, unquote(password)):
            if len(part) >= MIN_PASSWORD_CHARACTERS:
                found.add(part)
        for query in re.split("[?#]", place)[1:]:
            found |= _keys_in(query)
    return found


def in_paths(text: str) -> set[str]:
    """The addresses in a text that is secret, their paths, and what looks like a key in these.

    A library may quote an address whole or without its host. A short word of a path, such as `hooks`, is no secret.
    """
    found: set[str] = set()
    for match in _ADDRESS.finditer(text.replace("\\/", "/")):
        _, place = _split_login(match[2].rstrip(_END_OF_SENTENCE))
        _, slash, path = place.partition("/")
        path = re.split("[?#]", path, maxsplit=1)[0].rstrip("/")
        if slash and len(path) >= MIN_CHARACTERS:
            found |= {place, f"/{path}"}
            found |= {part for part in path.split("/") if _is_key(part)}
    return found


def _is_key(part: str) -> bool:
    mixed = bool(re.search("[0-9]", part) and re.search("[A-Za-z]", part)) and len(part) >= WHOLE_WORD_CHARACTERS - 4
    return mixed or len(part) >= MIN_UNKNOWN_CHARACTERS


def _keys_in(query: str) -> set[str]:
    """The values in a query that give access to something, and the query itself if it has one."""
    found: set[str] = set()
    for pair in re.split("[&;]", query):
        name, equals, value = pair.partition("=")
        if not equals:
            name, value = "", pair
        tells = len(value) >= MIN_CHARACTERS and _SECRET_PARAMETER.fullmatch(name)
        mixed = re.search("[0-9]", value) and re.search("[A-Za-z]", value) and len(value) >= MIN_CHARACTERS
        if tells or mixed or len(value) >= MIN_UNKNOWN_CHARACTERS:
            found |= {value, unquote(value)}
    return found


class HidingStream:
    """A text stream that passes all on to another one, without known secrets."""

    def __init__(self, stream: TextIO, known: Known) -> None:
        self._stream = stream
        self._known = known

    def write(self, text: str) -> int:
        self._stream.write(self._known.hide(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
