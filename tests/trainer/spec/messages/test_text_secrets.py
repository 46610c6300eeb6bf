"""What looks like a secret is hidden, what is known to be one too, and nothing else is changed."""

import base64
import io
import json
import time
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.spec.messages.secrets import HIDDEN, HidingStream, Known, address, in_addresses, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/x?token=abc, next", "https://***@host/x?***, next"),
        ("see (https://h/x?sig=a%2Fb&x=1).", "see (https://h/x?***)."),
        ("https://me:pa/ss@host/x", "https://***@host/x"),
        (r"https:\/\/me:pass@h\/y?t=1", r"https:\/\/***@h\/y?***"),
        ("https:/me:pass@host/x?a=b", "https:/***@host/x?***"),
        ("hf://datasets/me:pa/ss@x", "hf://datasets/***@x"),
        ("https://token@github.com/x", "https://***@github.com/x"),
        ("https://me:cut short", "https://*** short"),
        ("http://host/x#access_token=abc", "http://host/x#***"),
        ("by the proxy me:secret@10.0.0.1:80", "by the proxy ***@10.0.0.1:80"),
        ("GET /x?a=b&token=c HTTP/1.1", "GET /x?a=***&token=*** HTTP/1.1"),
        ("X-Amz-Signature=abc&x", "X-Amz-Signature=***&x"),
        ("password=hunter2", "password=***"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer ***"),
        ("hf_abcDEF123 and RUNPOD_SECRET_hf_abcDEF123", "hf_*** and RUNPOD_SECRET_hf_***"),
        ("ghp_abcdefghijklmnop, rpa_ABCDEFGHIJKLMN", "ghp_***, rpa_***"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln", "***"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text, shown):
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "Have you opened https://huggingface.co/org/x? Accept its licence at https://huggingface.co/org/x.",
        *("https://huggingface.co/datasets/org/images@v1/x.zip", "http://[::1]:80/x", "https://host:8443/x#part"),
        *(
            "ghcr.io/me/kiln:0.1.0@sha256:abcd",
            "root@1.2.3.4:/workspace",
            "org/images@refs/pr/1",
            "C:/Users/me",
            "a: b@c",
        ),
        *("PARAMS_MAX_TOKEN_LENGTH=150", "key=value pairs", "hf_hub_download, hf_transfer", "HF_TOKEN is not set"),
        "docker run -v /path/of/your/images:/data:ro -e DATASET_NAME=/data",
        "PARAMS_LEARNING_RATE='1,0' is not a number. Allowed: number, above 0, up to 1000.",
    ],
)
def test_other_texts_stay(text):
    assert without_secrets(text) == text


def test_an_address_is_shown_without_login_query_and_fragment():
    assert address("HTTPS://me:pa/ss@Host:8/x/y.zip?token=a#b") == "https://Host:8/x/y.zip"
    assert address("https://[bad") == "https://[bad" and address("no address") == "no address"


@given(st.text())
def test_any_text_is_shown(text):
    address(text), in_addresses(text), without_secrets(text), Known([text]).hide(text)


@given(st.text(min_size=6).filter(lambda text: text.strip() == text), st.text(max_size=9))
def test_a_known_secret_is_found_in_every_form(secret, before):
    known = Known([secret])
    raw = secret.encode("utf-8", "surrogatepass")
    quoted = (urllib.parse.quote(raw, safe=""), urllib.parse.quote_plus(raw))
    for form in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], *quoted):
        assert form not in known.hide(f"({form})") or form == HIDDEN
    encoded = base64.b64encode(before.encode("utf-8", "surrogatepass") + raw + b"end").decode()
    assert len(raw) < 12 or known.hide(encoded) != encoded


def test_a_short_secret_is_no_part_of_a_word():
    assert Known(["secret"]).hide("secretary, secret") == "secretary, ***"
    assert Known(()).hide("x") == "x"


def test_a_stream_hides_what_is_known():
    inner = io.StringIO()
    stream = HidingStream(inner, Known(["hunter22"]))
    print("hunter22", file=stream)
    stream.writelines(["a hunter22", " b"])
    assert inner.getvalue() == "***\na *** b" and not stream.isatty()


@pytest.mark.parametrize(
    "text", ["a", "+", "a:", "?a", "@", "a@b:", "https://", "hf_", "eyJ", "bearer ", "https://)", "/a:"]
)
def test_time_grows_with_the_length(text):
    began = time.monotonic()
    without_secrets(text * (20_000 // len(text)))
    in_addresses(text * (20_000 // len(text)))
    assert time.monotonic() - began < 2


def test_a_long_secret_is_known_at_once():
    began = time.process_time()
    assert Known(["z" * 1_000_000, "hunter22"]).hide("a " + "z" * 1_000_000 + " hunter22") == "a *** ***"
    assert time.process_time() - began < 1
