"""Folders of images: every one is used, or skipped for a named reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.data import decode, folder_listing
from trainer.data import scan as module
from trainer.data.decode import UnusableImageError
from trainer.data.epochs import EpochSampler
from trainer.data.records import Scan, Skipped
from trainer.data.render import render, render_mask
from trainer.data.scan import scan, scan_checked
from trainer.spec.errors import DataError, UnreachableError
from trainer.spec.plan import DataPlan, Dataset, Source, Subset

ROOT = Path(__file__).parents[3]


def subset(folder: Path, **keys) -> Subset:
    return Subset(Source("folder", folder.name, path=str(folder)), **keys)


def plan(*subsets: Subset, strict: bool = False, **keys) -> DataPlan:
    return DataPlan((Dataset(subsets, keys.pop("resolution", (64, 64)), **keys),), strict=strict)


def scan_folder(folder: Path, **keys) -> Scan:
    return scan(plan(subset(folder, **keys)), cpu_workers=0)


def reasons(found: Scan) -> dict[str, str]:
    return {s.name: s.reason for s in found.skipped}


def captions(found: Scan) -> dict[str, str | None]:
    return {p.name: p.caption for p in found.images}


# ---- files


def test_images_in_folders_are_found_sorted_and_others_left_alone(make_folder):
    folder = make_folder("a", 2)
    (folder / "sub").mkdir()
    for name in ("sub/b.PNG", ".hidden.png", "sub/._b.png"):
        shutil.copy(folder / "00.png", folder / name)
    for name in ("__MACOSX", ".git"):
        (folder / name).mkdir()
        shutil.copy(folder / "00.png", folder / name / "c.png")
    for name in ("notes.md", "alone.txt"):
        (folder / name).write_text("x")
    found = scan_folder(folder)
    assert [p.name for p in found.images] == ["00.png", "01.png", "sub/b.PNG"]
    assert found.skipped == ()
    assert "a (0.0): not read: 1 .txt, 1 .md" in found.report()


def test_same_stem_is_two_pictures_and_copies_are_counted(make_folder):
    folder = make_folder("a", 2)
    shutil.copy(folder / "00.png", folder / "02.png")
    Image.open(folder / "00.png").save(folder / "00.jpg")
    found = scan_folder(folder)
    assert [p.name for p in found.images] == ["00.jpg", "00.png", "01.png", "02.png"]
    assert captions(found)["00.jpg"] == captions(found)["00.png"] == "picture 0, a tag, another tag"
    assert len({p.sha256 for p in found.images}) == 3
    assert "1 copy, byte for byte, all used: 02.png of 00.png" in found.report()


def test_links_that_leave_the_folder_are_refused(make_folder, tmp_path):
    folder, outside = make_folder("a", 2), make_folder("b", 1)
    (folder / "in.png").symlink_to(folder / "00.png")
    (folder / "out.png").symlink_to(outside / "00.png")
    (folder / "more").symlink_to(outside)
    (folder / "round").symlink_to(folder)
    found = scan_folder(folder)
    assert [p.name for p in found.images] == ["00.png", "01.png", "in.png"]
    assert reasons(found) == {
        "more": folder_listing.LINK_FOLDER,
        "out.png": folder_listing.LINK_OUT,
        "round": folder_listing.LINK_FOLDER,
    }


def test_links_of_captions_follow_the_same_rule(make_folder, tmp_path):
    """A dataset must not bring a file of this machine into a LoRA's header, or on its report."""
    folder = make_folder("a", 4)
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    (folder / "in").mkdir()
    (folder / "in" / "words").write_text("words inside")
    for number, place in enumerate([secret, folder / "in" / "words", "/proc/self/environ", "/dev/zero"]):
        (folder / f"{number:02}.txt").unlink()
        (folder / f"{number:02}.txt").symlink_to(place)
    (folder / "metadata.csv").symlink_to(secret)
    found = scan_folder(folder)
    assert [image.caption for image in found.images] == [None, "words inside", None, None]
    report = found.report(limit=None)
    for name in ("00.txt", "02.txt", "03.txt", "metadata.csv"):
        assert f"{name}: {folder_listing.LINK_OUT}" in report, report
    assert "a secret" not in report


def test_a_metadata_file_that_is_a_link_out_is_refused(make_folder, tmp_path):
    folder = make_folder("a", 1)
    (tmp_path / "secret.csv").write_text("file_name,text\n00.png,a secret\n")
    (folder / "words.csv").symlink_to(tmp_path / "secret.csv")
    found = scan_folder(folder, metadata_file="words.csv")
    assert any("words.csv cannot be read: a link" in problem for problem in found.problems)
    assert "a secret" not in found.report(limit=None)
    assert scan_folder(folder, metadata_file=str(tmp_path / "secret.csv")).images[0].caption == "a secret"


