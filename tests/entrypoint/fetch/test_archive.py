"""Archives of unknown origin: what is unpacked, what is refused, and that a refusal leaves nothing behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrypoint.dataset_config.sources import ARCHIVES
from entrypoint.fetch.archive import Limits, content_root, extract, has_file, safe_path
from entrypoint.fetch.fetch import fetch_source
from trainer.data.folder_listing import list_folder
from trainer.data.folders import leftovers
from trainer.spec.errors import DataError
from trainer.spec.plan import Source, Subset
from trainer.storage.folders import MARKER

NOISE = random.Random(7).randbytes(4000)
KINDS = ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"]
Pack = Callable[..., Path]


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    """`pack(kind, {name: content})`: an archive with these entries, in this order; names that end in / are folders."""

    def make(kind: str, files: dict[str, bytes]) -> Path:
        path = tmp_path / f"a.{kind}"
        if kind == "zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as container:
                for name, data in files.items():
                    container.writestr(name, data)
            return path
        with tarfile.open(path, "w:" + kind[4:]) as container:
            for name, data in files.items():
                add(container, name.rstrip("/"), data, type=tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE)
        return path

    return make


def add(container: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    container.addfile(member, io.BytesIO(data))


def target(path: Path) -> Path:
    folder = path.parent / "inside" / "target"
    folder.mkdir(parents=True)
    return folder


def tree(folder: Path) -> dict[str, str]:
    """Everything below `folder`, with hashes of contents."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


def refused(path: Path, why: str, **limits: int) -> None:
    """The archive is refused for this reason, and through `fetch_source` leaves the world as it was."""
    folder = target(path)
    with pytest.raises(DataError, match=why):
        extract(path, folder, limits=Limits(**limits) if limits else Limits())
    assert not [p for p in folder.rglob("*") if p.is_symlink() or not (p.is_file() or p.is_dir())]
    if limits:
        return
    cache = path.parent / "cache"
    (cache / "datasets").mkdir(parents=True)
    before = tree(path.parent)
    with pytest.raises(DataError, match=why) as problem:
        fetch_source(Source("archive", str(path)), cache=cache, token=None)
    assert problem.value.exit_code == 65 and path.name in str(problem.value)
    assert {k: v for k, v in tree(path.parent).items() if not k.endswith(".lock")} == before


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!\x1a\x07\x01", "a RAR archive"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n<html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    ],
)
def test_what_is_only_named_like_an_archive_is_named_for_what_it_is(tmp_path: Path, head: bytes, what: str) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(head + bytes(100))
    refused(path, f"a.zip is {what}" if "LFS" not in what else what)


def test_archives_in_an_archive_are_named(pack: Pack, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = pack("zip", {"1.png": NOISE, "more/inner.zip": b"x", "b.7z": b"x"})
    fetch_source(Source("archive", str(path)), cache=tmp_path / "c", token=None)
    assert "a.zip: archives in it are not used: b.7z, more/inner.zip. Unpack it" in caplog.text


def test_the_mark_of_a_whole_folder_is_no_file_of_the_user(pack: Pack, tmp_path: Path) -> None:
    source = fetch_source(Source("archive", str(pack("zip", {"1.png": NOISE}))), cache=tmp_path / "c", token=None)
    assert (Path(source.path) / MARKER).is_file() and leftovers.OWN_MARKER == MARKER
    folder = list_folder(Subset(source))
    assert folder.images == ["1.png"] and not folder.left_out


def test_a_webdataset_on_this_machine_has_the_captions_of_its_json(pack: Pack, tmp_path: Path) -> None:
    said = {"0.json": b'{"caption": "zero"}', "1.json": b'{"text": ["one", "two"]}', "2.json": b'{"caption": "no"}'}
    files = {f"{i}.png": bytes([i]) * 4000 for i in range(4)} | said | {"2.txt": b"two", "3.json": b'{"score": 1}'}
    files["list.json"] = b"[1]"
    folder = Path(fetch_source(Source("archive", str(pack("tar", files))), cache=tmp_path / "c", token=None).path)
    texts = {path.name: path.read_text() for path in folder.glob("*.txt")}
    assert texts == {"0.txt": "zero", "1.txt": "one\ntwo", "2.txt": "two"}


# --- what is unpacked


@pytest.mark.parametrize("kind", KINDS)
def test_files_come_out_as_they_went_in(pack: Pack, kind: str) -> None:
    files = {"a/b/1.png": NOISE, "a/1.txt": b"caption", "empty.txt": b"", "ü 漢.png": b"x"}
    path = pack(kind, {"a/": b"", **files, "a/b/": b""})
    folder = target(path)
    assert extract(path, folder) == 4
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files


@pytest.mark.parametrize("kind", KINDS)
def test_archives_inside_stay_packed_and_litter_stays_out(pack: Pack, kind: str) -> None:
    inner = pack("zip", {"x.png": NOISE}).read_bytes()
    path = pack(kind, {"inner.zip": inner, "__MACOSX/._x.png": b"?", "._y.png": b"?", ".DS_Store": b"?"})
    folder = target(path)
    assert extract(path, folder) == 1
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["inner.zip"]


def test_a_packed_working_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "src" / "p").mkdir(parents=True)
    (tmp_path / "src" / "p" / "1.png").write_bytes(NOISE)
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as container:
        container.add(tmp_path / "src", arcname=".")
    assert extract(tmp_path / "a.tgz", target(tmp_path / "a.tgz")) == 1


