"""An event in the form that each kind of address takes, which its host tells.

| kind | host | form | image |
| --- | --- | --- | --- |
| discord | discord.com, discordapp.com | an embed | in the message (multipart) |
| slack | hooks.slack.com | text with blocks | none: an incoming webhook takes no files |
| ntfy | ntfy.sh, and hosts that begin with ntfy. | headers | as an attachment (PUT) |
| json | any other | Standard Webhooks 1.0 (standardwebhooks.com), signed | none |
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import hmac
import json
import re
from dataclasses import dataclass, field
from email.header import Header
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from entrypoint.notify import events
from entrypoint.notify.events import Event
from trainer.spec.log_lines import escaped
from trainer.storage.atomic import human_size

IMAGE_HEIGHT, IMAGE_LONGEST = 512, 1600  # pixels of the samples side by side
IMAGE_NAME = "samples.jpg"
MOST_TEXT = 1500  # characters of a message
COLOURS = {events.FINISHED: 0x2E7D32, events.FAILED: 0xC62828, events.STOPPED: 0xEF6C00}
PRIORITIES = {events.FAILED: "4", events.FINISHED: "4", events.SAMPLED: "2"}  # ntfy: 1 to 5, 3 is usual
TAGS = {events.FINISHED: "white_check_mark", events.FAILED: "rotating_light", events.STOPPED: "pause_button"}
SIGNED_BY = "v1"


@dataclass(frozen=True)
class Request:
    """What to send."""

    method: str
    url: str = field(repr=False)
    headers: dict[str, str] = field(repr=False)
    content: bytes | None = None
    form: dict[str, str] | None = None  # fields of a multipart message, beside its file
    file: bytes | None = None


def kind_of(url: str) -> str:
    """discord, slack, ntfy, or json."""
    host = (urlsplit(url).hostname or "").lower().removesuffix(".")
    if host in ("discord.com", "discordapp.com") or host.endswith((".discord.com", ".discordapp.com")):
        return "discord"
    if host in ("hooks.slack.com", "hooks.slack-gov.com"):
        return "slack"
    if host.partition(".")[0] == "ntfy":
        return "ntfy"
    return "json"


def wants(kind: str, event: Event) -> bool:
    """Whether an address of this kind is told of an event: people need not read of each save."""
    return kind == "json" or event.type != events.CHECKPOINT


def request_of(url: str, event: Event, *, kind: str, image: bytes, secret: str, now: float) -> Request:
    """The request that tells of `event`. `image`: a JPEG of the samples, or b"". `now`: Unix seconds."""
    if kind == "discord":
        return _discord(url, event, image)
    if kind == "slack":
        return _slack(url, event)
    if kind == "ntfy":
        return _ntfy(url, event, image)
    return _json(url, event, secret=secret, now=now)


# ---- words


def title_of(event: Event) -> str:
    """One line for people."""
    data = event.data
    name = escaped(str(data.get("run") or "LoRA"))
    step = f"step {data['step']:,}" if isinstance(data.get("step"), int) else "the first step"
    of = f" of {data['total_steps']:,}" if isinstance(data.get("total_steps"), int) else ""
    if event.type == events.STARTED:
        resumed = data.get("resumed_from_step")
        return f"{name}: training goes on from step {resumed:,}{of}" if resumed else f"{name}: training has started"
    return {
        events.SAMPLED: f"{name}: samples of {step}{of}",
        events.CHECKPOINT: f"{name}: {step}{of} is saved",
        events.FINISHED: f"{name}: finished",
        events.STOPPED: f"{name}: stopped at {step}{of}",
        events.FAILED: f"{name}: failed at {step}{of}, exit code {data.get('exit_code')}",
    }[event.type]


def lines_of(event: Event) -> list[str]:
    """What else people want to know, a line each."""
    data = event.data
    found = []
    if event.type == events.STARTED:
        total = data.get("total_steps")
        found.append(f"{data['base_model']}{f', {total:,} steps' if isinstance(total, int) else ''}")
    if event.type == events.FINISHED and data.get("file"):
        found.append(f"{data['file']['name']}, {human_size(data['file']['bytes'])}")
    numbers = []
    if isinstance(data.get("loss"), float) and event.type in (events.SAMPLED, events.CHECKPOINT):
        numbers.append(f"loss {data['loss']:.4f}")
    if data.get("eta_s") and event.type in (events.SAMPLED, events.CHECKPOINT):
        numbers.append(f"about {datetime.timedelta(seconds=round(data['eta_s']))} left")
    if data.get("seconds"):
        numbers.append(f"after {datetime.timedelta(seconds=data['seconds'])}")
    if data.get("cost"):
        numbers.append(f"cost {data['cost']:.2f}")
    found += [", ".join(numbers)] if numbers else []
    if data.get("message"):
        found.append(str(data["message"]))
    if data.get("saved_step") and event.type in (events.FAILED, events.STOPPED):
        found.append(f"The state of step {data['saved_step']:,} is saved: the same command goes on from there.")
    return [escaped(line)[:MOST_TEXT] for line in found]


# ---- forms


def _json(url: str, event: Event, *, secret: str, now: float) -> Request:
    """The receiver knows an event that comes again by its id, and an old one by the time of this try."""
    moment = datetime.datetime.fromtimestamp(event.time, datetime.UTC).isoformat(timespec="seconds")
    body = json.dumps({"type": event.type, "timestamp": moment.replace("+00:00", "Z"), "data": event.data})
    content = body.encode("utf-8")
    headers = {"content-type": "application/json", "webhook-id": event.id, "webhook-timestamp": f"{now:.0f}"}
    if secret:
        headers["webhook-signature"] = signature(secret, headers["webhook-id"], headers["webhook-timestamp"], content)
    return Request("POST", url, headers, content)


def signature(secret: str, message: str, timestamp: str, content: bytes) -> str:
    """The value of webhook-signature. `secret`: whsec_ and base64, or any other text, whose bytes are the key then."""
    key = secret.encode("utf-8")
    if secret.startswith("whsec_"):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except binascii.Error:  # a text of the user's own that begins so
            key = secret.encode("utf-8")
    digest = hmac.new(key, b".".join((message.encode(), timestamp.encode(), content)), hashlib.sha256).digest()
    return f"{SIGNED_BY},{base64.b64encode(digest).decode('ascii')}"


def _discord(url: str, event: Event, image: bytes) -> Request:
    """A message of https://discord.com/developers/docs/resources/webhook#execute-webhook."""
    embed: dict[str, Any] = {
        "title": _without_markup(title_of(event))[:256],
        "description": "\n".join(map(_without_markup, lines_of(event)))[:MOST_TEXT],
        "color": COLOURS.get(event.type, 0x2457C5),
    }
    if image:
        embed["image"] = {"url": f"attachment://{IMAGE_NAME}"}
    # No text, whatever a caption holds, calls people by their names.
    message = {"username": "Kiln", "embeds": [embed], "allowed_mentions": {"parse": []}}
    if not image:
        return Request("POST", url, {"content-type": "application/json"}, json.dumps(message).encode("utf-8"))
    return Request("POST", url, {}, form={"payload_json": json.dumps(message)}, file=image)


