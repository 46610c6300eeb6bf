"""Which service a value of a variable names."""

from __future__ import annotations

from entrypoint.fetch.doors import buckets, civitai, shares, web
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.doors.offer import Offer
from entrypoint.fetch.http import RetryPolicy


def is_address(text: str) -> bool:
    """Whether `text` names a file of a service, and nothing on this machine and no repository of the Hub."""
    return text.lower().startswith(("http://", "https://")) or civitai.is_one(text) or buckets.is_one(text)


def ask(named: str, text: str, keys: Keys, *, retries: RetryPolicy) -> Offer:
    """What the service says of the file that `text` names. `named`: the variable with its value, without secrets.

    Raises SettingsError, GatedError, UnreachableError.
    """
    if civitai.is_one(text):
        return civitai.ask(named, text, keys, retries=retries)
    if buckets.is_one(text):
        return buckets.ask(named, text, keys.clouds, retries=retries)
    if shares.is_one(text):
        return shares.ask(named, text, retries=retries)
    return web.ask(named, text, keys, retries=retries)


def key_for(text: str) -> str:
    """What gives access to the file that `text` names, for messages: what to set."""
    if civitai.is_one(text):
        return civitai.KEY
    if buckets.is_one(text):
        return buckets.KEY_OF[buckets.SCHEMES[text.partition("://")[0].lower()]]
    return shares.KEY if shares.is_one(text) else web.key_for(text)


def identity(text: str) -> str:
    """What stays the same of an address where its signature changes: under this, a file is kept."""
    if civitai.is_one(text):
        return text
    if shares.is_one(text):
        return shares.identity(text)
    before, question, query = text.partition("?")
    return f"{before}{question}{_without_signature(query)}"


def _without_signature(query: str) -> str:
    kept = []
    for pair in query.partition("#")[0].split("&"):
        name = pair.partition("=")[0].lower()
        if not name.startswith(("x-amz-", "x-goog-", "awsaccesskeyid", "googleaccessid")) and name not in SIGNATURES:
            kept.append(pair)
    return "&".join(kept)


# Of signed addresses of Azure, CloudFront, S3's older kind, and of share links.
SIGNATURES = (
    *("signature", "expires", "policy", "key-pair-id", "token", "sig", "se", "st", "sp", "sv", "sr", "spr", "ske"),
    *("skoid", "sktid", "skt", "sks", "skv", "sip", "si", "ss", "srt", "rlkey"),
)
