"""The report names everything, and its table opens in a spreadsheet."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path

import pytest

from trainer.data.records import ImageRecord, Scan, Skipped
from trainer.data.report import COLUMNS, table, write_report
from trainer.data.scan import scan
from trainer.job.prepare import scan_and_report
from trainer.spec.errors import DataError
from trainer.spec.plan import DataPlan, Dataset, Source, Subset


def plan(folder: Path, **keys) -> DataPlan:
    return DataPlan((Dataset((Subset(Source("folder", folder.name, path=str(folder)), **keys),), (64, 64)),))


def parse(text: str) -> list[dict[str, str]]:
    assert text.startswith("\ufeff")
    return list(csv.DictReader(io.StringIO(text[1:])))


def test_a_row_for_each_image_with_everything_that_decides_its_part(make_folder):
    folder = make_folder("a", 2)
    (folder / "01.txt").write_bytes("café, süß".encode("cp1252"))
    (folder / "bad.png").write_bytes(b"")
    data = plan(folder, num_repeats=3, trigger_word="zot")
    used, other, skipped = parse("".join(table(scan(data, cpu_workers=0), data, seed=0)))
    assert list(used) == list(COLUMNS)
    assert [used[key] for key in ("file", "subset", "status", "width", "height", "bucket", "repeats")] == (
        ["00.png", "0.0", "used", "64", "48", "64x64", "3"]
    )
    assert used["trained caption"] == f"zot, {used['caption']}" and used["caption file"] == "00.txt"
    assert (other["caption"], other["encoding"]) == ("café, süß", "cp1252")
    assert (skipped["file"], skipped["status"], skipped["reason"]) == (
        "bad.png",
        "skipped",
        "the file is empty (0 bytes)",
    )


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", " =", "\n@", "＝", "\x00="])
def test_no_cell_becomes_a_formula(start):
    """And each is one line, whatever is in it."""
    image = ImageRecord(f"{start}a.png", Path("a"), "0", 64, 64, 0, 0, f'{start}HYPERLINK("x")\nsecond')
    data = plan(Path("a"))
    row = parse("".join(table(Scan((image,), (), ()), data, seed=0)))[0]
    escaped = start.encode("unicode_escape").decode() if start[0] < " " else f"'{start}"
    assert row["caption"] == f'{escaped}HYPERLINK("x")\\nsecond' and row["file"] == f"{escaped}a.png"


def test_the_text_names_every_image_and_everything_without_use(make_folder, tmp_path):
    folder = make_folder("a", 1)
    (folder / "gone.txt").write_text("x")
    (folder / "metadata.csv").write_text("file_name,text,width\nno.png,x,1\n")
    (folder / "notes.md").write_text("x")
    data = plan(folder)
    write_report(scan(data, cpu_workers=0), data, text=tmp_path / "r.txt", seed=0)
    text = (tmp_path / "r.txt").read_text()
    assert "  0.0/00.png: 64x48, caption from 00.txt\n" in text
    for name in ("gone.txt: there is", "row 2 (no.png): there is", "column 'width': it", "notes.md: it is neither"):
        assert name in text
    assert (tmp_path / "r.csv").exists()


def test_a_refused_dataset_has_its_report(make_folder, tmp_path):
    folder = make_folder("a", 2)
    (folder / "metadata.csv").write_text("file_name,width,text\n00.png,1,a, b\n01.png,1,a, b\n")
    with pytest.raises(DataError, match=r"captions cannot be used(?s:.*)metadata\.csv, row 2(?s:.*)row 3"):
        scan_and_report(plan(folder), report=tmp_path / "r.txt")
    assert "metadata.csv, row 2: it has 4 fields" in (tmp_path / "r.txt").read_text()
    assert len(parse((tmp_path / "r.csv").read_text())) == 2
    (folder / "metadata.csv").unlink()
    for file in folder.glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="No usable image"):
        scan_and_report(plan(folder), report=tmp_path / "r.txt")
    assert {row["status"] for row in parse((tmp_path / "r.csv").read_text())} == {"skipped"}


@pytest.mark.alone
def test_a_hundred_thousand_rows_take_a_moment():
    images = [
        ImageRecord(f"{i}.png", Path("a"), "0", 512 + i % 64, 512, 0, 0, f"caption {i}, tag") for i in range(90_000)
    ]
    skipped = [Skipped(f"{i}.png", "bad") for i in range(10_000)]
    data = plan(Path("a"), trigger_word="zot")
    started = time.process_time()
    assert sum(1 for _ in table(Scan(tuple(images), tuple(skipped), ()), data, seed=0)) == 100_002
    assert time.process_time() - started < 5
