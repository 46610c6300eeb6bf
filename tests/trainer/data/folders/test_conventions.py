"""Kohya's folders: repeats, class words and regularisation images by the names of folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.epochs import EpochSampler
from trainer.data.folder_listing import Folder
from trainer.data.folders.conventions import read_folders
from trainer.data.identity import fingerprint, fingerprint_differences
from trainer.data.records import Scan
from trainer.data.scan import scan
from trainer.spec.plan import DataPlan, Dataset, Source, Subset


def tree(folder: Path, names: dict[str, int], *, captions: bool = False) -> Path:
    """Different small images in folders; `names`: how many in each."""
    from tests.support.drawings import draw

    seed = 0
    for name, count in names.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            draw(64, 48, seed=seed).save(folder / name / f"{i}.png")
            seed += 1
            if captions:
                (folder / name / f"{i}.txt").write_text(f"caption {i}")
    return folder


KOHYA = {"img/10_ohwx woman": 3, "img/5_zot_style": 2, "reg/1_woman": 6}


def read(folder: Path, **keys) -> Scan:
    subset = Subset(Source("folder", str(folder), path=str(folder)), **keys)
    return scan(DataPlan((Dataset((subset,), (64, 64)),)), cpu_workers=0)


def understood(found: Scan) -> dict[str, tuple[int, str | None, bool]]:
    """Folder → repeats, caption where there is none, regularisation."""
    subsets = found.data.datasets[0].subsets
    return {s.folder: (s.num_repeats, s.class_tokens, s.is_reg) for s in subsets if s.folder is not None}


def warnings(found: Scan) -> str:
    return "\n".join(note for note in found.notes if "WARNING" in note)


def trained(found: Scan) -> dict[str, list[str]]:
    """Image → its captions, one for each occurrence in an epoch."""
    texts: dict[str, list[str]] = {}
    for batch in EpochSampler(found.images, found.data, seed=0).epoch(0):
        for example in batch:
            texts.setdefault(example.image.name, []).append(example.caption)
    return texts


# ---- what is understood


def test_kohyas_folders_give_repeats_words_and_regularisation(tmp_path):
    found = read(tree(tmp_path / "kohya", KOHYA), trigger_word="zot")
    assert understood(found) == {
        "img/10_ohwx woman": (10, "ohwx woman", False),
        "img/5_zot_style": (5, "zot_style", False),
        "reg/1_woman": (1, "woman", True),
    }
    texts = trained(found)
    assert texts["img/10_ohwx woman/0.png"] == ["zot, ohwx woman"] * 10
    assert texts["img/5_zot_style/1.png"] == ["zot, zot_style"] * 5
    regular = [texts[name] for name in texts if name.startswith("reg/")]
    assert sum(len(captions) for captions in regular) == 40 and {text for t in regular for text in t} == {"woman"}
    assert "folder img/10_ohwx woman: 10 repeats, caption 'ohwx woman' where an image has none; 3 images" in (
        found.report()
    )
    assert "folder reg/1_woman: 1 repeat, caption 'woman' where an image has none, regularisation" in found.report()
    assert not warnings(found)


def test_the_words_of_a_folder_are_said_once_and_missing_captions_among_others_by_name(tmp_path):
    folder = tree(tmp_path / "data", {"img/10_ohwx woman": 2, "img/5_zot": 2})
    report = read(folder).report()
    assert report.count("'ohwx woman'") == 1 and "missing" not in report
    (folder / "img/5_zot/0.txt").write_text("a zot")
    assert "1 caption missing: class_tokens 'zot' is used: img/5_zot/1." in read(folder).report()


def test_the_folder_may_be_named_at_every_level(tmp_path):
    tree(tmp_path / "kohya", KOHYA)
    assert understood(read(tmp_path / "kohya/img")).keys() == {"10_ohwx woman", "5_zot_style"}
    assert understood(read(tmp_path / "kohya/img/10_ohwx woman")) == {"": (10, "ohwx woman", False)}
    assert understood(read(tmp_path)).keys() == {f"kohya/{name}" for name in KOHYA}


def test_own_captions_and_metadata_above_come_before_the_words_of_a_folder(tmp_path):
    folder = tree(tmp_path / "kohya", {"img/10_ohwx": 2})
    (folder / "img/10_ohwx/0.txt").write_text("a portrait")
    (folder / "img/metadata.csv").write_text("file_name,text\n10_ohwx/1.png,from the table\n")
    assert [image.caption for image in read(folder).images] == ["a portrait", "from the table"]


def test_a_plain_folder_is_read_as_before(make_folder):
    folder = make_folder("photos", 2)
    found = read(folder)
    assert found.data.datasets[0].subsets == (Subset(Source("folder", str(folder), path=str(folder))),)
    assert [(image.key, image.subset, image.convention) for image in found.images] == [
        ("0.0/00.png", 0, None),
        ("0.0/01.png", 0, None),
    ]


def test_what_kohyas_trainer_wrote_beside_img_is_left_out(tmp_path):
    found = read(tree(tmp_path, {"img/10_a": 1, "log": 1, "model/sample": 1}))
    assert [image.name for image in found.images] == ["img/10_a/0.png"]
    assert "left out: log, model (beside img: what kohya's trainer wrote)" in warnings(found)
    assert len(read(tree(tmp_path / "plain", {"model": 1, "photos": 1})).images) == 2


@pytest.mark.parametrize("name", ["reg", "Regularization", "regularisation-images", "class_images"])
def test_regularisation_images_without_repeats(tmp_path, name):
    found = read(tree(tmp_path, {".": 2, name: 2}))
    assert understood(found) == {name: (1, None, True)}
    assert f"folder {name}: its name says that it has regularisation images" in warnings(found)


def test_a_folder_of_regularisation_images_alone_is_the_subject(tmp_path):
    assert understood(read(tree(tmp_path, {"reg/1_woman": 2}))) == {"reg/1_woman": (1, "woman", False)}


# ---- what the user sets wins


def test_repeats_and_class_tokens_of_the_user_win_over_names(tmp_path):
    folder = tree(tmp_path / "kohya", KOHYA)
    found = read(folder, num_repeats=3, class_tokens="a person")
    assert set(understood(found).values()) == {(3, "a person", False), (3, "a person", True)}
    assert "img/10_ohwx woman: num_repeats 3 is set, and wins over 10 in its name" in warnings(found)
    assert "class_tokens 'a person' is set, and wins over 'ohwx woman' in its name" in warnings(found)
    assert understood(read(folder, repeats_chosen=True))["img/10_ohwx woman"] == (1, "ohwx woman", False)


# ---- numbers that are no repeats


@pytest.mark.parametrize(
    "name", ["1920_wallpapers", "2023_holiday", "20230501_party", "512_cats", "01_front", "10-abc", "10 abc", "5x_abc"]
)
def test_a_number_that_may_mean_something_else_is_no_repeat(tmp_path, name):
    found = read(tree(tmp_path, {name: 2, "others": 1}))
    assert understood(found) == {} and {len(texts) for texts in trained(found).values()} == {1}
    assert f"folder {name}: a plain folder, 1 repeat (" in warnings(found)
    assert '"num_repeats" in dataset.json' in warnings(found)


def test_folders_that_are_numbered_in_order_are_plain_unless_they_are_kohyas(tmp_path):
    names = {"1_front": 1, "2_side": 1, "3_back": 1}
    found = read(tree(tmp_path / "photos", names))
    assert understood(found) == {} and "numbered in sequence" in warnings(found)
    assert understood(read(tree(tmp_path / "img", names)))["3_back"] == (3, "back", False)


def test_no_repeats_leaves_a_folder_out_by_name(tmp_path):
    found = read(tree(tmp_path, {"0_old": 2, "10_new": 1}))
    assert [image.name for image in found.images] == ["10_new/0.png"]
    assert "left out: 0_old (0 repeats in its name)" in warnings(found)
    assert "0_old: 0 repeats in its name" in found.report(limit=None)


def test_images_beside_and_numbers_further_below_are_named(tmp_path):
    found = read(tree(tmp_path, {"10_a": 1, "plain": 1, ".": 1, "10_a/5_b": 1}))
    assert understood(found) == {"10_a": (10, "a", False)}
    assert len(trained(found)["10_a/5_b/0.png"]) == 10
    assert "2 images are not in a folder with repeats in its name (0.png, plain/0.png)" in warnings(found)
    assert "folder 10_a/5_b: the number is not read inside of 10_a" in warnings(found)


@given(st.lists(st.text("019_ aé.x-\n٣", min_size=1, max_size=6), min_size=1, max_size=5))
def test_any_names_of_folders_can_be_read(names):
    images = [f"{name.strip('/') or 'a'}/{i}.png" for i, name in enumerate(names)]
    folder = Folder(Path("/nowhere"), images=sorted(images))
    reading = read_folders(folder, "/data/photos")
    assert all(1 <= part.repeats <= 1000 for part in reading.parts)
    assert all(reading.part_of(name) is None or reading.part_of(name) < len(reading.parts) for name in folder.images)


# ---- a run that goes on


def test_a_folder_that_is_added_or_renamed_changes_no_other_images_key(tmp_path):
    folder = tree(tmp_path / "kohya", {"img/5_b": 2})
    before = fingerprint(read(folder).images)
    tree(folder, {"img/10_a": 1})
    added = fingerprint(read(folder).images)
    assert fingerprint_differences(before, added) == ["added: 0.0/img/10_a/0.png"]
    shutil.move(folder / "img/5_b", folder / "img/7_b")
    shutil.rmtree(folder / "img/10_a")
    assert len(fingerprint_differences(before, fingerprint(read(folder).images))) == 4  # not the same images: 7 repeats


def test_other_repeats_are_named_as_a_difference(tmp_path):
    folder = tree(tmp_path / "kohya", {"img/5_b": 1})
    before, after = (fingerprint(read(folder, repeats_chosen=chosen).images) for chosen in (False, True))
    assert fingerprint_differences(before, after) == ["changed: 0.0/img/5_b/0.png (repeats in its folder's name)"]
    of_old_version = {key: " ".join(value.split()[:3]) for key, value in before.items()}
    assert fingerprint_differences(of_old_version, before) == [
        "changed: 0.0/img/5_b/0.png (repeats in its folder's name)"
    ]
