"""Folders that Google Drive shares, by the shape of its page for embedding."""

from __future__ import annotations

import html
import itertools
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest

from entrypoint.fetch import http
from entrypoint.fetch.doors import drive_folders, folders, shares
from entrypoint.fetch.doors.keys import NO_KEYS
from tests.support.shelf import Shelf
from trainer.spec.errors import DataError, GatedError, SettingsError, StorageError, UnreachableError

QUICK = http.RetryPolicy(budget=2.0, unreached=0.2, first_wait=0.01, longest_wait=0.02, timeout=5.0)
TOP, INNER = "1Folder-0123456789", "1Inner-0123456789"
LINK = f"https://drive.google.com/drive/folders/{TOP}"
HTML = {"Content-Type": "text/html; charset=utf-8"}
NOT_SHARED = "<html><title>Google Drive: Sign-in</title>Sign in to continue</html>"


def number_of(name):
    return f"1File-{name.encode().hex():0>12}"


def entry(link, title):
    return (
        f'<div class="flip-entry" id="entry-x" tabindex="0" role="link"><div class="flip-entry-info"><a href="{link}" '
        'target="_blank"><div class="flip-entry-visual"><div class="flip-entry-list-icon"></div></div>'
        f'<div class="flip-entry-title">{html.escape(title)}</div></a></div>'
        '<div class="flip-entry-last-modified"><div>Nov 3</div></div></div>'
    )


def file(title):
    return entry(f"https://drive.google.com/file/d/{number_of(title)}/view?usp=drive_web", title)


def folder(number, title):
    return entry(f"https://drive.google.com/drive/folders/{number}", title)


def page(*entries):
    listed = f'<div class="flip-entries">{"".join(entries)}</div>'
    return f"<html><head><title>photos</title></head><body>{listed}</body></html>"


@pytest.fixture
def drive(monkeypatch):
    """`drive.lists`: folder → page; `drive.contents`: number of a file → bytes."""
    with Shelf() as shelf:
        shelf.lists, shelf.contents = {}, {}

        def asked(request):
            return parse_qs(urlsplit(request.path).query)["id"][0]

        def of_list(request):
            found = shelf.lists.get(asked(request))
            return (404, HTML, b"") if found is None else (200, HTML, found.encode())

        def of_file(request):
            data = shelf.contents.get(asked(request))
            if data is None:
                return 404, HTML, b""
            if request.headers.get("Range") == "bytes=0-0":
                head = {"Content-Type": "image/png", "Content-Range": f"bytes 0-0/{len(data)}"}
                return 206, head, data[:1]
            return 200, {"Content-Type": "image/png"}, data

        shelf.rules |= {"/list": of_list, "/download": of_file}
        monkeypatch.setattr(drive_folders, "LISTS", f"{shelf.url}/list")
        monkeypatch.setattr(shares, "DRIVE", f"{shelf.url}/download")
        yield shelf


def bring(tmp_path, retries=QUICK):
    return folders.bring("X=drive", LINK, NO_KEYS, cache=tmp_path, retries=retries)


def held(place):
    found = (path for path in place.rglob("*") if path.is_file() and not path.name.startswith(".kiln"))
    return {str(path.relative_to(place)): path.read_bytes() for path in found}


def refused(kind, tmp_path):
    with pytest.raises(kind) as problem:
        bring(tmp_path)
    assert str(problem.value).startswith("X=")
    return str(problem.value)


def test_all_files_of_a_folder_and_of_those_in_it_come_once(drive, tmp_path):
    document = entry("https://docs.google.com/document/d/1Doc-0123456789/edit", "notes")
    drive.lists[TOP] = page(file("Tom & Jerry é.png"), folder(INNER, "sub"), document)
    drive.lists[INNER] = page(file("2.txt"), folder(TOP, "back"))  # in a circle
    drive.contents = {number_of("Tom & Jerry é.png"): b"picture", number_of("2.txt"): b"caption"}
    place = bring(tmp_path)
    assert held(place) == {"Tom & Jerry é.png": b"picture", "sub/2.txt": b"caption"}
    before = len(drive.asked)
    assert bring(tmp_path) == place
    assert {path.partition("?")[0] for _, path, _ in drive.asked[before:]} == {"/list"}


def test_what_is_no_file_is_named(drive, tmp_path, caplog):
    drive.lists[TOP] = page(file("a.png"), entry("https://docs.google.com/document/d/1Doc-0123456789/edit", "9/11"))
    drive.contents[number_of("a.png")] = b"1"
    bring(tmp_path)
    assert "left out, since they are no files: 9/11" in caplog.text


