"""What lies beside images: other programs' files, masks, Kiln's own output, and what is no file at all."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest

from trainer.data import scan as module
from trainer.data.folder_listing import LINK_LOST, LINK_OUTPUT, Folder, list_folder
from trainer.data.folders import formats, own_output
from trainer.data.folders.own_output import Written
from trainer.data.records import Scan
from trainer.data.scan import scan
from trainer.spec.errors import DataError
from trainer.spec.plan import DataPlan, Dataset, Source, Subset


def subset(folder: Path, **keys) -> Subset:
    return Subset(Source("folder", str(folder), path=str(folder)), **keys)


def read(folder: Path, written: Written | None = None, **keys) -> Scan:
    return scan(DataPlan((Dataset((subset(folder, **keys),), (64, 64)),)), cpu_workers=0, written=written)


def copies(folder: Path, *names: str) -> None:
    """Copies of the first image under other names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "00.png", folder / name)


def used(found: Scan) -> list[str]:
    return [image.name for image in found.images]


def left_out(folder: Folder) -> dict[str, str]:
    return {item.name: item.reason for item in folder.left_out}


def warnings(found: Scan) -> str:
    return "\n".join(note for note in found.notes if "WARNING" in note)


# ---- systems and other programs


@pytest.mark.parametrize(
    "name",
    [
        *("._00.png", ".hidden.png", ".git/a.png", ".thumbnails/00.png", ".ipynb_checkpoints/00.png"),
        *("__MACOSX/00.png", "@eaDir/00.png/SYNOPHOTO_THUMB_M.jpg", "$RECYCLE.BIN/a.png", "lost+found/a.png"),
        *(".Trash-1000/files/a.png", "#recycle/a.png", "System Volume Information/a.png", "_latent_cache/a.png"),
    ],
)
def test_what_systems_keep_in_a_folder_is_named_in_the_report_alone(make_folder, name):
    folder = make_folder("a", 2)
    copies(folder, name)
    found = read(folder)
    top = name.split("/")[0]
    assert used(found) == ["00.png", "01.png"] and not found.skipped and not warnings(found)
    assert f"  {folder} (0.0): {top}: " in found.report(limit=None)


@pytest.mark.parametrize("name", ["Thumbs.db", "desktop.ini", ".DS_Store", "00.npz", "meta_lat.json"])
def test_files_of_other_programs_are_named(make_folder, name):
    folder = make_folder("a", 2)
    (folder / name).write_text("x")
    assert f": {name}: " in read(folder).report(limit=None)


def test_a_video_is_named_and_stops_nothing(make_folder):
    folder = make_folder("a", 2)
    (folder / "IMG_1.MOV").write_text("x")
    found = read(folder)
    found.check(strict=True)
    assert "left out: IMG_1.MOV (a video, and only images are trained on" in warnings(found)


@pytest.mark.parametrize("suffix", [".heic", ".HEIF", ".jxl", ".psd", ".dng", ".cr3", ".raw", ".svg", ".jp2"])
def test_images_of_other_formats_are_skipped_with_the_fix(make_folder, suffix):
    folder = make_folder("a", 1)
    (folder / f"x{suffix}").write_text("x")
    (skipped,) = read(folder).skipped
    assert skipped.name == f"x{suffix}"
    assert skipped.reason.startswith(f"format {suffix} is not read: save it as PNG or JPEG")


def test_readable_suffixes_are_those_of_the_pattern():
    assert all(formats.READABLE.fullmatch(suffix.upper()) for suffix in formats.READABLE_SUFFIXES)
    assert not any(formats.UNREADABLE.fullmatch(suffix) for suffix in formats.READABLE_SUFFIXES)


# ---- masks, previews, samples


@pytest.mark.parametrize(
    "name",
    [
        *("00-masklabel.png", "00_mask.png", "00.mask.png", "00-MASK.png", "masks/00.png", "mask/00_mask.png"),
        *("00-condlabel.png", "conditioning/00.png", "00.preview.png", "thumbnails/00.jpg"),
    ],
)
def test_what_belongs_to_an_image_is_left_out_with_a_warning(make_folder, name):
    folder = make_folder("a", 2)
    copies(folder, name)
    found = read(folder)
    assert used(found) == ["00.png", "01.png"]
    assert f"left out: {name} (its name says that it is" in warnings(found)


@pytest.mark.parametrize("name", ["zorro_mask.png", "masks/venice.png", "mask.png", "_mask.png", "00_mask_ball.png"])
def test_a_name_like_a_masks_without_its_image_is_an_image(make_folder, name):
    folder = make_folder("a", 2)
    copies(folder, name)
    assert name in used(read(folder))


