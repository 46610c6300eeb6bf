"""The files by which trainers say which shards they want, and learn why one does not come."""

from __future__ import annotations

import os
import threading
import time

import pytest

from tests.support import shards
from trainer.data.folder_listing import list_folder
from trainer.data.scan import scan
from trainer.data.shards import stream as module
from trainer.data.shards.stream import ShardStream
from trainer.spec.errors import StorageError, UnreachableError
from trainer.spec.plan import DataPlan, Dataset, Source, Subset


@pytest.fixture
def stream(tmp_path):
    """Of four shards with two images each, none of which is here; where they are to come from."""
    shards.make(tmp_path / "far", 4, 2)
    rows = tuple((path.name, path.stat().st_size, "1") for path in sorted((tmp_path / "far").iterdir()))
    made = ShardStream(tmp_path / "stream", rows)
    made.root.mkdir(parents=True)
    made.write()
    return made


def bring(stream, far, *, ended, held, gone=()):
    """What the entrypoint does, on local files."""
    while not ended.wait(0.01):
        wanted = stream.wanted()
        here = [path for path in stream.root.iterdir() if path.suffix == ".tar"]
        held.append(len(here))
        for path in here:
            if path.name not in wanted:
                path.unlink()
        for name in wanted:
            if name in gone:
                stream.tell(name, UnreachableError(f"{name}: gone"))
            elif not (stream.root / name).exists():
                part = stream.root / f"{name}.part"
                part.write_bytes((far / name).read_bytes())
                part.rename(stream.root / name)


@pytest.fixture
def brought(stream, tmp_path):
    ended, held = threading.Event(), []
    thread = threading.Thread(target=bring, args=(stream, tmp_path / "far"), kwargs={"ended": ended, "held": held})
    thread.start()
    yield held
    ended.set()
    thread.join()


def data_of(folder):
    return DataPlan((Dataset((Subset(Source("bucket", "s3://mine/data", path=str(folder))),), (64, 64)),))


def test_a_scan_reads_each_shard_once_and_holds_few_of_them(stream, brought, tmp_path):
    found = scan(data_of(stream.folder), cpu_workers=0)
    local = scan(data_of(tmp_path / "far"), cpu_workers=0)
    mine = [(image.name, image.sha256, image.caption, image.span) for image in found.images]
    assert mine == [(image.name, image.sha256, image.caption, image.span) for image in local.images] and len(mine) == 8
    assert max(brought) <= 2
    for path in (tmp_path / "far").iterdir():
        path.unlink()
    again = scan(data_of(stream.folder), cpu_workers=0)  # from the tables alone
    assert list(again.images) == list(found.images)


def test_a_listing_has_all_shards_though_none_is_here(stream):
    subset = data_of(stream.folder).subsets[0]
    assert list_folder(subset).shards == [f"{i:05}.tar" for i in range(4)]


def test_a_problem_is_raised_by_whoever_waits_and_forgotten_when_the_shard_is_wanted_again(stream):
    stream.tell("00001.tar", StorageError("no room. Free some."))
    with pytest.raises(StorageError, match=r"no room\. Free some\."):
        stream.wait("00001.tar")
    stream.want(["00001.tar", "unknown.tar"])
    assert stream.wanted() == ["00001.tar"] and not stream.problem_file("00001.tar").exists()


def test_waiting_ends_when_nobody_brings_shards_any_more(stream, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_SILENCE_S", 0.3)
    stream.show_life()
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="nothing brings shards"):
        stream.wait("00000.tar")
    assert time.monotonic() - began > 0.2
    old = time.time() - 10**6
    os.utime(stream.folder / "stream.json", (old, old))
    shards.make(stream.root, 1, 1)
    assert stream.wait("00000.tar") == stream.root / "00000.tar"  # what is here is taken
