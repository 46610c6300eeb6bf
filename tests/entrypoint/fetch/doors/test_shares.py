"""Share links of Google Drive and Dropbox, by the shapes of their pages."""

from __future__ import annotations

import pytest

from entrypoint.fetch import http
from entrypoint.fetch.doors import files, service, shares
from entrypoint.fetch.doors.keys import NO_KEYS
from tests.support.shelf import Shelf
from tests.support.small_weights import small_weights
from trainer.spec.errors import GatedError, SettingsError, UnreachableError

QUICK = http.RetryPolicy(budget=2.0, unreached=0.2, first_wait=0.01, longest_wait=0.02, timeout=5.0)
NUMBER = "1AbC-dEfGhIjKlMnOpQrStUvWxYz_12345"
LINK = f"https://drive.google.com/file/d/{NUMBER}/view?usp=sharing"
HTML = {"Content-Type": "text/html; charset=utf-8"}
WARNING = f"""<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">
<input type="submit" value="Download anyway"/><input type="hidden" name="id" value="{NUMBER}">
<input type="hidden" name="export" value="download"><input type="hidden" name="confirm" value="t">
<input type="hidden" name="uuid" value="12345678-aaaa"></form></body></html>"""


@pytest.fixture
def drive(monkeypatch):
    with Shelf() as shelf:
        shelf.files["/download"] = small_weights()
        shelf.disposition["/download"] = 'attachment; filename="style.safetensors"'
        monkeypatch.setattr(shares, "DRIVE", f"{shelf.url}/download")
        yield shelf


def page(text):
    return lambda _: (200, HTML, text.encode())


def test_a_file_comes_from_behind_the_page_that_warns(drive, tmp_path):
    drive.rules["/download"] = lambda request: None if "uuid=12345678-aaaa" in request.path else page(WARNING)(request)
    arrival = files.announce("X", f"X={LINK}", LINK, NO_KEYS, cache=tmp_path, retries=QUICK)
    files.bring(arrival, retries=QUICK)
    assert arrival.path.name == "style.safetensors" and arrival.path.read_bytes() == small_weights()


@pytest.mark.parametrize(
    "link",
    [
        LINK,
        f"https://drive.google.com/open?id={NUMBER}",
        f"https://drive.google.com/uc?export=download&id={NUMBER}",
        f"https://drive.google.com/file/d/{NUMBER}/view?resourcekey=0-abc",
        f"https://drive.usercontent.google.com/download?id={NUMBER}&confirm=xxx",
    ],
)
def test_a_file_has_many_links(drive, link):
    offer = service.ask(f"X={link}", link, NO_KEYS, retries=QUICK)
    assert offer.name == "style.safetensors" and service.identity(link) == f"drive:{NUMBER}"
    assert ("resourcekey=0-abc" in drive.asked[0][1]) is ("resourcekey" in link)


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (page("<html>Sorry, the download quota for this file has been exceeded</html>"), UnreachableError, "quota"),
        (page("<html>Too many users have viewed or downloaded this file recently</html>"), UnreachableError, "quota"),
        (page("<html>You need access. Ask for access</html>"), GatedError, "anyone with the link"),
        (page(WARNING), GatedError, "anyone with the link"),  # for ever
        (page(WARNING.replace(NUMBER, "another-number-1234")), GatedError, "anyone with the link"),
        (lambda _: (302, {"Location": "/ServiceLogin?continue=x"}, b""), GatedError, "anyone with the link"),
        (lambda _: (404, HTML, b"<html>not found</html>"), SettingsError, "no such file"),
        (lambda _: (403, HTML, b"<html>no</html>"), GatedError, "anyone with the link"),
    ],
)
def test_what_is_in_the_way_is_named(drive, answer, kind, said):
    drive.rules["/download"] = answer
    drive.rules["/ServiceLogin"] = page("<html>Sign in</html>")
    with pytest.raises(kind, match=said):
        service.ask(f"X={LINK}", LINK, NO_KEYS, retries=QUICK)


def test_a_folder_of_drive_is_no_file(drive):
    for link in (f"https://drive.google.com/drive/folders/{NUMBER}", "https://docs.google.com/document/x"):
        with pytest.raises(SettingsError, match="no link to one file of Google Drive"):
            service.ask(f"X={link}", link, NO_KEYS, retries=QUICK)


def test_a_link_of_dropbox_gives_the_file_or_says_that_it_is_not_shared(monkeypatch):
    with Shelf() as shelf:
        monkeypatch.setattr(shares, "DROPBOX_HOSTS", ("127.0.0.1",))
        shelf.files["/scl/fi/x/a.safetensors"] = small_weights()
        link = f"{shelf.url}/scl/fi/x/a.safetensors?rlkey=cAnary1&dl=0"
        assert service.ask("X=d", link, NO_KEYS, retries=QUICK).size == len(small_weights())
        assert all("dl=1" in path and "rlkey=cAnary1" in path for _, path, _ in shelf.asked)
        shelf.rules["/scl/fi/x/a.safetensors"] = page("<html>This item was deleted</html>")
        with pytest.raises(GatedError, match="anyone with the link") as problem:
            service.ask("X=d", link, NO_KEYS, retries=QUICK)
        assert "cAnary" not in str(problem.value)