def test_masks_beside_images_weigh_the_loss_where_they_are_asked_for(make_folder):
    folder = make_folder("a", 2)
    copies(folder, "00-masklabel.png", "01_mask.png")
    assert 'give the subset "conditioning_data_dir" in dataset.json ("."' in warnings(read(folder))
    found = read(folder, conditioning_data_dir=".")
    masks = {image.name: image.mask_file and image.mask_file.name for image in found.images}
    assert masks == {"00.png": "00-masklabel.png", "01.png": "01_mask.png"} and not warnings(found)


def test_masks_in_a_folder_may_have_the_endings_of_other_trainers(make_folder):
    folder = make_folder("a", 2)
    copies(folder, "masks/00-masklabel.png", "masks/01.png")
    found = read(folder, conditioning_data_dir="masks")
    assert [image.mask_file.name for image in found.images] == ["00-masklabel.png", "01.png"]


@pytest.mark.parametrize(
    "name",
    [
        *("sample/x_e000001_00_20230101000000.png", "samples/1700000000000__000000250_0.jpg"),
        *("sample/step-00000100-00.png", "sample/contact-sheet.png"),
    ],
)
def test_samples_of_trainers_are_left_out_and_other_images_there_are_doubted(make_folder, name):
    folder = make_folder("a", 2)
    copies(folder, name, "samples/mine.png")
    found = read(folder)
    assert used(found) == ["00.png", "01.png", "samples/mine.png"]
    assert f"left out: {name} (its name says that a trainer drew it" in warnings(found)
    assert "folder samples: its images are trained on. If they are masks" in warnings(found)


# ---- Kiln's own output


def job_output(folder: Path, source: Path) -> Path:
    """A folder as a job leaves it."""
    (folder / "sample").mkdir(parents=True)
    (folder / "state/step-00000002").mkdir(parents=True)
    shutil.copy(source, folder / "sample/step-00000002-00.png")
    shutil.copy(source, folder / "sample/contact-sheet.png")
    for name in (
        "plan.json",
        "status.json",
        "run.log",
        "metrics.jsonl",
        "x.safetensors",
        "state/step-00000002/state.json",
    ):
        (folder / name).write_text("{}")
    return folder


def test_the_output_of_this_job_is_no_source(make_folder):
    folder = make_folder("a", 2)
    out = job_output(folder / "output", folder / "00.png")
    found = read(folder, Written({"OUTPUT_PATH": out}))
    assert used(found) == ["00.png", "01.png"] and not warnings(found)
    assert "left out: output (the OUTPUT_PATH of this job)" in found.report()


def test_the_first_start_and_the_next_see_the_same_images(make_folder):
    folder = make_folder("a", 2)
    out = folder / "output"
    out.mkdir()
    first = read(folder, Written({"OUTPUT_PATH": out}))
    job_output(folder / "next", folder / "00.png").rename(out / "moved")
    shutil.rmtree(out)
    job_output(out, folder / "00.png")
    assert first.images == read(folder, Written({"OUTPUT_PATH": out})).images


def test_the_output_may_be_the_datasets_folder_itself(make_folder):
    folder = make_folder("a", 2)
    job_output(folder, folder / "00.png")
    copies(folder, "mine/02.png")
    (folder / "mine/02.txt").write_text("mine")
    for written in (Written({"OUTPUT_PATH": folder}), None):  # None: by its marks
        found = read(folder, written)
        assert used(found) == ["00.png", "01.png", "mine/02.png"] and not warnings(found)
        assert "sample: a Kiln job writes this into the folder" in found.report(limit=None)


def test_the_output_of_another_job_is_named_in_a_warning_and_images_beside_it_stay(make_folder):
    folder = make_folder("a", 2)
    other = job_output(folder / "other", folder / "00.png")
    shutil.copy(folder / "00.png", other / "mine.png")
    found = read(folder)
    assert used(found) == ["00.png", "01.png", "other/mine.png"]
    assert "left out: other (what another Kiln job wrote there)" in warnings(found)


@pytest.mark.parametrize(("variable", "inside"), [("CACHE_PATH", "class-pictures/x/0.png"), ("HF_HOME", "hub/a.png")])
def test_caches_of_this_job_are_no_source(make_folder, variable, inside):
    folder = make_folder("a", 2)
    copies(folder, f"cache/{inside}")
    found = read(folder, Written({variable: folder / "cache"}))
    assert used(found) == ["00.png", "01.png"]
    assert f"left out: cache (the {variable} of this job)" in found.report()


