"""Which service a value of a variable names."""

from __future__ import annotations

from entrypoint.fetch.doors import buckets, civitai, hub_buckets, shares, web
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.doors.offer import Offer
from entrypoint.fetch.http import RetryPolicy


def is_address(text: str) -> bool:
    """Whether `text` names a file of a service, and nothing on this machine and no repository of the Hub."""
    is_web = text.lower().startswith(("http://", "https://"))
    return is_web or civitai.is_one(text) or buckets.is_one(text) or hub_buckets.is_one(text)


def ask(named: str, text: str, keys: Keys, *, retries: RetryPolicy) -> Offer:
    """What the service says of the file that `text` names. `named`: the variable with its value, without secrets.

    Raises SettingsError, GatedError, UnreachableError.
    """
    if civitai.is_one(text):
        return civitai.ask(named, text, keys, retries=retries)
    if buckets.is_one(text):
        return buckets.ask(named, text, keys.clouds, retries=retries)
    if hub_buckets.is_one(text):
        return web.ask(named, hub_buckets.parse(named, text).address, keys, retries=retries)
    if shares.is_one(text):
        return shares.ask(named, text, retries=retries)
    return web.ask(named, text, keys, retries=retries)


def key_for(text: str) -> str:
    """What gives access to the file that `text` names, for messages: what to set."""
    if civitai.is_one(text):
        return civitai.KEY
    if buckets.is_one(text):
        return buckets.KEY_OF[buckets.SCHEMES[text.partition("://")[0].lower()]]
    if hub_buckets.is_one(text):
        return hub_buckets.KEY
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
    """A query without its signature, and what stands beside that. Where there is none, all of it may tell files apart:
    `token`, `policy` or `si` are names of many things.
    """
    pairs = query.partition("#")[0].split("&")
    names = [pair.partition("=")[0].lower() for pair in pairs]
    left_out: set[str] = set()
    for signature, beside in SIGNATURES.items():
        if signature in names:
            left_out |= {signature, *beside}
    for beginning in SIGNATURE_BEGINNINGS:
        if f"{beginning}signature" in names:
            left_out |= {name for name in names if name.startswith(beginning)}
    return "&".join(pair for pair, name in zip(pairs, names, strict=True) if name not in left_out)


SIGNATURE_BEGINNINGS = ("x-amz-", "x-goog-")  # of all that S3 and Google sign with
# The parameter with a signature → those that come with it: of S3's and Google's older kinds, and of CloudFront; of
# Azure's SAS.
SIGNATURES = {
    "signature": ("awsaccesskeyid", "googleaccessid", "expires", "policy", "key-pair-id"),
    "sig": (
        *("st", "se", "sp", "sv", "sr", "spr", "sip", "si", "ss", "srt", "sdd"),
        *("skoid", "sktid", "skt", "ske", "sks", "skv", "saoid", "suoid", "scid"),
    ),
}