def test_a_job_that_was_stopped_asks_for_what_is_missing_alone(drive, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PARALLEL_FILES", 1)
    drive.lists[TOP] = page(file("a.png"), file("b.png"))
    drive.contents[number_of("a.png")] = b"1"
    refused(SettingsError, tmp_path)  # b.png is not there yet
    drive.contents[number_of("b.png")] = b"22"
    before = len(drive.asked)
    assert held(bring(tmp_path)) == {"a.png": b"1", "b.png": b"22"}
    assert not any(number_of("a.png") in path for _, path, _ in drive.asked[before:])


OLD, NEW = bytes(50) + b"old version" * 20_000, bytes(50) + b"new version" * 20_000  # equally long


def serve_in_parts(drive, data, tag, *, breaks, tells=lambda request: True):
    """One file, with ranges; `tag`: its version, None: it has none. `breaks`: no answer is whole."""
    length = len(data)

    def answer(request):
        said = request.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        first, last = (int(number or length - 1) for number in said.split("-"))
        head = {"Content-Type": "image/png", "Content-Range": f"bytes {first}-{last}/{length}"}
        if tag and tells(request):
            head["ETag"] = tag
        body = data[first : last + 1]
        if breaks and last > 0:
            body = data[first : length // 2]
            head |= {"Content-Length": str(last + 1 - first), "Connection": "close"}
            request.close_connection = True
        return (206 if "Range" in request.headers else 200), head, body

    drive.lists[TOP] = page(file("a.png"))
    drive.rules["/download"] = answer


def is_of_one_byte(request):
    return request.headers.get("Range") == "bytes=0-0"


@pytest.mark.parametrize(
    ("old", "new", "tells"),
    [
        ('"1"', '"2"', lambda request: True),
        (None, None, lambda request: True),
        ('"1"', None, lambda request: True),
        ('"1"', '"1"', is_of_one_byte),  # it cannot be compared
    ],
)
def test_a_file_is_never_put_together_from_two_versions(drive, tmp_path, old, new, tells):
    serve_in_parts(drive, OLD, old, breaks=True, tells=tells)
    with pytest.raises(UnreachableError):
        bring(tmp_path, replace(QUICK, budget=0.3))
    serve_in_parts(drive, NEW, new, breaks=False, tells=tells)
    assert held(bring(tmp_path)) == {"a.png": NEW}


def test_the_same_version_goes_on_where_it_was(drive, tmp_path):
    serve_in_parts(drive, OLD, '"1"', breaks=True)
    with pytest.raises(UnreachableError):
        bring(tmp_path, replace(QUICK, budget=0.3))
    asked = []
    serve_in_parts(
        drive, OLD, '"1"', breaks=False, tells=lambda request: asked.append(request.headers["Range"]) or True
    )
    assert held(bring(tmp_path)) == {"a.png": OLD}
    assert asked[-1] == f"bytes={len(OLD) // 2}-"


@pytest.mark.parametrize("title", ["../out.png", "a/b.png", "..", "nul\x01.png", "x" * 300])
def test_names_that_lead_out_or_are_none_are_refused(drive, tmp_path, title):
    drive.lists[TOP] = page(file(title))
    assert "Rename it" in refused(SettingsError, tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_two_files_of_one_name_are_refused(drive, tmp_path):
    drive.lists[TOP] = page(file("a.png"), file("a.png"))
    assert "Rename it in Google Drive" in refused(SettingsError, tmp_path)


def test_what_is_not_shared_says_so(drive, tmp_path):
    assert "not shared" in refused(SettingsError, tmp_path)
    drive.lists[TOP] = NOT_SHARED
    assert "anyone with the link" in refused(GatedError, tmp_path)
    drive.rules["/list"] = lambda _: (302, {"Location": "/ServiceLogin?continue=x"}, b"")
    drive.rules["/ServiceLogin"] = lambda _: (200, HTML, NOT_SHARED.encode())
    assert "anyone with the link" in refused(GatedError, tmp_path)


def test_an_empty_folder_is_no_dataset(drive, tmp_path):
    drive.lists[TOP] = page()
    refused(DataError, tmp_path)


@pytest.mark.parametrize(
    "shown",
    [
        "<html><title>Before you continue</title><form>Accept all</form></html>",
        "<html><body>Sorry, something went wrong.</body></html>",
        "<html><body><div class='grid-entries'><a href='/file/d/1'>a.png</a></div></body></html>",
        page(file("b.png")).replace("flip-entry-title", "flip-entry-name"),
    ],
)
def test_a_page_that_is_no_list_is_never_an_empty_folder(drive, tmp_path, shown):
    drive.lists = {TOP: page(file("a.png"), folder(INNER, "sub")), INNER: shown}
    drive.contents[number_of("a.png")] = b"1"
    assert "list" in refused(UnreachableError, tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_a_list_that_fails_is_asked_for_again_and_no_other(drive, tmp_path):
    drive.lists = {TOP: page(file("a.png"), folder(INNER, "sub")), INNER: page(file("b.png"))}
    drive.contents = {number_of("a.png"): b"1", number_of("b.png"): b"22"}
    of_list, failures = drive.rules["/list"], [503, 503]

    def failing(request):
        return (failures.pop(), HTML, b"") if INNER in request.path and failures else of_list(request)

    drive.rules["/list"] = failing
    assert held(bring(tmp_path)) == {"a.png": b"1", "sub/b.png": b"22"}
    lists = [path for _, path, _ in drive.asked if path.startswith("/list")]
    assert [INNER in path for path in lists] == [False, True, True, True]


def test_what_is_closed_without_its_key_is_asked_for_with_it(drive, tmp_path):
    inner = entry(f"https://drive.google.com/drive/folders/{INNER}?resourcekey=0-inner", "sub")
    picture = entry(f"https://drive.google.com/file/d/{number_of('a.png')}/view?usp=x&resourcekey=0-file", "a.png")
    drive.lists = {TOP: page(inner), INNER: page(picture, file("b.png"))}
    drive.contents = {number_of("a.png"): b"1", number_of("b.png"): b"22"}
    keys = {TOP: "0-top", INNER: "0-inner", number_of("a.png"): "0-file"}
    for path, rule in list(drive.rules.items()):

        def asking_for_keys(request, rule=rule):
            query = parse_qs(urlsplit(request.path).query)
            has_key = query.get("resourcekey", [None])[0] == keys.get(query["id"][0])
            return rule(request) if has_key else (404, HTML, b"")

        drive.rules[path] = asking_for_keys
    found = folders.bring("X=drive", f"{LINK}?resourcekey=0-top", NO_KEYS, cache=tmp_path, retries=QUICK)
    assert held(found) == {"sub/a.png": b"1", "sub/b.png": b"22"}
    keys[TOP] = "0-new"
    assert folders.known(f"{LINK}?resourcekey=0-new", tmp_path, {}) == found


def test_empty_files_and_files_that_are_pages_come_as_they_are(drive, tmp_path):
    drive.lists[TOP] = page(file("a.png"), file("a.txt"), file("about.html"))
    contents = {"a.png": b"1", "a.txt": b"", "about.html": b"<html>Sign in</html>"}
    kinds = {"a.png": "image/png", "a.txt": "text/plain", "about.html": "text/html; charset=utf-8"}

    def answer(request):
        name = next(name for name in contents if number_of(name) in request.path)
        data, head = (
            contents[name],
            {"Content-Type": kinds[name], "Content-Disposition": f'attachment; filename="{name}"'},
        )
        if "Range" not in request.headers:
            return 200, head, data
        if not data:
            return 416, {"Content-Range": "bytes */0"}, b""
        return 206, {**head, "Content-Range": f"bytes 0-0/{len(data)}"}, data[:1]

    drive.rules["/download"] = answer
    assert held(bring(tmp_path)) == contents


def test_a_folder_that_does_not_fit_the_volume_is_refused_before_it_fills_it(drive, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MOST_BYTES", 2**52)
    drive.lists[TOP] = page(file("a.png"))
    head = {"Content-Type": "image/png", "Content-Range": f"bytes 0-0/{2**50}"}
    drive.rules["/download"] = lambda _: (206, head, b"1")
    assert "a.png: 1048576.0 GiB are needed on the volume" in refused(StorageError, tmp_path)


@pytest.mark.parametrize("says_sizes", [True, False])
def test_a_folder_has_a_largest_size(drive, tmp_path, monkeypatch, says_sizes):
    monkeypatch.setattr(folders, "PARALLEL_FILES", 1)
    monkeypatch.setattr(folders, "MOST_BYTES", 2500)
    names = ("a.png", "b.png", "c.png")
    drive.lists[TOP] = page(*(file(name) for name in names))
    drive.contents = {number_of(name): bytes(1000) for name in names}
    of_file = drive.rules["/download"]

    def without_sizes(request):
        status, head, data = of_file(request)
        return status, {**head, "Content-Range": "bytes 0-0/*"} if status == 206 else head, data

    if not says_sizes:
        drive.rules["/download"] = without_sizes
    assert "the most that is accepted" in refused(DataError, tmp_path)
    assert "the most that is accepted" in refused(DataError, tmp_path)  # what came before counts as well
    monkeypatch.setattr(folders, "MOST_BYTES", 3000)
    assert len(held(bring(tmp_path))) == 3
    monkeypatch.setattr(folders, "MOST_BYTES", 999)
    drive.lists[TOP] = page(file("d.png"))
    drive.contents = {number_of("d.png"): bytes(1000)}
    assert "the most that is accepted" in refused(DataError, tmp_path)


def test_folders_without_end_end(drive, tmp_path, monkeypatch):
    monkeypatch.setattr(drive_folders, "MOST_FOLDERS", 5)
    numbers = [f"1Deep-{number:010}" for number in range(20)]
    drive.lists[TOP] = page(folder(numbers[0], "d"))
    for number, following in itertools.pairwise(numbers):
        drive.lists[number] = page(folder(following, "d"))
    assert "archive" in refused(SettingsError, tmp_path)
    assert len(drive.asked) == 5


@pytest.mark.parametrize(("what", "most"), [("MOST_FILES", 1), ("PAGE_BYTES", 500)])
def test_lists_without_end_end(drive, tmp_path, monkeypatch, what, most):
    monkeypatch.setattr(drive_folders, what, most)
    drive.lists[TOP] = page(file("a.png"), file("b.png"))
    assert "archive" in refused(SettingsError, tmp_path)