def test_caches_of_other_jobs_are_no_source(make_folder):
    folder = make_folder("a", 2)
    copies(folder, "cache/class-pictures/x/0.png", "cache/latents/0.png", "cache/text/0.png")
    copies(folder, "hf/hub/datasets--a--b/snapshots/1/0.png", "unpacked/0.png")
    (folder / "unpacked/.kiln-complete.json").write_text("{}")
    found = read(folder)
    assert used(found) == ["00.png", "01.png"]
    for name in ("cache", "hf/hub/datasets--a--b", "unpacked"):
        assert f"left out: {name} (" in warnings(found)


def test_links_to_the_output_are_no_source(make_folder, tmp_path):
    folder = make_folder("a", 2)
    out = job_output(folder / "output", folder / "00.png")
    (folder / "samples").symlink_to(out / "sample")
    (folder / "best.png").symlink_to(out / "sample/step-00000002-00.png")
    (folder / "old").symlink_to(job_output(tmp_path / "old", folder / "00.png"))
    listed = list_folder(subset(folder), Written({"OUTPUT_PATH": out}))
    assert listed.images == ["00.png", "01.png"] and not listed.skipped
    assert {name: left_out(listed)[name] for name in ("samples", "best.png", "old")} == dict.fromkeys(
        ("samples", "best.png", "old"), LINK_OUTPUT
    )


def test_a_dataset_where_the_job_writes_its_samples_is_refused(make_folder):
    folder = make_folder("sample", 2)
    with pytest.raises(DataError, match=r"is where this job writes \(OUTPUT_PATH/sample\)"):
        list_folder(subset(folder), Written({"OUTPUT_PATH": folder.parent}))
    assert list_folder(subset(make_folder("photos", 1)), Written({"OUTPUT_PATH": folder.parent})).images == ["00.png"]


def test_a_folder_with_one_mark_alone_is_the_users():
    assert not own_output.is_output(["plan.json", "a.png"]) and not own_output.is_output(["status.json", "run.log"])


# ---- what is no file


def test_special_files_and_circles_are_named_and_nothing_is_waited_for(make_folder):
    folder = make_folder("a", 2)
    os.mkfifo(folder / "fifo.png")
    (folder / "00.txt").unlink()
    os.mkfifo(folder / "00.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.jpg"))
    (folder / "x.png").symlink_to("y.png")
    (folder / "y.png").symlink_to("x.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    found = read(folder)
    assert {image.name: image.reason for image in found.skipped} == {
        "fifo.png": "a FIFO, not a file",
        "socket.jpg": "a socket, not a file",
        "x.png": LINK_LOST,
        "y.png": LINK_LOST,
        "zero.png": "a link that leads out of its folder",
        "sparse.png": "cannot be read: larger than 1 GiB",
    }
    assert "left out: 00.txt (a FIFO, not a file)" in warnings(found)


def test_a_fifo_that_takes_the_place_of_a_listed_image_is_not_waited_for(make_folder):
    folder = make_folder("a", 1)
    (folder / "00.png").unlink()
    os.mkfifo(folder / "00.png")
    assert module._examine(folder / "00.png") == "cannot be read: a FIFO, not a file"


def test_folders_may_be_nested_deeper_than_the_stack_of_python(make_folder, monkeypatch):
    folder = make_folder("a", 1)
    monkeypatch.chdir(folder)
    for _ in range(1200):
        os.mkdir("d")
        os.chdir("d")
    shutil.copy(folder / "00.png", "deep.png")
    found = read(folder)
    Path("deep.png").unlink()
    for _ in range(1200):  # shutil.rmtree could not
        os.chdir("..")
        os.rmdir("d")
    assert [image.name[-11:] for image in found.images] == ["00.png", "/d/deep.png"]
    assert max(len(line) for line in found.report(limit=None).splitlines()) < 400


def test_a_path_too_long_for_the_system_is_named(make_folder, monkeypatch):
    folder = make_folder("a", 1)
    monkeypatch.chdir(folder)
    for _ in range(25):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
    with pytest.raises(DataError, match=r"Folders in .* cannot be read: d{50}.*File name too long"):
        read(folder)


def test_names_cannot_break_a_line_or_turn_its_direction(make_folder):
    folder = make_folder("a", 1)
    copies(folder, "new\nline\x1b[31m.png", "turned\u202egnp.png", "empty\r.png")
    (folder / "empty\r.png").write_bytes(b"")
    text = read(folder).report(limit=None)
    assert "new\\nline\\x1b[31m.png" in text and "turned\\u202egnp.png" in text and "empty\\r.png" in text
    assert all(line.isprintable() for line in text.split("\n"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_all_unreadable_folders_are_named(make_folder):
    folder = make_folder("a", 1)
    for name in ("b", "c"):
        (folder / name).mkdir(mode=0)
    with pytest.raises(DataError, match="cannot be read: b: Permission denied; c: Permission denied"):
        read(folder)
