"""Names from outside: whichever source gives them, nothing outside of its folder is read or written.

Each test stands a folder with bystanders around the target, and compares every file of it afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from entrypoint.fetch import hub
from entrypoint.fetch.fetch import fetch_source, known_download
from entrypoint.fetch.http import RetryPolicy
from entrypoint.fetch.hub_dataset.hub_rows import Asked, write_dataset
from entrypoint.runpod.download import commands, ssh_host
from tests.support.raw_server import RawServer, answer
from trainer.spec.errors import DataError, KilnError, SettingsError, UnreachableError
from trainer.spec.plan import Source
from trainer.storage.safe_names import Names, is_safe

QUICK = RetryPolicy(budget=0.3, unreached=0.2, first_wait=0.02, longest_wait=0.05, timeout=1.0)
COMMIT, BLOB = "1" * 40, "2" * 40
HOSTILE = [
    *("../x.png", "../../x.png", "a/../../x.png", "..", "../", "a/..", "/x.png", "//x.png", "/etc/passwd"),
    *("\0.png", "a\0/../x.png", "..\\x.png", "a\\..\\..\\x.png", "C:\\x.png", "C:/x.png", "c:x.png", "\\\\host\\x.png"),
    *("\n.png", "a\x1b[2J.png", "a\x7f.png", "\x85.png", "\udce4.png", "a" * 256 + ".png", "a/" * 600 + "x.png", ""),
    *(".", "./", "/", "./../x.png", "a/./../../x.png", "....//../x.png"),
]
USUAL = ["a.png", "a/b.png", "ä/ö (1).png", "10_ohwx woman/1.png", ".hidden", "a..b", "con", "x" * 255]
COMMITS = [
    *("../../x", "/etc", "", ".", "1" * 39, "1" * 41, "g" * 40, "1" * 39 + "/", "1" * 40 + "\n"),
    *(None, 7, [], {}),
]
HASHES = ["../../x", "/etc/passwd", "", "a" * 41, "x" * 64, BLOB + "\n", "A" * 40, None, 7, [BLOB]]
REPOSITORIES = [
    *("../x", "a/../../b", "..", "a/b/c", "/x", "a\\b", "a\0b", "a b", "a--b/c", "a" * 200, "", "a/..", ".a/b"),
]
NOTES = [
    *(b"", b"[]", b"{", b'{"../../x": [9, "' + b"1" * 40 + b'"]}', b'{"a": 3}', b'{"a": ["x", 3]}', b'{"a": []}'),
]
FORMS = ["data_files: {}", "data_files: [{}]", "data_dir: {}", "data_files: [{{split: train, path: {}}}]"]
LAST_NAMES = [
    *("known.json", "lock", "whole", "..", "%2e%2e", "..%2f..%2fx.zip", "%00", "a" * 300 + ".zip", "", "."),
    *("a\\b.zip", "%5c..%5cx"),
]
USERS = ("-oProxyCommand=touch x", "", "a b", "a;b", "a@b", 7)
HOSTS = ("-oProxyCommand=x", "", "a b", "a/b", "a:b", "$(x)", None)
PORTS = ("22", 0, -1, 65536, None, 1.5)
ids = [repr(name)[:30] for name in HOSTILE]
every_hostile_name = pytest.mark.parametrize("name", HOSTILE, ids=ids)


def image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = image()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder among bystanders, which are the same afterwards; the process stands in it."""
    (tmp_path / "x.png").write_bytes(b"bystander")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "x.png").write_bytes(b"bystander")
    inner = tmp_path / "deep" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "deep" / "x.png").write_bytes(b"bystander")
    monkeypatch.chdir(inner)
    before = tree(tmp_path, without=inner)
    yield inner
    assert tree(tmp_path, without=inner) == before
    for path in inner.rglob("*"):
        if path.is_symlink():
            assert path.resolve().is_relative_to(inner)