def test_nothing_that_is_unpacked_can_be_run(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as container:
        add(container, "run", b"#!/bin/sh", mode=0o4777)
    folder = target(tmp_path / "a.tar")
    extract(tmp_path / "a.tar", folder)
    assert stat.S_IMODE((folder / "run").stat().st_mode) & 0o7111 == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_unpacked_once_and_starts_below_a_lone_folder(pack: Pack, tmp_path: Path, kind: str) -> None:
    path = pack(kind, {"set/1.png": NOISE, "set/1.txt": b"one"})
    cache = tmp_path / "cache"
    first = fetch_source(Source("archive", str(path)), cache=cache, token=None)
    folder = Path(first.path)
    assert sorted(p.name for p in folder.iterdir()) == ["1.png", "1.txt"]
    stamp = folder.stat().st_mtime_ns
    path = path.rename(tmp_path / f"renamed.{kind}")
    again = fetch_source(Source("archive", str(path)), cache=cache, token=None)
    assert again.path == first.path and folder.stat().st_mtime_ns == stamp


def test_a_changed_archive_is_another_folder(pack: Pack, tmp_path: Path) -> None:
    first = fetch_source(Source("archive", str(pack("zip", {"1.png": NOISE}))), cache=tmp_path / "c", token=None)
    other = fetch_source(Source("archive", str(pack("zip", {"2.png": NOISE}))), cache=tmp_path / "c", token=None)
    assert first.path != other.path and (Path(other.path) / "2.png").exists()


def test_what_a_killed_run_left_is_cleaned_up(pack: Pack, tmp_path: Path) -> None:
    path = pack("zip", {"1.png": NOISE})
    folder = Path(fetch_source(Source("archive", str(path)), cache=tmp_path / "c", token=None).path)
    left = folder.with_name(f".{folder.name}.kiln.tmp")
    folder.rename(left)
    (left / MARKER).unlink()
    assert fetch_source(Source("archive", str(path)), cache=tmp_path / "c", token=None).path == str(folder)
    assert not left.exists() and (folder / "1.png").read_bytes() == NOISE


def test_a_file_in_the_archive_cannot_pass_for_the_marker(pack: Pack, tmp_path: Path) -> None:
    path = pack("zip", {MARKER: b'{"files": 0, "bytes": 0, "facts": {}}', "1.png": NOISE})
    folder = Path(fetch_source(Source("archive", str(path)), cache=tmp_path / "c", token=None).path)
    assert (folder / "1.png").exists() and b'"1.png"' in (folder / MARKER).read_bytes()


def test_looking_for_pictures_reads_only_names(pack: Pack) -> None:
    assert has_file(pack("tar.gz", {"a/readme.txt": b"", "a/1.PNG": NOISE}), (".png",))
    assert not has_file(pack("zip", {"1.txt": b"", "__MACOSX/._1.png": b""}), (".png",))


def test_which_names_are_archives() -> None:
    assert all(f"https://x/y.{kind}".lower().endswith(ARCHIVES) for kind in [*KINDS, "TGZ"])
    assert not any(name.lower().endswith(ARCHIVES) for name in ["a.rar", "a.7z", "zip", "a.png"])


# --- what is refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../evil.png", "leads out"),
        ("a/../../evil.png", "leads out"),
        ("..", "leads out"),
        ("/tmp/evil.png", "absolute"),
        ("C:/evil.png", "absolute"),
        ("c:evil.png", "absolute"),
        ("a\\..\\evil.png", "backslash"),
        ("a\nb.png", "character"),
        ("x" * 300 + ".png", "too long"),
        ("/".join("x" * 200 for _ in range(8)), "too long"),
    ],
)
def test_names_that_lead_out_are_refused(pack: Pack, kind: str, name: str, why: str) -> None:
    refused(pack(kind, {"good.png": NOISE, name: b"evil"}), why)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names",
    [
        ("A.png", "a.png"),
        ("a/1.png", "A/2.png"),
        ("STRASSE.png", "straße.png"),
        ("\u00e9.png", "e\u0301.png"),
        ("a", "a/b"),
        ("a/b", "a"),
    ],
)
def test_names_that_are_one_where_case_is_ignored_are_refused(pack: Pack, kind: str, names: tuple[str, str]) -> None:
    refused(pack(kind, {names[0]: b"1", names[1]: b"2"}), "same name")


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as container:
        add(container, "a.png", b"1")
        add(container, "./a.png", b"2")
    refused(tmp_path / "a.tar", "same name")


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, "good.png"),
        (tarfile.LNKTYPE, "/etc/passwd"),
        (tarfile.LNKTYPE, "good.png"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
        (tarfile.CONTTYPE + b"", ""),
    ],
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes, link: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as container:
        add(container, "good.png", NOISE)
        add(container, "evil.png", type=kind, linkname=link, devmajor=1, devminor=3)
    if kind == tarfile.CONTTYPE:  # an old way to say file
        assert extract(tmp_path / "a.tar", target(tmp_path / "a.tar")) == 2
    else:
        refused(tmp_path / "a.tar", "a link, a device")


