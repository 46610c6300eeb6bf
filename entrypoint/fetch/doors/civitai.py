"""Files of Civitai: a version of a model, by its number, its identifier (AIR) or an address of the site.

Its API states the SHA-256 of each file (https://developer.civitai.com/site/reference/model-versions). A version may
have several files, such as one pruned and one in full; which of them is meant, `pick` says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

from entrypoint.fetch import http
from entrypoint.fetch.doors import web
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.doors.offer import Offer, refusal
from entrypoint.fetch.http import RetryPolicy
from trainer.network import addresses
from trainer.spec.errors import GatedError, SettingsError, UnreachableError
from trainer.spec.values import printable, some
from trainer.storage.safe_names import is_safe

SITE = "https://civitai.com"
HOSTS = ("civitai.com", "www.civitai.com", "civitai.red", "www.civitai.red", "civitai.green", "www.civitai.green")
KEY = "CIVITAI_TOKEN to a key of your account there (Account settings, API keys)"
_SHORT = re.compile(r"civitai:(?:(\d{1,12})@)?(\d{1,12})(?:/(\d{1,12}))?", re.IGNORECASE)
_AIR = re.compile(
    r"(?:urn:)?(?:air:)?[\w.-]+:[\w.-]+:civitai:(\d{1,12})(?:@(\d{1,12}))?(?::\w+)?(?:\.\w+)?", re.IGNORECASE
)
_DOWNLOAD, _PAGE = re.compile(r"/api/download/models/(\d{1,12})/?"), re.compile(r"/models/(\d{1,12})(?:/[^/]*)?/?")
FORMS = "Allowed: civitai:VERSION, urn:air:…:civitai:MODEL@VERSION, or the address of the model or its download"


@dataclass(frozen=True)
class Version:
    """What an address names. `number`: of the version; None: the newest of the model. `file`: of one of its files."""

    site: str
    model: int | None
    number: int | None
    file: int | None = None
    query: tuple[tuple[str, str], ...] = ()  # type, format, size and fp, with which the site's own addresses choose


def is_one(text: str) -> bool:
    """Whether a value means Civitai, well written or not."""
    lower = text.lower()
    if lower.startswith(("civitai:", "urn:air:")) or re.match(r"air:[\w.-]+:[\w.-]+:civitai:", lower):
        return True
    return "://" in lower and addresses.host_of(lower) in HOSTS


def parse(text: str) -> Version:
    """Raises ValueError, with the fix."""
    if found := _SHORT.fullmatch(text):
        model, number, file = (int(part) if part else None for part in found.groups())
        return Version(SITE, model, number, file)
    if found := _AIR.fullmatch(text):
        model, number = int(found[1]), int(found[2]) if found[2] else None
        return Version(SITE, model, number)
    if "://" not in text:
        raise ValueError(f"is no name of a version at Civitai. {FORMS}")
    address = urlsplit(text)
    asked = {name: values[0] for name, values in parse_qs(address.query).items()}
    site = SITE if (address.hostname or "").endswith("civitai.com") else f"https://{address.hostname}"
    file = int(asked["fileId"]) if asked.get("fileId", "").isdecimal() else None
    chosen = tuple((name, asked[name]) for name in ("type", "format", "size", "fp") if name in asked)
    if found := _DOWNLOAD.fullmatch(address.path):
        return Version(site, None, int(found[1]), file, chosen)
    if found := _PAGE.fullmatch(address.path):
        number = int(asked["modelVersionId"]) if asked.get("modelVersionId", "").isdecimal() else None
        return Version(site, int(found[1]), number, file)
    raise ValueError(f"is neither the page of a model nor a download. {FORMS}")


def ask(named: str, text: str, keys: Keys, *, retries: RetryPolicy) -> Offer:
    """The file of a version. Raises SettingsError, GatedError, UnreachableError."""
    try:
        version = parse(text)
    except ValueError as problem:
        raise SettingsError(f"{named} {problem}.") from problem
    headers = {"Authorization": f"Bearer {keys.civitai}"} if keys.civitai else {}
    if version.number is None:
        model = _question(named, f"{version.site}/api/v1/models/{version.model}", headers, retries)
        versions = [entry for entry in _list(model, "modelVersions") if isinstance(entry.get("id"), int)]
        if not versions:
            raise SettingsError(f"{named}: this model has no version to download. Name another.")
        version = replace(version, number=versions[0]["id"])
    answer = _question(named, f"{version.site}/api/v1/model-versions/{version.number}", headers, retries)
    if version.model is not None and answer.get("modelId") not in (None, version.model):
        raise SettingsError(f"{named}: version {version.number} is one of model {answer.get('modelId')}. Correct it.")
    file = pick(named, _list(answer, "files"), version)
    digest = str(file.get("hashes", {}).get("SHA256", "")).lower() if isinstance(file.get("hashes"), dict) else ""
    if not web.SHA256.fullmatch(digest):
        raise UnreachableError(f"{named}: Civitai states no SHA-256 of this file yet. Start again later.")
    url = f"{version.site}/api/download/models/{version.number}?fileId={file['id']}"
    try:
        found = web.describe(named, url, headers, retries=retries, key=KEY)
    except GatedError as problem:
        early = answer.get("availability") == "EarlyAccess"
        why = " It is in early access: your account must have bought it." if early else ""
        raise GatedError(f"{problem}{why}") from problem
    name = str(file.get("name") or "")
    if not is_safe(name) or "/" in name or name.startswith("."):
        name = found.name
    return replace(found, name=name, digest=digest, version=digest)


def pick(named: str, files: list[dict[str, Any]], version: Version) -> dict[str, Any]:
    """The file that an address means: the one that it numbers or describes, else the only one, else the primary one.

    Raises SettingsError where it may be several, with their numbers.
    """
    usable = [file for file in files if isinstance(file.get("id"), int)]
    if version.file is not None:
        usable = [file for file in usable if file["id"] == version.file]
        if not usable:
            shown = some([_described(file) for file in files if isinstance(file.get("id"), int)])
            raise SettingsError(f"{named}: the version has no file {version.file}. It has {shown}.")
    chosen = [file for file in usable if str(file.get("name", "")).lower().endswith(".safetensors")]
    if not chosen:
        kinds = some([_described(file) for file in usable]) or "no file"
        raise SettingsError(f"{named}: the version has no .safetensors file, only {kinds}. Name another version.")
    for name, value in version.query:
        fits = [file for file in chosen if str(_of(file, name)).lower() == value.lower()]
        chosen = fits or chosen
    if len(chosen) > 1:
        models = [file for file in chosen if file.get("type") in ("Model", "Pruned Model")]
        primary = [file for file in models or chosen if file.get("primary") is True]
        chosen = primary or models or chosen
    if len(chosen) > 1:
        shown = some([_described(file) for file in chosen])
        raise SettingsError(f"{named}: the version has several files: {shown}. Write civitai:{version.number}/NUMBER.")
    return chosen[0]


def _of(file: dict[str, Any], name: str) -> Any:
    if name == "type":
        return file.get("type")
    metadata = file.get("metadata")
    return metadata.get(name) if isinstance(metadata, dict) else None


def _described(file: dict[str, Any]) -> str:
    return f"{file['id']} ({printable(str(file.get('name', ''))[:80])})"


def _list(answer: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = answer.get(key)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _question(named: str, url: str, headers: dict[str, str], retries: RetryPolicy) -> dict[str, Any]:
    """The JSON object that the API answers."""
    from trainer.network.client import open_client

    def call() -> dict[str, Any]:
        answer = client.get(url, headers=headers)
        http.check_status(answer, "Civitai")
        if answer.status_code == 404:
            raise SettingsError(f"{named}: Civitai knows no such version (404). {FORMS}.")
        if answer.status_code >= 400:
            raise refusal(named, answer, key=KEY)
        tree = http.parse_json(answer, "Civitai")
        if not isinstance(tree, dict):
            raise SettingsError(f"{named}: the answer of {addresses.shown(url)} is none of Civitai's API.")
        return tree

    with open_client(timeout=retries.timeout) as client:
        return http.persist(call, what=named, retries=retries)
