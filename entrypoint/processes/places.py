"""Where a container runs besides RunPod, and what ON_FINISH can do there.

Vast.ai gives each container a key that may stop and destroy its own instance, and nothing else: CONTAINER_API_KEY, with
the instance's number in CONTAINER_ID (https://docs.vast.ai/api-reference/instances). A job on Hugging Face Jobs ends,
with its bill, when its container exits. Of any other place nothing is known, and what cannot be done is said at the
end, since it may cost money.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from entrypoint.fetch import http
from entrypoint.fetch.http import RetryPolicy
from trainer.network import addresses
from trainer.spec.errors import GatedError, KilnError, SettingsError, UnreachableError
from trainer.spec.values import one_line

log = logging.getLogger(__name__)
ENDS_BY_ITSELF = "Hugging Face Jobs"
VAST = "Vast.ai"
VAST_HOST = "https://console.vast.ai"  # VAST_URL replaces it, as in Vast.ai's own program
KEY = "CONTAINER_API_KEY"
LONGEST_REASON = 300  # characters of an answer


def place(environ: Mapping[str, str]) -> str:
    """The service that runs this container, as its own variables tell; "" for none that is known."""
    if environ.get("VAST_CONTAINERLABEL") or environ.get(KEY):
        return VAST
    if environ.get("JOB_ID") and environ.get("ACCELERATOR"):
        return ENDS_BY_ITSELF
    return ""


def what_follows(action: str, environ: Mapping[str, str]) -> str | None:
    """What the end of the container means where it runs; None where nothing is to be said of it.

    `action`: what ON_FINISH asks for. On Vast.ai: what is said where the instance is not stopped or destroyed.
    """
    service = place(environ)
    if service == ENDS_BY_ITSELF:
        if action in ("idle", "wait"):
            return f"{service} bills until the container exits, or its timeout is reached."
        return f"{service} ends the job, and its bill, when this container exits now."
    if service == VAST:
        verb = "destroy" if action == "terminate" else "stop"
        by_hand = f"vastai {verb} instance {_instance(environ) or 'ID'}, or its console"
        text = f"{service.upper()} BILLS THIS INSTANCE UNTIL IT IS STOPPED. {by_hand} does that"
        return f"{text}." if action in ("stop", "terminate") else f"{text}; so does ON_FINISH=stop at the end of a job."
    if action in ("stop", "terminate"):
        text = f"ON_FINISH={action} works on RunPod and Vast.ai only. This container exits; whether that ends a bill"
        return f"{text} depends on where it runs."
    return None


# ---- Vast.ai


def asked_to_end(action: str, environ: Mapping[str, str], retries: RetryPolicy) -> bool:
    """Ask Vast.ai to stop (`stop`) or destroy (`terminate`) this instance; says why where it could not."""
    number, key = _instance(environ), environ.get(KEY, "").strip()
    host = environ.get("VAST_URL", "").strip().rstrip("/") or VAST_HOST
    problem = addresses.problem_of(host)
    if problem:
        log.warning("VAST_URL=%s: %s.", addresses.shown(host), problem)
    elif not number or not key.isascii() or not key.isprintable() or not key:
        log.warning("ON_FINISH=%s needs CONTAINER_ID and %s, which Vast.ai sets in each container.", action, KEY)
    else:
        address = f"{host}/api/v0/instances/{number}/"
        try:
            http.persist(lambda: _ask(action, address, key, retries), what=address, retries=retries)
            return True
        except KilnError as error:
            log.warning("%s", error)
    return False


def _ask(action: str, address: str, key: str, retries: RetryPolicy) -> None:
    """One request. Raises TransientError for a failure that may pass, GatedError and SettingsError for a refusal."""
    from trainer.network.client import open_client  # late: this module is imported at the start of each job

    method, body = ("DELETE", None) if action == "terminate" else ("PUT", {"state": "stopped"})
    asked: dict[str, Any] = {"json": body, "headers": {"Authorization": f"Bearer {key}", "User-Agent": "kiln"}}
    with open_client(timeout=retries.timeout) as client:
        answer = client.request(method, address, follow_redirects=False, **asked)
    if action == "terminate" and answer.status_code == 404:  # a try whose answer was lost has done it
        return
    http.check_status(answer, VAST)
    said = http.parse_json(answer, VAST) if answer.is_success else {}
    if isinstance(said, dict) and said.get("success") is True:
        return
    reason = one_line(answer.text[:LONGEST_REASON].replace(key, "***")) or "no reason given"
    text = f"Vast.ai refuses to {action} this instance ({answer.status_code}, {reason})."
    if answer.status_code in (401, 403):
        raise GatedError(f"{text} {KEY} is not, or no longer, that of this container.")
    if answer.is_success:
        raise UnreachableError(text)
    raise SettingsError(text)


def _instance(environ: Mapping[str, str]) -> str:
    """The number of this instance; "" where no variable tells it."""
    for text in (environ.get("CONTAINER_ID", ""), environ.get("VAST_CONTAINERLABEL", "").removeprefix("C.")):
        if text.isascii() and text.isdecimal():
            return text
    return ""