def test_a_link_and_a_file_through_it_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as container:
        add(container, "door", type=tarfile.SYMTYPE, linkname=str(outside))
        add(container, "door/evil.png", b"evil")
    refused(tmp_path / "a.tar", "a link")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip_are_refused(tmp_path: Path, mode: int) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as container:
        info = zipfile.ZipInfo("evil.png")
        info.create_system, info.external_attr = 3, (mode | 0o777) << 16
        container.writestr(info, "/etc/passwd")
    refused(tmp_path / "a.zip", "a link or a device")


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as container:
        container.writestr("1.png", NOISE)
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    refused(path, "encrypted")


def test_an_entry_without_a_name_is_refused(pack: Pack) -> None:
    path = pack("zip", {"x": b"1"})
    data = bytearray(path.read_bytes())
    central, end = data.rindex(b"PK\1\2"), data.rindex(b"PK\5\6")
    data[end + 12] -= 1  # the length of the list
    data[central + 28] = 0  # the length of the name
    del data[central + 46]
    path.write_bytes(data)
    refused(path, "empty")


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "tar"])
def test_a_bomb_is_refused_soon(pack: Pack, kind: str) -> None:
    path = pack(kind, {"bomb.png": bytes(20_000_000)})
    assert path.stat().st_size < 200_000
    folder = target(path)
    with pytest.raises(DataError, match="times its size"):
        extract(path, folder)
    assert sum(p.stat().st_size for p in folder.rglob("*")) <= 200 * path.stat().st_size


def test_a_bomb_of_many_small_files_is_refused(pack: Pack) -> None:
    refused(pack("tar.xz", {f"{i}.png": bytes(100_000) for i in range(100)}), "times its size")


