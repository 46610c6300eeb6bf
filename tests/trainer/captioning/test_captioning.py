"""Which images a model captions, what becomes of its captions, and that they are kept."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.support.captioners import make_llava, make_tagger
from trainer.captioning import captioning
from trainer.captioning.captioning import caption_images
from trainer.captioning.known import find_answers, may_lack_captions, with_captions_of
from trainer.captioning.requests import request_for
from trainer.captioning.store import Made, Store
from trainer.data.folders.own_output import Written
from trainer.data.records import Scan
from trainer.data.scan import scan
from trainer.spec.errors import DataError, SettingsError, StopRequestedError
from trainer.spec.plan import CaptionerPlan, DataPlan, Dataset, EnginePlan, Source, Subset
from trainer.spec.rules import captioners


def write(folder, name: str, *, seed: int = 0, caption: str | None = None, size=(40, 30)) -> None:
    pixels = np.random.default_rng(seed or sum(map(ord, name))).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    return make_tagger(tmp_path_factory.mktemp("models") / "tagger")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    write(folder, "a.png", caption="my own words")
    for name in ("b.png", "c.png", "sub/d.png"):
        write(folder, name)
    return folder


def plan(folder, model, *, subset=None, **options) -> DataPlan:
    subset = subset or Subset(Source("folder", str(folder), path=str(folder)), caption_extension=".txt")
    captioner = CaptionerPlan(str(model), path=str(model), max_tokens=8, **options)
    return DataPlan((Dataset((subset,), (64, 64)),), captioner=captioner)


def run(data: DataPlan, cache, check_in=lambda: None) -> Scan:
    found = scan(data, cpu_workers=0)
    return caption_images(found, found.data, cache=cache, engine=EnginePlan(), check_in=check_in)


def captions(found: Scan) -> dict[str, str | None]:
    return {image.name: image.caption for image in found.images}


def test_images_without_a_caption_get_one_and_those_with_one_keep_it(images, tagger, tmp_path):
    found = run(plan(images, tagger), tmp_path / "cache")
    assert captions(found)["a.png"] == "my own words"
    made = {image.name: image for image in found.images if image.captioned_by}
    assert set(made) == {"b.png", "c.png", "sub/d.png"}
    assert all(image.caption and image.caption_file == "made by tagger" for image in made.values())
    assert any("3 captions made by tagger: b.png, c.png, sub/d.png" in note for note in found.notes)
    assert not list(images.rglob("*.txt"))[1:]  # nothing is written beside the images


def test_the_time_that_is_left_is_what_the_first_images_measure(images, tagger, tmp_path, monkeypatch, caplog):
    for number in range(20):
        write(images, f"more{number}.png", seed=100 + number)
    times = iter([0.0, 0.0, 16.0, 32.0, 46.0, 46.0])  # 23 images: 8 in 16 s, 8 more in 16 s, 7 in 14 s
    monkeypatch.setattr(captioning.time, "monotonic", lambda: next(times))
    told = []
    data = plan(images, tagger)
    found = scan(data, cpu_workers=0)
    with caplog.at_level("INFO"):
        caption_images(
            *(found, found.data),
            cache=tmp_path / "cache",
            engine=EnginePlan(),
            check_in=lambda: None,
            told=lambda *progress: told.append(progress),
        )
    assert told == [(8, 23, 30.0), (16, 23, 14.0), (23, 23, 0.0)]
    assert "Captioned 8 of 23 images, at 2 s an image, measured: 30 s left." in caplog.text
    assert "Captioned 16 of 23 images, at 2 s an image, measured: 14 s left." in caplog.text


def test_what_is_in_the_cache_is_not_made_again(images, tagger, tmp_path, monkeypatch):
    data = plan(images, tagger)
    first = run(data, tmp_path / "cache")
    monkeypatch.setattr(captioning, "Tagger", None)
    (images / "b.png").rename(images / "z.png")  # a caption belongs to the image and not to its name
    again = run(data, tmp_path / "cache")
    assert captions(again)["z.png"] == captions(first)["b.png"]
    assert not may_lack_captions(data, tmp_path / "cache", Written())


def test_a_damaged_caption_is_made_again(images, tagger, tmp_path):
    data = plan(images, tagger)
    first = run(data, tmp_path / "cache")
    for path in (tmp_path / "cache" / "captions").rglob("*.json"):
        path.write_text(path.read_text().replace(", ", "; ", 1))
    assert captions(run(data, tmp_path / "cache")) == captions(first)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "another"},
        {"prompt": "style"},
        {"trigger": "ohwx"},
        {"words": 7},
        {"max_tokens": 9},
    ],
)
def test_whatever_decides_a_caption_is_in_its_key(change):
    subset = Subset(Source("folder", "x"))
    request = request_for(subset, CaptionerPlan("org/model", commit="1" * 40), "org/model@1")
    assert dataclasses.replace(request, **change).key("a" * 64) != request.key("a" * 64)
    assert request.key("b" * 64) != request.key("a" * 64)


def test_a_stopped_job_has_lost_one_batch_at_most_and_ends_with_the_same_captions(tmp_path):
    folder = tmp_path / "images"
    for number in range(20):
        write(folder, f"{number:02d}.png", seed=number + 1)
    model = make_llava(tmp_path / "llava")
    data = plan(folder, model)
    whole = run(data, tmp_path / "whole")
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 14:  # in the second batch: each has a call at its beginning and one for each of 8 tokens
            raise StopRequestedError("Stopped.", exit_code=143)

    with pytest.raises(StopRequestedError):
        run(data, tmp_path / "cut", stop)
    kept = list((tmp_path / "cut" / "captions").rglob("*.json"))
    assert len(kept) == captioners.BATCH
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert captions(run(data, tmp_path / "cut")) == captions(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == times


def test_equal_images_are_captioned_once(tmp_path, tagger):
    folder = tmp_path / "images"
    for name in ("a.png", "b.png"):
        write(folder, name, seed=5)
    found = run(plan(folder, tagger), tmp_path / "cache")
    assert len(set(captions(found).values())) == 1
    assert len(list((tmp_path / "cache" / "captions").rglob("*.json"))) == 1


def test_overwriting_captions_all_images(images, tagger, tmp_path):
    found = run(plan(images, tagger, overwrite=True), tmp_path / "cache")
    assert all(image.captioned_by for image in found.images)
    assert captions(found)["a.png"] != "my own words"
    assert (images / "a.txt").read_text() == "my own words"


def test_class_tokens_give_way_but_those_of_regularisation_images_stay(images, tagger, tmp_path):
    source = Source("folder", str(images), path=str(images))
    own = Subset(source, class_tokens="dog", caption_extension=".txt")
    found = run(plan(images, tagger, subset=own), tmp_path / "cache")
    assert captions(found)["b.png"] != "dog"
    found = run(plan(images, tagger, subset=dataclasses.replace(own, is_reg=True)), tmp_path / "cache")
    assert captions(found)["b.png"] == "dog"


def test_a_subset_can_keep_out(images, tagger, tmp_path):
    subset = Subset(Source("folder", str(images), path=str(images)), auto_caption=False, caption_extension=".txt")
    found = run(plan(images, tagger, subset=subset), tmp_path / "cache")
    assert captions(found)["b.png"] is None
    assert any("trained without caption: b.png" in note for note in found.notes)


def test_an_empty_file_is_a_caption(images, tagger, tmp_path):
    (images / "b.txt").write_text("")
    assert captions(run(plan(images, tagger), tmp_path / "cache"))["b.png"] == ""


def test_an_image_that_nothing_can_be_said_of_is_named(images, tagger, tmp_path):
    data = plan(images, tagger)
    found = scan(data, cpu_workers=0)
    model = find_answers(found, found.data, tmp_path).missing
    assert len(model) == 3
    run(data, tmp_path / "cache")
    path = next((tmp_path / "cache" / "captions").rglob("*.json"))
    Store(tmp_path / "cache").write(path.stem, Made("", "tagger", "it refuses"))
    again = run(data, tmp_path / "cache")
    assert any("no usable caption for 1 image" in note and "(it refuses)" in note for note in again.notes)


# ---- files


def odd_files(folder) -> None:
    rng = np.random.default_rng(1)
    colours = Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.save(folder / "turned.jpg", exif=exif)
    colours.convert("L").save(folder / "grey.png")
    alpha = colours.convert("RGBA")
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (60, 90), dtype=np.uint8)))
    alpha.save(folder / "alpha.png")
    colours.convert("P").save(folder / "palette.png")
    colours.resize((1200, 10)).save(folder / "wide.png")


def test_odd_files_are_captioned_as_they_are_trained(tmp_path, tagger, photographs):
    from trainer.captioning.tagger import Tagger, caption

    folder = tmp_path / "images"
    folder.mkdir()
    odd_files(folder)
    photograph = sorted((photographs / "dog").glob("*.jpg"))[0]
    (folder / "photo.jpg").write_bytes(photograph.read_bytes())
    found = run(plan(folder, tagger), tmp_path / "cache")
    reading = Tagger(tagger, threads=1)
    shown = {
        "turned.jpg": Image.open(folder / "turned.jpg").transpose(Image.Transpose.ROTATE_270),
        "grey.png": Image.open(folder / "grey.png").convert("RGB"),
        "palette.png": Image.open(folder / "palette.png").convert("RGB"),
        "photo.jpg": Image.open(photograph).convert("RGB"),
        "wide.png": Image.open(folder / "wide.png").convert("RGB"),
    }
    over_white = Image.new("RGBA", (90, 60), "white")
    over_white.alpha_composite(Image.open(folder / "alpha.png"))
    shown["alpha.png"] = over_white.convert("RGB")
    assert set(captions(found)) == set(shown)
    for name, image in shown.items():
        (probabilities,) = reading.probabilities([image])
        assert captions(found)[name] == caption(reading.tags, probabilities, prompt="plain", left_out=())


def test_an_image_that_no_model_looks_at_gets_no_caption_and_is_named(tmp_path, tagger):
    folder = tmp_path / "images"
    write(folder, "line.png", size=(3000, 10))
    write(folder, "b.png")
    found = run(plan(folder, tagger), tmp_path / "cache")
    assert captions(found)["line.png"] is None
    assert any("line.png (3000×10 pixels" in note for note in found.notes)


def test_an_image_that_changes_meanwhile_stops_the_job(images, tagger, tmp_path):
    data = plan(images, tagger)
    found = scan(data, cpu_workers=0)
    write(images, "b.png", seed=99)
    with pytest.raises(DataError, match="has changed since it was read"):
        caption_images(found, found.data, cache=tmp_path / "cache", engine=EnginePlan(), check_in=lambda: None)


def test_captions_are_written_beside_the_images_where_that_is_asked_for(images, tagger, tmp_path):
    write(images, "b.jpg")  # with b.png: two images of one stem
    found = run(plan(images, tagger, write=True), tmp_path / "cache")
    assert (images / "a.txt").read_text() == "my own words"
    assert (images / "c.txt").read_text().strip() == captions(found)["c.png"]
    assert (images / "b.png.txt").read_text().strip() == captions(found)["b.png"]
    assert (images / "b.jpg.txt").read_text().strip() == captions(found)["b.jpg"]
    again = run(plan(images, tagger, write=True), tmp_path / "cache")
    assert captions(again) == captions(found)
    assert {image.name for image in again.images if image.captioned_by} == {"b.png", "b.jpg", "c.png", "sub/d.png"}
    # Without the cache they are the user's own.
    other = run(plan(images, tagger, write=True), tmp_path / "other")
    assert captions(other) == captions(found) and not any(image.captioned_by for image in other.images)


def test_no_file_is_replaced_unless_that_is_asked_for(images, tagger, tmp_path):
    found = run(plan(images, tagger, overwrite=True, write=True), tmp_path / "cache")
    assert (images / "a.txt").read_text().strip() == captions(found)["a.png"] != "my own words"
    (images / "metadata.csv").write_text("file_name,text\nc.png,a row\n")
    again = run(plan(images, tagger, overwrite=True, write=True), tmp_path / "cache")
    assert any("not written beside the images: c.png (metadata.csv, row" in note for note in again.notes)
    assert (images / "metadata.csv").read_text() == "file_name,text\nc.png,a row\n"


def test_two_images_that_share_a_file_get_one_each_where_it_is_replaced(images, tagger, tmp_path):
    Image.new("RGB", (40, 30), "black").save(images / "a.jpg")  # a.txt is the caption of a.jpg and of a.png
    found = run(plan(images, tagger, overwrite=True, write=True), tmp_path / "cache")
    made = captions(found)
    assert made["a.jpg"] != made["a.png"]
    assert (images / "a.txt").read_text().strip() == made["a.jpg"]
    assert (images / "a.png.txt").read_text().strip() == made["a.png"]
    read = dataclasses.replace(plan(images, tagger), captioner=None)
    assert captions(scan(read, cpu_workers=0)) == made


def test_an_image_is_never_replaced_by_its_caption(images, tagger, tmp_path):
    before = {path.name: path.read_bytes() for path in images.glob("*.png")}
    subset = Subset(Source("folder", str(images), path=str(images)), caption_extension=".png")
    found = run(plan(images, tagger, subset=subset, overwrite=True, write=True), tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in images.glob("*.png")} == before
    assert any("b.png (b.png is an image)" in note for note in found.notes)


def test_a_prompt_that_florence_2_does_not_follow_is_refused(images, tmp_path):
    from tests.support.captioners import make_florence2

    model = make_florence2(tmp_path / "florence2")
    subset = Subset(Source("folder", str(images), path=str(images)), caption_prompt="Be brief.")
    with pytest.raises(SettingsError, match=r"CAPTION_PROMPT='Be brief.' is no task of Florence-2.*<CAPTION>"):
        run(plan(images, model, subset=subset), tmp_path / "cache")


def test_captions_go_through_the_pipeline_and_into_the_fingerprint(images, tagger, tmp_path):
    from trainer.data.captions import compose_caption
    from trainer.data.identity import fingerprint

    subset = Subset(Source("folder", str(images), path=str(images)), trigger_word="ohwx", caption_extension=".txt")
    found = run(plan(images, tagger, subset=subset), tmp_path / "cache")
    image = next(image for image in found.images if image.name == "b.png")
    import random

    assert compose_caption(image.caption, subset, random.Random(0)).startswith("ohwx, ")
    data = dataclasses.replace(plan(images, tagger, subset=subset), captioner=None)
    assert fingerprint(found.images)["0.0/b.png"] != fingerprint(scan(data, cpu_workers=0).images)["0.0/b.png"]


def test_without_a_captioner_the_message_names_it(images):
    data = dataclasses.replace(plan(images, "x"), captioner=None)
    notes = scan(data, cpu_workers=0).notes
    assert any(
        "3 captions missing" in note and "CAPTION_WITH has a model caption such images" in note for note in notes
    )
    (images / "a.txt").unlink()
    assert any("have a model caption them (CAPTION_WITH)" in note for note in scan(data, cpu_workers=0).notes)


def test_a_caption_in_the_cache_is_read_without_trust(tmp_path):
    store = Store(tmp_path)
    store.write("ab" * 32, Made("a\x00dog\nand\u200b more", "m"))
    assert store.read("ab" * 32) == Made("a dog\nand more", "m")
    path = store.path("ab" * 32)
    for content in ("{}", "[1]", "{", json.dumps({"text": 1, "model": "m"})):
        path.write_text(content)
        assert store.read("ab" * 32) is None


def test_a_file_that_comes_while_the_model_looks_is_not_replaced(images, tagger, tmp_path):
    data = plan(images, tagger, write=True)
    found = scan(data, cpu_workers=0)
    (images / "c.txt").write_text("written meanwhile")
    done = caption_images(found, found.data, cache=tmp_path / "cache", engine=EnginePlan(), check_in=lambda: None)
    assert (images / "c.txt").read_text() == "written meanwhile"
    assert any("not written beside the images: c.png (c.txt is there)" in note for note in done.notes)


def test_another_machine_takes_the_captions_of_the_first_for_the_same_images(images, tagger, tmp_path):
    data = plan(images, tagger)
    first = run(data, tmp_path / "cache")
    copy = tmp_path / "copy"
    shutil.copytree(images, copy)
    (copy / "c.png").unlink()
    write(copy, "c.png", seed=99)  # another image of that name
    here = scan(plan(copy, tagger), cpu_workers=0)
    found = with_captions_of(first.images, here)
    same = {name: text for name, text in captions(first).items() if name != "c.png"}
    assert captions(found) == {**same, "c.png": None}
    assert {image.captioned_by for image in found.images if image.name == "b.png"} == {"tagger"}
    assert captions(with_captions_of((), here)) == captions(here)
