"""dataset-images.jsonl says how each image is trained; the monitor page finds the image and shows its crop."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from entrypoint.monitor.dataset import TrainedImages, find_image, picture
from tests.support.drawings import draw

NUMBERS = {"PARAMS_MAX_STEPS": "1", "PARAMS_SAVE_EVERY_N_STEPS": "0"}


@pytest.fixture
def trained(job):
    """The folder of a job on images of several kinds, and the folder of the images."""
    images = job.folder / "images"
    folder = images / "3_zot dog"
    folder.mkdir(parents=True)
    for number in range(12):
        draw(128, 128, seed=number).save(folder / f"square-{number}.png")
    draw(320, 96, seed=20).save(folder / "wide.png")
    (folder / "wide.txt").write_text("red, green, blue, a very wide one")
    (folder / "square-0.txt").write_text("word " * 400)
    (folder / "bad.png").write_bytes(b"no image")
    manifest = {
        "datasets": [
            {"resolution": 128, "enable_bucket": True, "subsets": [{"image_dir": str(images), "shuffle_caption": True}]}
        ]
    }
    code, printed = job.run(**NUMBERS, DATASET_NAME="", DATASET_CONFIG=json.dumps(manifest))
    assert code == 0, printed
    return job.out, folder


def test_every_image_has_its_crop_its_captions_and_their_tokens(trained):
    out, folder = trained
    dataset = TrainedImages()
    dataset.read(out / "dataset-images.jsonl")
    summary = dataset.summary()
    assert summary["images"] == 13 and summary["skipped"] == 1 and "bad.png" in summary["list"][0][0]
    rows = {Path(row["name"]).name: row for row in dataset.images}
    wide = rows["wide.png"]
    assert wide["size"] == [320, 96] and wide["bucket"][0] > wide["bucket"][1]
    assert len(wide["captions"]) > 1 and all("a very wide one" in text for text in wide["captions"])
    assert sorted(wide["captions"][0].split(", ")) == sorted(wide["captions"][1].split(", "))
    assert rows["square-0.png"]["tokens"][0] > summary["limit"] > wide["tokens"][0] > 5
    assert str(out.parent) not in (out / "dataset-images.jsonl").read_text()
    plan = plan_of(out)
    page = dataset.page(0, plan)
    assert page["total"] == 13 and page["rows"][3]["number"] == 3 and dataset.page(12, plan)["rows"][0]["number"] == 12
    assert all(row["here"] for row in page["rows"]) and not dataset.page(0, None)["rows"][0]["here"]
    for row in dataset.images:
        assert find_image(row, plan) == folder / Path(row["name"]).name
    shown = Image.open(io.BytesIO(picture(folder / "wide.png", wide))).convert("L")
    whole = Image.open(folder / "wide.png").convert("L").resize(shown.size)
    middle, edge = (shown.width // 2, shown.height // 2), (2, shown.height // 2)
    assert abs(shown.getpixel(middle) - whole.getpixel(middle)) < 12  # inside the crop
    assert shown.getpixel(edge) < 0.6 * whole.getpixel(edge) + 3  # outside


def plan_of(out):
    from trainer.storage import run_records

    return run_records.read_plan(out / "plan.json")


def test_no_row_leads_out_of_the_folder_of_its_source(trained):
    out, folder = trained
    plan = plan_of(out)
    draw(64, 64).save(out.parent / "outside.png")
    (folder / "link.png").symlink_to(out.parent / "outside.png")
    inside = {"place": [0, 0], "file": "3_zot dog/wide.png"}
    assert find_image(inside, plan) == folder / "wide.png"
    for changed in (
        {"file": "../outside.png"}, {"file": "3_zot dog/link.png"}, {"file": "/etc/passwd"}, {"file": ""}, {"file": 1},
        {"file": "3_zot dog"}, {"file": "a\0b"}, {"place": [9, 9]}, {"place": "x"}, {"place": None}, {"place": [0]},
    ):  # fmt: skip
        assert find_image({**inside, **changed}, plan) is None, changed
    assert find_image(inside, None) is None
    # A folder from elsewhere may name any place of this machine.
    assert find_image(inside, plan, inside=out) is None and find_image(inside, plan, inside=folder.resolve())
    source = replace(plan.data.datasets[0].subsets[0].source, path="/")
    subset = replace(plan.data.datasets[0].subsets[0], source=source)
    dataset = replace(plan.data.datasets[0], subsets=(subset,))
    changed = replace(plan, data=replace(plan.data, datasets=(dataset,)))
    assert find_image({**inside, "file": str(folder / "wide.png").lstrip("/")}, changed) is None
    for numbers in (
        {"bucket": [0, 0]},
        {"scaled": [0, 0]},
        {"offset": [-9, 0]},
        {"bucket": "x"},
        {"bucket": [10**9, 1]},
    ):
        row = {"bucket": [64, 64], "scaled": [320, 96], "offset": [0, 0], **numbers}
        assert picture(folder / "wide.png", row).startswith(b"\xff\xd8")
    assert picture(folder / "bad.png", inside) == b""


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"kiln_dataset": 1}\n[]', b"\xff", b"x\n" * 10])
def test_a_damaged_file_is_shown_as_nothing(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    dataset = TrainedImages()
    dataset.read(tmp_path / "x")
    assert dataset.page(0, None)["rows"] == [] and dataset.summary()["images"] == 0
