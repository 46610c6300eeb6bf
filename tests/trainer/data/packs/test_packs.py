"""The cache in packs: what was written is read back, whatever was killed, cut short, damaged or written meanwhile."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.data import cache as caching
from trainer.data.cache import Cache
from trainer.data.packs import pack_file
from trainer.data.packs.pack_file import PackWriter
from trainer.data.packs.pack_folder import PackFolder
from trainer.spec.errors import StorageError, UnreachableError


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def content(number: int) -> bytes:
    return str(number).encode() * (number % 50)


def write(folder: Path, numbers, **keys) -> None:
    writer = PackWriter(folder, **keys)
    for number in numbers:
        writer.add(key(number), content(number))
    writer.close()


def read(packs: PackFolder, number: int) -> bytes | None:
    found = packs.find(key(number))
    return found.read() if found else None


def packs_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pack"))


def test_every_item_is_found_and_read_in_few_files(tmp_path):
    write(tmp_path, range(2000), pack_bytes=50_000)
    packs = PackFolder(tmp_path)
    assert all(read(packs, number) == content(number) for number in range(2000)) and len(packs) == 2000
    assert read(packs, 2000) is None
    assert 3 < len(packs_in(tmp_path)) < 10 and len(list(tmp_path.iterdir())) == 2 * len(packs_in(tmp_path))


def test_packs_of_a_folder_that_is_not_there_are_empty(tmp_path):
    assert PackFolder(tmp_path / "none").find(key(1)) is None


def test_of_a_writer_that_was_killed_every_whole_item_counts(tmp_path):
    writer = PackWriter(tmp_path)
    for number in range(30):
        writer.add(key(number), content(number))
    (pack,) = packs_in(tmp_path)  # never closed: there is no index
    size = pack.stat().st_size
    packs = PackFolder(tmp_path)
    assert all(read(packs, number) == content(number) for number in range(30))
    for cut in (1, len(content(29)), len(content(29)) + pack_file.HEAD_BYTES - 1):
        with pack.open("r+b") as file:
            file.truncate(size - cut)
        packs = PackFolder(tmp_path)
        assert read(packs, 28) == content(28) and read(packs, 29) is None and len(packs) == 29


def test_what_another_process_appends_is_found_after_a_refresh(tmp_path):
    writer = PackWriter(tmp_path)
    writer.add(key(1), content(1))
    packs = PackFolder(tmp_path)
    writer.add(key(2), content(2))
    assert read(packs, 1) == content(1) and read(packs, 2) is None
    packs.refresh()
    assert read(packs, 2) == content(2) and len(packs) == 2
    writer.close()
    write(tmp_path, [3])
    packs.refresh()
    assert [read(packs, number) for number in (1, 2, 3)] == [content(number) for number in (1, 2, 3)]
    assert len(packs) == 3


@pytest.mark.parametrize("damage", ["none", "cut", "changed", "longer"])
def test_a_damaged_index_costs_a_walk_and_no_item(tmp_path, damage):
    write(tmp_path, range(40))
    (pack,) = packs_in(tmp_path)
    index = pack.with_suffix(".index")
    data = bytearray(index.read_bytes())
    if damage == "none":
        index.unlink()
    elif damage == "cut":
        index.write_bytes(data[:-1])
    elif damage == "longer":
        index.write_bytes(data + b"\0")
    else:
        data[100] ^= 1
        index.write_bytes(data)
    packs = PackFolder(tmp_path)
    assert len(packs) == 40 and all(read(packs, number) == content(number) for number in range(40))


def test_a_closed_pack_that_was_cut_short_has_only_what_is_whole(tmp_path):
    write(tmp_path, range(40))
    (pack,) = packs_in(tmp_path)
    with pack.open("r+b") as file:
        file.truncate(pack.stat().st_size // 2)
    packs = PackFolder(tmp_path)
    assert 0 < len(packs) < 40
    known = [number for number in range(40) if packs.find(key(number))]
    assert all(read(packs, number) == content(number) for number in known)


def test_another_item_in_the_place_is_noticed(tmp_path):
    write(tmp_path, [10, 20])
    (pack,) = packs_in(tmp_path)
    packs = PackFolder(tmp_path)
    data = bytearray(pack.read_bytes())
    data[len(pack_file.MARK)] ^= 1  # the key of the first
    pack.write_bytes(data)
    with pytest.raises(ValueError, match="another item at byte"):
        read(packs, 10)
    assert read(packs, 20) == content(20)


def test_an_item_that_is_listed_as_damaged_is_missing_until_it_is_written_again(tmp_path):
    write(tmp_path, [1, 2])
    (pack,) = packs_in(tmp_path)
    pack_file.list_damaged(pack, [key(1)])
    with pack.with_suffix(".damaged").open("ab") as file:
        file.write(b"\xff not a key\n")
    packs = PackFolder(tmp_path)
    assert read(packs, 1) is None and read(packs, 2) == content(2)
    write(tmp_path, [1])
    packs.refresh()
    assert read(packs, 1) == content(1)


# ---- as a cache


def item(number: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.full((3, number % 4 + 1), float(number)), "pooled": torch.arange(2.0).bfloat16()}


def fill(cache: Cache, captions: list[str], *, packed: bool = True, stop_after: int | None = None) -> int:
    """Encode what is missing, as a job does; `stop_after` so many batches a stop is asked for."""
    missing = caching.find_missing(captions, cache.text_path, has=cache.has)
    asked = []

    def check_in():
        asked.append(1)
        if stop_after is not None and len(asked) > stop_after:
            raise KeyboardInterrupt

    def encode(texts):
        return [item(int(text)) for text in texts]

    return caching.encode_texts(cache, missing, encode=encode, batch_size=4, check_in=check_in, packed=packed)


def captions_of(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def same(cache: Cache, captions: list[str]) -> bool:
    pairs = [(cache.load(cache.text_path(text)), item(int(text))) for text in captions]
    return all(got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want) for got, want in pairs)


def test_a_cache_in_packs_has_the_same_items_in_two_files(tmp_path):
    files, packs = Cache(tmp_path / "files", "v", "e"), Cache(tmp_path / "packs", "v", "e")
    texts = captions_of(50)
    assert fill(files, texts, packed=False) == fill(packs, texts) == 50
    assert same(files, texts) and same(packs, texts) and same(Cache(tmp_path / "packs", "v", "e"), texts)
    assert len([p for p in (tmp_path / "packs").rglob("*") if p.is_file()]) == 2
    for text in texts:
        path = packs.text_path(text)
        packed = packs._packed(path)
        assert packed is not None and packed.read() == files.text_path(text).read_bytes()
        assert packs.size(path) == files.size(files.text_path(text))
    assert fill(packs, texts) == 0


def test_files_of_an_older_version_are_read_and_not_encoded_again(tmp_path):
    cache = Cache(tmp_path, "v", "e")
    fill(cache, captions_of(20), packed=False)
    assert fill(cache, captions_of(30)) == 10 and same(cache, captions_of(30))


def test_a_fill_that_was_stopped_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(Cache(tmp_path, "v", "e"), captions_of(40), stop_after=5)
    cache = Cache(tmp_path, "v", "e")
    assert fill(cache, captions_of(40)) == 20 and same(cache, captions_of(40))


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_damaged_item_ends_the_job_by_name_and_the_next_start_encodes_it_anew(tmp_path, place):
    cache = Cache(tmp_path, "v", "e")
    fill(cache, captions_of(10))
    found = cache._packed(cache.text_path("7"))
    assert found is not None
    data = bytearray(found.pack.read_bytes())
    at = {"first": 0, "middle": found.length // 2, "last": found.length - 1}[place]
    data[found.offset + at] ^= 1
    found.pack.write_bytes(data)
    with pytest.raises(UnreachableError, match=rf"{found.pack.name} is not what was written .*start again"):
        cache.load(cache.text_path("7"))
    again = Cache(tmp_path, "v", "e")
    assert fill(again, captions_of(10)) == 1 and same(again, captions_of(10))


def test_a_pack_of_many_damaged_items_costs_one_start(tmp_path):
    cache = Cache(tmp_path, "v", "e")
    fill(cache, captions_of(40))
    pack = cache._packed(cache.text_path("0")).pack
    data = bytearray(pack.read_bytes())
    for number in range(5, 35):
        data[cache._packed(cache.text_path(str(number))).offset + 12] ^= 1
    pack.write_bytes(data)
    with pytest.raises(UnreachableError, match="start again"):
        cache.load(cache.text_path("20"))
    again = Cache(tmp_path, "v", "e")
    assert fill(again, captions_of(40)) == 30 and same(again, captions_of(40))


def test_a_sector_that_cannot_be_read_is_damage_and_a_volume_that_is_gone_is_not(tmp_path, monkeypatch):
    cache = Cache(tmp_path, "v", "e")
    fill(cache, captions_of(3))
    read_item = pack_file.read_item

    def fails(number, error):
        def read(pack, wanted, offset, length):
            if cache._packed(cache.text_path(number)).offset == offset:
                raise OSError(error, os.strerror(error))
            return read_item(pack, wanted, offset, length)

        monkeypatch.setattr(pack_file, "read_item", read)

    fails("1", errno.ESTALE)
    with pytest.raises(OSError, match="Stale"):
        cache.load(cache.text_path("1"))
    fails("1", errno.EIO)
    with pytest.raises(UnreachableError, match="start again, and what is damaged"):
        cache.load(cache.text_path("1"))
    monkeypatch.undo()
    again = Cache(tmp_path, "v", "e")
    assert fill(again, captions_of(3)) == 1 and same(again, captions_of(3))


def test_damage_that_cannot_be_noted_is_named_with_the_file_to_delete(tmp_path, monkeypatch):
    cache = Cache(tmp_path, "v", "e")
    fill(cache, captions_of(3))
    found = cache._packed(cache.text_path("1"))
    data = bytearray(found.pack.read_bytes())
    data[found.offset + 12] ^= 1
    found.pack.write_bytes(data)
    (found.pack.with_suffix(".damaged")).mkdir()
    with pytest.raises(UnreachableError, match=rf"{found.pack.name} .*delete it and start again"):
        cache.load(cache.text_path("1"))


def test_a_full_volume_at_the_end_of_a_pack_is_named_and_the_other_pack_is_closed(tmp_path, monkeypatch):
    cache = Cache(tmp_path, "v", "e")
    item = {"tokens": torch.ones(2)}
    fsync, failed = os.fsync, []

    def full(descriptor):
        if "latents" in os.readlink(f"/proc/self/fd/{descriptor}"):
            failed.append(descriptor)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="latents"), cache.writing(packed=True) as write:
        write(cache._path("latents", "ab" * 32), item)
        write(cache.text_path("1"), item)
    assert failed and cache.has(cache.text_path("1"))
    assert [*(tmp_path / "text").rglob("*.index")]


def test_an_item_that_another_process_packs_is_found_when_it_is_read(tmp_path):
    mine, other = Cache(tmp_path, "v", "e"), Cache(tmp_path, "v", "e")
    third = Cache(tmp_path, "v", "e")
    assert not mine.has(mine.text_path("1")) and not third.has(third.text_path("1"))
    fill(other, captions_of(3))
    assert third.size(third.text_path("1")) > 0
    assert same(mine, captions_of(3))
    with pytest.raises(FileNotFoundError):
        mine.load(mine.text_path("9"))


def test_a_million_keys_are_found_in_little_memory():
    """By the table alone: 40 bytes an item."""
    packs = PackFolder(Path("/nowhere"))
    rng = np.random.default_rng(0)
    rows = np.zeros(1_000_000, pack_file.ROW)
    rows["key"] = np.frombuffer(rng.bytes(32 * len(rows)), "V32")
    assert packs._entries.itemsize <= 40
    keys = [rows[place]["key"].tobytes() for place in (0, 499_999, 999_999)]
    packs._add(Path("/nowhere/a.pack"), rows, 1)
    packs._sort()
    assert all(packs.find(each) is not None for each in keys) and packs.find(b"\0" * 32) is None