def test_the_folder_itself_may_be_a_link(make_folder, tmp_path):
    make_folder("a", 2)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert len(scan_folder(tmp_path / "link").images) == 2


def test_a_name_that_is_not_utf_8_is_a_reason(make_folder):
    folder = make_folder("a", 1)
    shutil.copy(os.fsencode(folder / "00.png"), os.fsencode(folder) + b"/caf\xe9.png")
    found = scan_folder(folder)
    assert reasons(found) == {"caf?.png": folder_listing.BAD_NAME}
    assert found.report().encode()


def test_a_file_that_is_gone_before_it_is_read_is_a_reason(make_folder, monkeypatch):
    """As where somebody else tidies up, or of the files of /proc."""
    folder = make_folder("a", 3)
    real = folder_listing.leftovers.file_reason

    def asked(name):
        if name == "01.png":
            (folder / name).unlink()
        return real(name)

    monkeypatch.setattr(folder_listing.leftovers, "file_reason", asked)
    found = scan_folder(folder)
    assert reasons(found) == {"01.png": "cannot be read: No such file or directory"}
    assert [image.name for image in found.images] == ["00.png", "02.png"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"image_dir gone: .* is not a folder"):
        scan_folder(tmp_path / "gone")


# ---- unusable images


def test_every_bad_picture_is_skipped_with_its_reason(make_folder, draw):
    folder = make_folder("a", 40)
    whole = (folder / "00.png").read_bytes()
    draw(300, 200).save(folder / "whole.jpg")
    photo = (folder / "whole.jpg").read_bytes()
    for part in (10, 50, 90):
        (folder / f"cut{part}.jpg").write_bytes(photo[: len(photo) * part // 100])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("a caption")
    (folder / "raw.dng").write_bytes(whole)
    frames = [draw(20, 20, seed=i) for i in range(2)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    before = {f: f.read_bytes() for f in folder.iterdir()}
    found = scan_folder(folder)
    skipped = reasons(found)
    assert {k: v for k, v in skipped.items() if not k.startswith("cut")} == {
        "empty.png": decode.EMPTY,
        "text.png": decode.NOT_AN_IMAGE,
        "raw.dng": "format .dng is not read: save it as PNG or JPEG",
        "moving.gif": decode.ANIMATED,
    }
    assert all(skipped[f"cut{n}.jpg"].startswith("damaged or cut short") for n in (10, 50, 90))
    assert len(found.images) == 41 and found.num_found == 48
    assert {f: f.read_bytes() for f in folder.iterdir()} == before
    assert f"  skipped empty.png: {decode.EMPTY}" in found.report()


def test_up_to_a_tenth_may_be_unusable_unless_strict(make_folder):
    folder = make_folder("a", 9)
    (folder / "bad.png").write_bytes(b"")
    assert len(scan_checked(plan(subset(folder)), cpu_workers=0).images) == 9
    with pytest.raises(DataError, match=r"STRICT_DATASET is true and 1 of 10.*(?s:.*)bad\.png: the file is empty"):
        scan_checked(plan(subset(folder), strict=True), cpu_workers=0)
    (folder / "worse.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 11 images are unusable(?s:.*)bad\.png(?s:.*)worse\.png"):
        scan_checked(plan(subset(folder)), cpu_workers=0)


def test_nothing_usable_is_refused(tmp_path):
    with pytest.raises(DataError, match="No usable image"):
        scan_checked(plan(subset(tmp_path)), cpu_workers=0)


def test_too_small_for_a_bucket_without_enlarging(make_folder):
    folder = make_folder("a", 2, size=(60, 200))
    data = plan(subset(folder), resolution=(128, 128), enable_bucket=True, bucket_no_upscale=True)
    assert set(reasons(scan(data, cpu_workers=0)).values()) == {module.TOO_SMALL}


def test_a_long_list_is_capped_but_counted_and_whole_on_request():
    found = Scan((), tuple(Skipped(f"{i}.png", "bad") for i in range(50)), ())
    assert "  skipped 30 more: bad" in found.report(limit=20)
    assert found.report(limit=None).count("skipped") == 51


# ---- captions


def test_captions_by_sidecar_in_the_order_of_extensions(make_folder):
    folder = make_folder("a", 4, captions=False)
    for name in ("00.tags", "00.txt", "00.caption", "01.txt", "01.caption", "02.caption"):
        (folder / name).write_text(name)
    found = scan_folder(folder, caption_extension=".tags")
    assert captions(found) == {"00.png": "00.tags", "01.png": "01.txt", "02.png": "02.caption", "03.png": None}
    assert "4 images, 3 captions" in found.report()
    assert "1 caption missing: trained without caption" in found.report()


def test_a_trigger_word_stands_in_for_missing_captions(make_folder):
    folder = make_folder("a", 2, captions=False)
    note = "2 captions missing: the trigger word 'ohwx' alone is used: 00.png, 01.png"
    report = scan_folder(folder, trigger_word="ohwx").report()
    assert note in report and "without caption" not in report and "WARNING" not in report
    (folder / "00.txt").write_text("a dog")
    report = scan_folder(folder, trigger_word="ohwx").report()
    assert "WARNING: 1 caption missing: the trigger word 'ohwx' alone is used: 01.png" in report


def test_a_folder_without_captions_is_warned_of_once(make_folder):
    report = scan_folder(make_folder("a", 2, captions=False)).report()
    assert report.count("00.png") == 1 and "no word will call them up: 00.png, 01.png. Add .txt files" in report


def test_class_tokens_stand_in_for_missing_captions_not_for_empty_ones(make_folder):
    folder = make_folder("a", 3, captions=False)
    (folder / "00.txt").write_text("own")
    (folder / "01.txt").write_text(" \n\t")
    found = scan_folder(folder, class_tokens="sks dog")
    assert captions(found) == {"00.png": "own", "01.png": "", "02.png": "sks dog"}
    assert "1 caption missing: class_tokens 'sks dog' is used" in found.report()
    assert "no text in 1 caption: trained without caption: 01.png" in found.report()


def test_encodings_and_several_lines_are_reported(make_folder):
    folder = make_folder("a", 3, captions=False)
    (folder / "00.txt").write_bytes("café".encode("latin-1"))
    (folder / "01.txt").write_bytes(b"\xef\xbb\xbfa cat")
    (folder / "02.txt").write_text("one\ntwo")
    found = scan_folder(folder)
    assert captions(found) == {"00.png": "café", "01.png": "a cat", "02.png": "one\ntwo"}
    assert "not UTF-8, so read as cp1252: 1 file: 00.txt" in found.report()
    assert "several lines in 1 caption: the first is used" in found.report()


def test_no_captions_at_all_is_said_loudly(make_folder):
    folder = make_folder("a", 2, captions=False)
    assert "WARNING: no captions at all and no class_tokens" in scan_folder(folder).report()
    assert "WARNING" not in scan_folder(folder, class_tokens="a cat").report()
    assert "WARNING" not in scan_folder(folder, trigger_word="sks").report()


def test_metadata_files_come_before_sidecars_and_may_lie_in_any_folder(make_folder):
    folder = make_folder("a", 3)
    shutil.copytree(folder, folder / "train")
    rows = [{"file_name": "00.png", "text": "from here"}, {"file_name": "gone.png", "text": "x"}]
    (folder / "train/metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (folder / "metadata.csv").write_text("file_name,caption\n01.png,top\ntrain/01.png,below\n")
    found = scan_folder(folder)
    assert captions(found) == {
        "00.png": "picture 0, a tag, another tag",
        "01.png": "top",
        "02.png": "picture 2, a tag, another tag",
        "train/00.png": "from here",
        "train/01.png": "below",
        "train/02.png": "picture 2, a tag, another tag",
    }
    assert "train/metadata.jsonl: no image in the folder for 1 of its 2 rows: line 2 (gone.png)" in found.report()
    assert "not read" not in found.report()


def test_the_metadata_file_asked_for_is_the_only_one(make_folder, tmp_path):
    folder = make_folder("a", 2)
    (folder / "metadata.csv").write_text("file_name,caption\n01.png,not this\n")
    (tmp_path / "mine.json").write_text(json.dumps({"00": {"caption": "a cat", "tags": "x"}}))
    found = scan_folder(folder, metadata_file=str(tmp_path / "mine.json"))
    assert captions(found) == {"00.png": "a cat,x", "01.png": "picture 1, a tag, another tag"}


def test_a_placeholder_without_a_trigger_word_is_a_warning(make_folder):
    folder = make_folder("a", 2)
    (folder / "01.txt").write_text("a photo of [trigger]")
    assert "WARNING: [trigger] stays as it is in 1 caption: 01.png" in scan_folder(folder).report()
    assert "Set TRIGGER_WORD" in scan_folder(folder).report()
    assert "[trigger]" not in scan_folder(folder, trigger_word="zot").report()
    assert "Regularisation images get no trigger word" in scan_folder(folder, trigger_word="zot", is_reg=True).report()


def test_options_without_effect_are_a_warning(make_folder):
    folder = make_folder("a", 2)
    assert "keep_tokens 2 has no effect without shuffle_caption" in scan_folder(folder, keep_tokens=2).report()
    keys = {"shuffle_caption": True, "caption_separator": ";", "keep_tokens_separator": "|||"}
    report = scan_folder(folder, **keys, secondary_separator=";;").report()
    assert "WARNING: keep_tokens_separator '|||' is in none of the captions" in report
    assert "WARNING: secondary_separator ';;' is in none of the captions" in report
    assert "WARNING: tags are shuffled or dropped, but no caption has a caption_separator ';'" in report
    assert "WARNING" not in scan_folder(folder, shuffle_caption=True, keep_tokens=1).report()


def test_generated_images_miss_no_captions(make_folder):
    folder = make_folder("a", 2, captions=False)
    source = Source("generated", "a dog", path=str(folder))
    report = scan(plan(Subset(source, class_tokens="a dog", is_reg=True)), cpu_workers=0).report()
    assert "the caption of 2 images is class_prompt 'a dog'" in report and "missing" not in report


# ---- masks


def test_alpha_as_mask(make_folder):
    folder = make_folder("a", 1)
    image = Image.new("RGBA", (64, 48), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 32, 48))
    image.save(folder / "01.png")
    found = scan_folder(folder, alpha_mask=True)
    opaque, clear = found.images
    assert (opaque.has_alpha, clear.has_alpha, clear.mask_sha256) == (False, True, "alpha")
    view = next(
        v for p, v in EpochSampler(found.images, plan(subset(folder)), seed=0).all_image_variants() if p == clear
    )
    mask = render_mask(clear, view)
    assert mask.shape == (64, 64) and mask[:, :20].max() == 0 and mask[:, 44:].min() == 255
    assert render_mask(opaque, view) is None
    assert scan_folder(folder).images[1].mask_sha256 is None
    assert "transparency in 1 image, the alpha weighs the loss: 01.png" in found.report()


def test_masks_of_the_same_stem_are_cut_and_flipped_like_the_image(make_folder):
    folder = make_folder("a", 3)
    (folder / "masks").mkdir()
    for name, size in {"00.png": (64, 48), "01.jpg": (128, 96)}.items():
        mask = Image.new("L", size, 0)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))
        mask.save(folder / "masks" / name)
    found = scan_folder(folder, conditioning_data_dir="masks", flip_aug=True)
    assert [p.name for p in found.images] == ["00.png", "01.png"]
    assert reasons(found) == {"02.png": module.NO_MASK}
    for image, view in EpochSampler(found.images, plan(subset(folder, flip_aug=True)), seed=0).all_image_variants():
        mask = render_mask(image, view)
        kept = mask[:, 44:] if view.flip else mask[:, :20]
        gone = mask[:, :20] if view.flip else mask[:, 44:]
        assert kept.min() > 250 and gone.max() < 5
    assert len({p.mask_sha256 for p in found.images}) == 2


def test_a_mask_of_another_shape_or_damaged_is_a_reason(make_folder):
    folder, masks = make_folder("a", 2), make_folder("m", 1, size=(64, 64), captions=False)
    (masks / "01.png").write_bytes(b"")
    skipped = reasons(scan_folder(folder, conditioning_data_dir=str(masks)))
    assert skipped == {
        "00.png": "its mask is 64×64, the image 64×48: another shape",
        "01.png": f"its mask 01.png: {decode.EMPTY}",
    }


def test_a_missing_folder_of_masks_is_named(make_folder):
    with pytest.raises(DataError, match="conditioning_data_dir gone is not a folder"):
        scan_folder(make_folder("a", 1), conditioning_data_dir="gone")


# ---- pixels


def test_rendering_is_the_view_and_nothing_else(make_folder):
    folder = make_folder("a", 3)
    keys = {"flip_aug": True, "random_crop": True, "color_aug": True}
    found = scan_folder(folder, **keys)
    for image, view in EpochSampler(found.images, plan(subset(folder, **keys)), seed=0).all_image_variants():
        pixels = render(image, view)
        assert pixels.dtype == np.uint8 and pixels.shape == (64, 64, 3)
        assert (render(image, view) == pixels).all()
        turned = render(image, replace(view, flip=not view.flip, colour=None))
        assert (render(image, replace(view, colour=None)) == turned[:, ::-1]).all()


def test_an_image_changed_since_the_scan_is_noticed(make_folder):
    folder = make_folder("a", 2)
    found = scan_folder(folder)
    image, view = next(EpochSampler(found.images, plan(subset(folder)), seed=0).all_image_variants())
    shutil.copy(folder / "01.png", folder / "00.png")
    with pytest.raises(UnusableImageError, match="changed while the job ran"):
        render(image, view)
    image.file.unlink()
    with pytest.raises(UnusableImageError, match="cannot be read"):
        render(image, view)


# ---- processes


def test_workers_find_the_same_and_the_first_subset_comes_first(make_folder):
    data = plan(subset(make_folder("b", 5)), subset(make_folder("a", 4)))
    seen = []
    found = scan(data, cpu_workers=2, progress=lambda done, total: seen.append((done, total)))
    assert found == scan(data, cpu_workers=0)
    assert [p.subset for p in found.images] == [0] * 5 + [1] * 4
    assert seen == [(i, 9) for i in range(1, 10)]


def test_a_folder_in_two_datasets_is_read_once(make_folder):
    one = Dataset((subset(make_folder("a", 3)),), (64, 64))
    seen = []
    found = scan(DataPlan((one, replace(one, resolution=(32, 32)))), cpu_workers=0, progress=lambda *a: seen.append(a))
    assert len(found.images) == 6 and len(seen) == 3


def _die(file: Path) -> str:
    if file.name == "02.png":
        os.kill(os.getpid(), 9)
    return "fine"


@pytest.mark.alone
def test_a_killed_worker_is_reported(make_folder, monkeypatch):
    monkeypatch.setattr(module, "_examine", _die)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    started = time.monotonic()
    with pytest.raises(UnreachableError, match=r"was killed .* It read [^ ]*02\.png\.$"):
        scan(plan(subset(make_folder("a", 4))), cpu_workers=1)
    assert time.monotonic() - started < 30


def test_the_data_modules_import_no_torch():
    program = "import sys, trainer.data.epochs, trainer.data.scan\n"
    program += "print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# ---- real photographs, and many


def test_real_photographs(photographs):
    data = DataPlan(
        (
            Dataset(
                tuple(subset(photographs / name) for name in ("can", "dog", "teapot")),
                (1024, 1024),
                batch_size=2,
                enable_bucket=True,
            ),
        )
    )
    found = scan_checked(data, cpu_workers=2)
    assert len(found.images) == 16 and not found.skipped
    assert all(p.caption.startswith("a photo of sks") for p in found.images)
    made = EpochSampler(found.images, data, seed=0)
    assert len(made.buckets) >= 4  # `can` comes in five aspect ratios
    for image, view in made.all_image_variants():
        pixels = render(image, view)
        assert pixels.shape == (view.size[1], view.size[0], 3)
        assert 5 < pixels.std() < 120


def test_a_thousand_images_take_seconds_and_little_memory():
    command = [sys.executable, "-m", "bench.scan", "--pictures", "1000"]
    figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert figures["used"] == 1000
    assert figures["seconds"] < 15
    assert figures["peak_mib"] < 300


READING = """
import json, multiprocessing, sys, time
from pathlib import Path
from trainer.data.scan import _examine_all
if __name__ == "__main__":
    found = _examine_all([Path(sys.argv[1])] * 64, cpu_workers=2, progress=None)
    next(found)
    print(json.dumps([child.pid for child in multiprocessing.active_children()]), flush=True)
    time.sleep(600)
"""


def test_processes_that_read_images_end_with_a_trainer_that_is_killed(tmp_path, draw):
    program = tmp_path / "reading.py"
    program.write_text(READING)
    draw(64, 48).save(tmp_path / "a.png")
    command, environment = (
        [sys.executable, str(program), str(tmp_path / "a.png")],
        {**os.environ, "PYTHONPATH": str(ROOT)},
    )
    trainer = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    cpu_workers = json.loads(trainer.stdout.readline())
    shared = Path(f"/proc/{trainer.pid}/maps").read_text()
    assert "/dev/shm" not in shared, "a name in the machine's shared memory, which a kill leaves behind"
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 20

    def alive(number: int) -> bool:
        try:
            return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    while any(map(alive, cpu_workers)):
        assert time.monotonic() < deadline, "they wait for ever"
        time.sleep(0.02)
    assert len(cpu_workers) == 2
