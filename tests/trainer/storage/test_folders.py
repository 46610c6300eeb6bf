"""Folders in a cache: complete under their name, put right where they are not, and with a user's files left alone."""

import os
from pathlib import Path

import pytest

from trainer.storage import digests, folders

FILES = {"a/1.png": b"one", "a/1.txt": b"words", "2.png": b"two"}
FACTS = {"entries": 3}


def fill(target: Path) -> dict:
    for name, content in FILES.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)
    return FACTS


@pytest.fixture
def folder(tmp_path):
    final = tmp_path / "datasets" / "0123"
    assert folders.build_folder(final, fill) == FACTS == folders.completed(final)
    return final


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def is_whole(folder: Path) -> bool:
    return all((folder / name).read_bytes() == content for name, content in FILES.items())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_in_secret(path: Path) -> None:
    """With the size and the time of before."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "flip": flip,
    "flip in secret": flip_in_secret,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff\x00" * 50),
    "deep": lambda path: path.write_text("[" * 100_000),
    "gone": Path.unlink,
    "folder": become_a_folder,
    "pipe": become_a_pipe,
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, folders.MARKER])
def test_what_a_folder_has_lost_or_has_otherwise_is_brought_again(folder, name, kind):
    DAMAGE[kind](folder / name)
    assert folders.completed(folder) is None
    assert folders.build_folder(folder, fill) == FACTS == folders.completed(folder)
    assert is_whole(folder)
    aside = [kept for kept in names(folder) if ".set-aside" in kept]
    assert len(aside) <= 1 and all(kept.startswith(name) for kept in aside)
    assert folders.build_folder(folder, lambda _: pytest.fail("built again")) == FACTS


def test_a_file_whose_times_alone_have_changed_is_the_same(folder, monkeypatch):
    """It is read once to see that, as after a copy of the volume, and not at every start."""
    os.utime(folder / "2.png", ns=(1, 1))
    assert folders.completed(folder) == FACTS
    folders.build_folder(folder, lambda _: pytest.fail("built again"))
    monkeypatch.setattr(digests, "sha256", lambda _: pytest.fail("read again"))
    assert folders.completed(folder) == FACTS


def test_files_of_a_user_stay(folder):
    mine = {"notes.txt": "mine", "a/2.png.bak": "mine", ".my.tmp.notes": "mine"}
    for name, content in mine.items():
        (folder / name).write_text(content)
    beside = folder.with_name(".0123.my.tmp")
    beside.mkdir()
    assert folders.completed(folder) == FACTS
    flip(folder / "2.png")
    folders.build_folder(folder, fill)
    assert all((folder / name).read_text() == content for name, content in mine.items()) and beside.is_dir()


@pytest.mark.parametrize("kind", ["loop", "file", "other"])
def test_what_has_the_name_of_a_folder_is_set_aside(tmp_path, kind):
    final = tmp_path / "0123"
    if kind == "loop":
        final.symlink_to("0123")
    elif kind == "file":
        final.write_text("mine")
    else:
        final.mkdir()
        (final / "2.png").write_text("mine")
    assert folders.build_folder(final, fill) == FACTS and is_whole(final)
    if kind == "other":
        assert (final / "2.png.set-aside").read_text() == "mine"
    else:
        assert os.path.lexists(tmp_path / "0123.set-aside")