def test_a_size_that_a_zip_lies_about_does_not_help(pack: Pack) -> None:
    path = pack("zip", {"bomb.png": bytes(5_000_000)})
    data = path.read_bytes()
    path.write_bytes(data.replace((5_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    folder = target(path)
    with pytest.raises(DataError):
        extract(path, folder)
    assert sum(p.stat().st_size for p in folder.rglob("*")) <= 10


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_bytes_are_refused(pack: Pack, kind: str) -> None:
    refused(pack(kind, {f"{i}.png": NOISE for i in range(10)}), "unpacks to more than", total=20_000)


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_entries_are_refused(pack: Pack, kind: str) -> None:
    refused(pack(kind, {f"{i}.png": b"x" for i in range(30)}), "more than 20 entries", entries=20)


def test_a_million_entries_are_refused_before_they_are_read(tmp_path: Path) -> None:
    """A zip says at its end how many entries it has; reading the list of them all would take the memory."""
    entry = b"PK\3\4" + bytes(26)
    end = b"PK\6\6" + (44).to_bytes(8, "little") + bytes(12) + 2 * (1_000_000).to_bytes(8, "little") + bytes(16)
    locator = b"PK\6\7" + bytes(4) + len(entry).to_bytes(8, "little") + bytes(4)
    (tmp_path / "a.zip").write_bytes(entry + end + locator + b"PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2))
    refused(tmp_path / "a.zip", "more than 200,000 entries")


def test_a_tar_header_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as container:
        add(container, "long", bytes(40_000_000), type=tarfile.GNUTYPE_LONGNAME)
    refused(tmp_path / "a.tar", "headers are too large|not a complete")


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_that_was_cut_is_refused(pack: Pack, kind: str) -> None:
    path = pack(kind, {f"{i}.png": NOISE for i in range(5)})
    for keep in (0, 1, 5, 700, path.stat().st_size // 2):
        short = path.with_name(f"short{keep}.{kind}")
        short.write_bytes(path.read_bytes()[:keep])
        folder = path.parent / f"target{keep}"
        folder.mkdir()
        with pytest.raises(DataError):
            extract(short, folder)


@pytest.mark.parametrize("data", [b"", NOISE, b"\x1f\x8b" + NOISE])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(data)
    refused(tmp_path / "a.zip", "not a complete")


def test_an_empty_archive_is_refused(pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        fetch_source(Source("archive", str(pack("zip", {}))), cache=tmp_path / "c", token=None)


# --- properties

SEGMENTS = st.one_of(
    st.sampled_from(["..", ".", "", "a", "A", "~", "C:", "\\", "con", "a ", "\u202e", "..."]), st.text(max_size=6)
)


@given(st.lists(SEGMENTS, min_size=1, max_size=6).map("/".join))
def test_a_name_is_refused_or_stays_inside(name: str) -> None:
    try:
        path = safe_path(name)
    except DataError:
        return
    inside = os.path.normpath(os.path.join("/folder", str(path)))
    assert inside.startswith("/folder/") and "\0" not in inside and not path.is_absolute()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.lists(SEGMENTS, min_size=1, max_size=4).map("/".join), st.binary(max_size=20)), max_size=5)
)
def test_whatever_the_names_nothing_lands_outside(tmp_path_factory: pytest.TempPathFactory, files: list) -> None:
    place = tmp_path_factory.mktemp("names")
    with zipfile.ZipFile(place / "a.zip", "w") as container:
        for name, data in files:
            if name:  # zipfile writes none without
                container.writestr(name.encode("utf-8", "replace").decode(), data)
    folder = target(place / "a.zip")
    before = tree(place)
    with contextlib.suppress(DataError):
        extract(place / "a.zip", folder)
    assert {k: v for k, v in tree(place).items() if not k.startswith("inside/target/")} == before


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.integers(1, 255), st.integers(0, 3))
def test_a_changed_byte_is_refused_or_harmless(
    damaged: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, kind: str, at: int, change: int, more: int
) -> None:
    data = bytearray(damaged[kind])
    for step in range(more + 1):
        data[(at + step * 37) % len(data)] ^= change
    place = tmp_path_factory.mktemp("bytes")
    (place / "a").write_bytes(data)
    folder = target(place / "a")
    with contextlib.suppress(DataError):
        extract(place / "a", folder)
    assert sorted(p.name for p in place.iterdir()) == ["a", "inside"]
    assert not any(p.is_symlink() for p in folder.rglob("*"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    place = tmp_path_factory.mktemp("whole")
    for name in ("1.png", "b/2.txt"):
        (place / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "src" / name).write_bytes(NOISE[:300])
    for kind in KINDS:
        if kind == "zip":
            with zipfile.ZipFile(place / "a.zip", "w", zipfile.ZIP_DEFLATED) as container:
                container.write(place / "src" / "1.png", "1.png")
                container.write(place / "src" / "b" / "2.txt", "b/2.txt")
        else:
            with tarfile.open(place / f"a.{kind}", "w:" + kind[4:]) as archive:
                archive.add(place / "src", arcname="set")
    return {kind: (place / f"a.{kind}").read_bytes() for kind in KINDS}


def test_the_root_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / ".hidden").touch()
    assert content_root(tmp_path) == tmp_path / "a" / "b"
    (tmp_path / "a" / "1.png").touch()
    assert content_root(tmp_path) == tmp_path / "a"
