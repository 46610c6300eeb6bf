"""The form of each kind of address, as the API there describes it."""

import base64
import hashlib
import hmac
import json
from email.header import decode_header, make_header

import pytest

from entrypoint.notify import events
from entrypoint.notify.events import Event
from entrypoint.notify.messages import kind_of, request_of, signature, title_of, wants

DATA = {"run": "my <b>*dog*</b> & @everyone", "base_model": "flux", "step": 400, "total_steps": 2000, "epoch": 2}
SAMPLED = Event(
    events.SAMPLED, 1.7e9, {**DATA, "loss": 0.25, "eta_s": 90, "files": ["a.png"]}, ("/x/a.png",), id="msg_1"
)
FAILED = Event(events.FAILED, 1.7e9, {**DATA, "exit_code": 75, "message": "ein Füchsin 狐\nzweite", "saved_step": 300})


def asked(url, event, image=b"", secret=""):
    return request_of(url, event, kind=kind_of(url), image=image, secret=secret, now=1_700_000_005.4)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("https://discord.com/api/webhooks/1/x", "discord"),
        ("https://canary.discord.com/api/webhooks/1/x", "discord"),
        ("https://discordapp.com/api/webhooks/1/x", "discord"),
        ("https://discord.com.evil.example/x", "json"),
        ("https://hooks.slack.com/services/T/B/x", "slack"),
        ("https://ntfy.sh/topic", "ntfy"),
        ("https://ntfy.example.com/topic", "ntfy"),
        ("https://example.com/ntfy.sh", "json"),
    ],
)
def test_the_host_tells_the_kind(url, kind):
    assert kind_of(url) == kind


def test_json_is_signed_as_standard_webhooks_says():
    """The example of the specification's own libraries."""
    secret, content = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", b'{"test": 2432232314}'
    told = signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", content)
    assert told == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_json_says_what_and_when_and_the_time_of_the_try_is_signed():
    sent = asked("https://example.com/x", SAMPLED, secret="my own key")
    body = json.loads(sent.content)
    assert body["type"] == "training.sampled" and body["timestamp"] == "2023-11-14T22:13:20Z"
    assert body["data"] == SAMPLED.data and "/x/" not in sent.content.decode()
    assert sent.headers["webhook-id"] == "msg_1" and sent.headers["webhook-timestamp"] == "1700000005"
    signed = b"msg_1.1700000005." + sent.content
    digest = base64.b64encode(hmac.new(b"my own key", signed, hashlib.sha256).digest()).decode()
    assert sent.headers["webhook-signature"] == f"v1,{digest}"
    assert "webhook-signature" not in asked("https://example.com/x", SAMPLED).headers


def test_discord_gets_an_embed_with_the_image_and_calls_nobody():
    sent = asked("https://discord.com/api/webhooks/1/x", SAMPLED, image=b"jpeg")
    message = json.loads(sent.form["payload_json"])
    embed = message["embeds"][0]
    assert sent.file == b"jpeg" and embed["image"] == {"url": "attachment://samples.jpg"}
    assert message["allowed_mentions"] == {"parse": []} and "\\@everyone" in embed["title"]
    assert r"\*dog\*" in embed["title"] and "400 of 2,000" in embed["title"] and "0.25" in embed["description"]
    without = asked("https://discord.com/api/webhooks/1/x", FAILED)
    assert without.form is None and "image" not in json.loads(without.content)["embeds"][0]


def test_slack_gets_blocks_without_markup_and_is_told_where_the_images_are():
    message = json.loads(asked("https://hooks.slack.com/services/T/B/x", SAMPLED).content)
    assert "&lt;b&gt;" in message["text"] and "<" not in message["text"]
    kinds = [block["type"] for block in message["blocks"]]
    assert kinds == ["section", "section", "context"]
    assert "take no images" in message["blocks"][2]["elements"][0]["text"]


def test_ntfy_gets_an_attachment_with_the_message_in_headers():
    sent = asked("https://ntfy.sh/topic", SAMPLED, image=b"jpeg")
    assert (sent.method, sent.content, sent.headers["Filename"]) == ("PUT", b"jpeg", "samples.jpg")
    assert "loss 0.25" in sent.headers["Message"]
    failed = asked("https://ntfy.sh/topic", FAILED)
    assert failed.method == "POST" and "狐" in failed.content.decode() and failed.headers["Priority"] == "4"
    with_image = asked("https://ntfy.sh/topic", FAILED, image=b"jpeg")
    assert all(value.isascii() and "\n" not in value for value in with_image.headers.values())
    assert "狐" in str(make_header(decode_header(with_image.headers["Message"])))


@pytest.mark.parametrize("kind", ["discord", "slack", "ntfy"])
def test_people_need_not_read_of_each_save(kind):
    saved = Event(events.CHECKPOINT, 0.0, {**DATA, "files": []})
    assert not wants(kind, saved) and wants("json", saved) and wants(kind, FAILED)


ALL = (events.STARTED, events.SAMPLED, events.CHECKPOINT, events.FINISHED, events.FAILED, events.STOPPED)


@pytest.mark.parametrize("kind", ALL)
def test_every_event_has_a_line_even_where_nothing_is_known(kind):
    assert "LoRA" in title_of(Event(kind, 0.0, {"run": None, "base_model": "", "step": None, "total_steps": None}))
    for url in ("https://discord.com/x", "https://hooks.slack.com/x", "https://ntfy.sh/x", "https://example.com"):
        assert asked(url, Event(kind, 0.0, {"run": None, "base_model": "", "step": None, "total_steps": None}))