def _without_markup(text: str) -> str:
    return re.sub(r"([\\*_~`|>#\[\]()<@:-])", r"\\\1", text)


def _slack(url: str, event: Event) -> Request:
    """Text for the notification, and blocks for the message."""
    title, lines = _for_slack(title_of(event)), [_for_slack(line) for line in lines_of(event)]
    blocks: list[dict[str, Any]] = [{"type": "section", "text": {"type": "mrkdwn", "text": f"*{title}*"}}]
    if lines:
        blocks.append({"type": "section", "text": {"type": "plain_text", "text": "\n".join(lines)[:MOST_TEXT]}})
    if event.images:
        where = f"Slack's webhooks take no images: {len(event.images)} samples are in the folder sample of the output."
        blocks.append({"type": "context", "elements": [{"type": "plain_text", "text": where}]})
    content = json.dumps({"text": "\n".join([title, *lines])[:MOST_TEXT], "blocks": blocks}).encode("utf-8")
    return Request("POST", url, {"content-type": "application/json"}, content)


def _for_slack(text: str) -> str:
    """The three characters that are markup there; the star would end what is bold."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("*", "∗")


def _ntfy(url: str, event: Event, image: bytes) -> Request:
    """https://docs.ntfy.sh/publish: the body is the message, or the attachment, and the message is a header then."""
    text = "\n".join(lines_of(event)) or title_of(event)
    headers = {"Title": _header(title_of(event)), "Priority": PRIORITIES.get(event.type, "3")}
    headers["Tags"] = TAGS.get(event.type, "art")
    if not image:
        return Request("POST", url, headers, text.encode("utf-8"))
    headers |= {"Filename": IMAGE_NAME, "Message": _header(text.replace("\n", "\\n")), "Content-Type": "image/jpeg"}
    return Request("PUT", url, headers, image)


def _header(text: str) -> str:
    """A text as a header may have it: ASCII on one line (RFC 2047, which ntfy decodes)."""
    line = " ".join(text.split())
    if line.isascii() and line.isprintable():
        return line
    return Header(line, "utf-8", maxlinelen=10**6).encode(linesep="").replace("\n", "")


def without_secrets_in_path(url: str) -> str:
    """For people: the host alone."""
    return urlsplit(url).hostname or "an address"


def sheet_of(event: Event) -> tuple[Path, ...]:
    return tuple(map(Path, event.images))


def cleaned(url: str) -> str:
    """The address to send to: without a fragment, which is never sent."""
    return urlunsplit(urlsplit(url)._replace(fragment=""))