def tree(folder: Path, *, without: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path != without and not path.is_relative_to(without):
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            found[str(path)] = f"{content} {path.lstat().st_mode}"
    return found


@every_hostile_name
def test_the_one_check_knows_them_all(name):
    assert not is_safe(name)


@pytest.mark.parametrize("name", USUAL)
def test_usual_names_pass(name):
    assert is_safe(name)


def test_names_that_clash():
    names = Names()
    names.add("a/b.png", folder=False)
    for clash in ("A/B.png", "a/b.png", "a/b.png/c", "a"):
        with pytest.raises(DataError):
            names.add(clash, folder=False)


# ---- the Hub


def listing(place, monkeypatch, *, kind="dataset", revision=None, **changes):
    """What a Hub announces: described, and brought."""
    file = {"rfilename": "1.png", "size": 3, "blobId": hashlib.sha1(b"blob 3\0abc").hexdigest()}
    file |= {key: value for key, value in changes.items() if key in ("rfilename", "size", "blobId", "lfs")}
    body = {"sha": COMMIT, "siblings": [file]} | {k: v for k, v in changes.items() if k in ("sha", "siblings")}

    def script(connection, head):
        return answer(json.dumps(body).encode()) if "/api/" in head.split(" ")[1] else answer(b"abc")

    with RawServer(script) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        repo = hub.Repo(kind, "org/x", "DATASET_NAME=org/x", revision=revision, cache=place / "hub", retries=QUICK)
        found = hub.describe(repo)
        return hub.bring(repo, found, found.files)


def test_what_an_honest_hub_announces_is_brought(place, monkeypatch):
    assert (listing(place, monkeypatch) / "1.png").read_bytes() == b"abc"


@every_hostile_name
def test_a_file_of_a_hostile_hub(place, monkeypatch, name):
    with pytest.raises(SettingsError, match="announces an impossible file") as problem:
        listing(place, monkeypatch, rfilename=name)
    assert str(problem.value).isprintable()


@pytest.mark.parametrize("commit", COMMITS)
def test_a_commit_of_a_hostile_hub(place, monkeypatch, commit):
    with pytest.raises(SettingsError, match="announces a commit"):
        listing(place, monkeypatch, sha=commit)
    assert not (place / "hub").exists()


@pytest.mark.parametrize("etag", HASHES)
def test_a_hash_of_a_hostile_hub(place, monkeypatch, etag):
    for changes in ({"blobId": etag}, {"lfs": {"size": 3, "sha256": etag}}):
        with pytest.raises(SettingsError, match="impossible file"):
            listing(place, monkeypatch, **changes)


@pytest.mark.parametrize("size", [-1, 2**60, "3", 1.5, [], True and "x"])
def test_a_size_of_a_hostile_hub(place, monkeypatch, size):
    with pytest.raises(SettingsError, match="impossible file"):
        listing(place, monkeypatch, size=size)


@pytest.mark.parametrize("siblings", [None, {}, 3, "x", [None], ["x"], [[]], [{}], [{"rfilename": "x"}]])
def test_a_list_of_a_hostile_hub(place, monkeypatch, siblings):
    with pytest.raises(SettingsError):
        listing(place, monkeypatch, siblings=siblings)


def test_another_commit_than_was_asked_for(place, monkeypatch):
    with pytest.raises(SettingsError, match="in the place of"):
        listing(place, monkeypatch, revision="3" * 40)


def test_files_and_folders_of_one_name(place, monkeypatch):
    files = [{"rfilename": name, "size": 3, "blobId": BLOB} for name in ("a", "a/b")]
    with pytest.raises(SettingsError, match="impossible file"):
        listing(place, monkeypatch, siblings=files)


def test_a_list_of_a_million_files_is_refused(place, monkeypatch):
    monkeypatch.setattr(hub, "MOST_FILES", 100)
    files = [{"rfilename": f"{i}.png", "size": 3, "blobId": BLOB} for i in range(101)]
    with pytest.raises(SettingsError, match="101 files"):
        listing(place, monkeypatch, siblings=files)


@every_hostile_name
def test_a_revision(place, monkeypatch, name):
    with pytest.raises(SettingsError, match="DATASET_REVISION"):
        listing(place, monkeypatch, revision=name)


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_repository(place, monkeypatch, name):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    repo = hub.Repo("model", name, f"MODEL_PATH={name}", cache=place / "hub", retries=QUICK)
    assert hub.cached_commit(repo) is None
    with pytest.raises(SettingsError, match="nor the name of a Hub repository"):
        hub.describe(repo)


@pytest.mark.parametrize("content", ["../../../x", "/etc", "x" * 40, "1" * 41, "", "\0" * 40, "\udce4"])
def test_a_note_in_the_cache_that_somebody_else_wrote(place, content):
    repo = hub.Repo("model", "org/x", "MODEL_PATH=org/x", cache=place / "hub", retries=QUICK)
    ref = repo.folder / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert hub.cached_commit(repo) is None
    assert hub.cached_snapshot(repo, lambda names: set(names)) is None


@pytest.mark.parametrize("note", NOTES)
def test_a_list_in_the_cache_that_somebody_else_wrote(place, note):
    repo = hub.Repo("model", "org/x", "MODEL_PATH=org/x", cache=place / "hub", revision=COMMIT, retries=QUICK)
    (repo.folder / "snapshots" / COMMIT).mkdir(parents=True)
    (repo.folder / "kiln").mkdir()
    (repo.folder / "kiln" / f"{COMMIT}.json").write_bytes(note)
    found = hub.cached_snapshot(repo, lambda names: set(names))
    assert found is not None and not found.is_verified


# ---- datasets


def written(place, files, **asked):
    """The images that a downloaded dataset becomes."""
    snapshot, target = place / "snapshot", place / "target"
    for name, data in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(data)
    target.mkdir()
    scratch = place / "scratch"
    scratch.mkdir()
    return write_dataset(snapshot, target, Asked("DATASET_NAME=x", "train", **asked), scratch=str(scratch))


@every_hostile_name
@pytest.mark.parametrize("column", ["file_name", "image_file_name", "__folder__", "image"])
def test_a_row_of_metadata(place, name, column):
    row = {"file_name": "1.png", "text": "a", column: name}
    text = json.dumps(row) + "\n"
    try:
        written(place, {"1.png": IMAGE, "metadata.jsonl": text.encode("utf-8", "surrogatepass")})
    except (DataError, SettingsError) as problem:
        assert len(str(problem)) < 2500


@every_hostile_name
def test_a_row_of_a_table(place, name):
    try:
        name.encode()
    except UnicodeEncodeError:
        pytest.skip("parquet holds no half letters")
    rows = [{"image": {"bytes": None, "path": name}, "__folder__": name, "text": "a"}]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    with contextlib.suppress(DataError, SettingsError):  # or it is a row without an image
        written(place, {"train.parquet": buffer.getvalue()})
    assert [p for p in (place / "target").rglob("*") if p.is_file() and b"bystander" in p.read_bytes()] == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name",
    [
        *("../**", "/**", "/etc/*", "../../x.png", "http://127.0.0.1:1/x", "hf://datasets/a/b/*", "zip://x::../x.zip"),
        *("file:///etc/passwd", "..", "a/../../*", "s3://x/y", "memory://x", "::", "~/../*"),
    ],
)
def test_a_readme(place, form, name):
    card = f"---\nconfigs:\n- config_name: default\n  {form.format(json.dumps(name))}\n---\n"
    with pytest.raises(DataError, match=r"outside of itself|are missing"):
        written(place, {"README.md": card.encode(), "1.png": IMAGE})


@every_hostile_name
def test_names_of_subsets_and_splits(place, name):
    quoted = json.dumps(name)
    card = f"---\nconfigs:\n- config_name: {quoted}\n  data_files: [{{split: {quoted}, path: 1.png}}]\n---\n"
    with contextlib.suppress(DataError, SettingsError):
        written(place, {"README.md": card.encode("utf-8", "surrogatepass"), "1.png": IMAGE})


# ---- archives


def packed(name: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as container:
            info = zipfile.ZipInfo("x")
            info.filename = name
            container.writestr(info, IMAGE)
            container.writestr("good.png", IMAGE)
    else:
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as container:
            for one in (name, "good.png"):
                member = tarfile.TarInfo(one)
                member.size = len(IMAGE)
                container.addfile(member, io.BytesIO(IMAGE))
    return buffer.getvalue()


@every_hostile_name
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_entry_of_an_archive(place, name, kind):
    try:
        data = packed(name, kind)
    except (UnicodeEncodeError, ValueError, IndexError):
        pytest.skip("such an archive cannot be made with Python")
    (place / "a").with_suffix(f".{kind}").write_bytes(data)
    source = Source("archive", str((place / "a").with_suffix(f".{kind}")))
    try:
        fetch_source(source, cache=place / "cache", token=None, retries=QUICK)
    except (DataError, SettingsError) as problem:
        assert len(str(problem)) < 2500


@pytest.mark.parametrize("name", LAST_NAMES)
def test_the_name_in_an_address(place, name):
    data = packed("1.png", "zip")
    with RawServer(lambda c, h: answer(data, content_disposition='attachment; filename="../../x.png"')) as server:
        try:
            fetch_source(Source("archive", f"{server.url}/a/{name}"), cache=place / "cache", token=None, retries=QUICK)
        except SettingsError:
            assert "\\" in name


@pytest.mark.parametrize("digest", ["../../..", "", None, 7, "x" * 64, "/" * 64, ["a"]])
def test_a_note_of_a_download_that_somebody_else_wrote(place, digest):
    source = Source("archive", "http://127.0.0.1:1/a.zip")
    note = place / "cache" / "downloads" / hashlib.sha256(source.location.encode()).hexdigest()[:16] / "known.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"digest": digest, "version": None}))
    assert known_download(source, place / "cache") is None


@pytest.mark.parametrize("version", ['"../../x"', "/etc/passwd", "\x7f", '"' + "a" * 5000 + '"'])
def test_the_version_of_a_file(place, version):
    data = packed("1.png", "zip")
    with RawServer(lambda c, h: answer(data, etag=version)) as server:
        try:
            done = fetch_source(
                Source("archive", f"{server.url}/a.zip"), cache=place / "cache", token=None, retries=QUICK
            )
            assert Path(done.path).is_relative_to(place)
        except KilnError as problem:
            assert isinstance(problem, UnreachableError)


# ---- pods


@pytest.mark.parametrize(
    "direct",
    [
        *({"username": user, "host": "1.2.3.4", "port": 22} for user in USERS),
        *({"username": "root", "host": host, "port": 22} for host in HOSTS),
        *({"username": "root", "host": "1.2.3.4", "port": port} for port in PORTS),
        *([], "x", 7, {"username": "root"}),
    ],
)
def test_the_address_of_a_pod(direct):
    if not direct:
        assert ssh_host({"ssh": {"direct": direct}}) is None
        return
    with pytest.raises(UnreachableError, match="SSH address"):
        ssh_host({"ssh": {"direct": direct}})


def test_a_pod_sends_files_and_folders_alone():
    host = ssh_host({"ssh": {"direct": {"username": "root", "host": "1.2.3.4", "port": 22}}})
    assert host is not None
    rsync, scp = commands(host, "/workspace/output", Path("output"))
    options = [option for option in rsync[: rsync.index("--")] if option.startswith("-")]
    assert "-rtv" in options and not {"-a", "-l", "-L", "-k", "-K", "-D"} & set(options)
    assert "--" in scp and os.sep not in scp[0]
