"""Taggers: pixels and tags as the WD models were trained with them, against numbers worked out from the weights."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from tests.support.captioners import TAGGER_TAGS, field, make_tagger, node, onnx_model, tagger_weights, value_info
from trainer.captioning.tagger import Tag, Tagger, caption, read_tags, square
from trainer.spec.errors import SettingsError
from trainer.spec.rules.captioners import left_out_tags

SIDE = 448


def reference(image: Image.Image, seed: int) -> np.ndarray:
    """The miniature's probabilities in float64, from the definition: white square, BGR, 0 to 255, no scaling."""
    longest = max(image.size)
    canvas = np.full((longest, longest, 3), 255, np.uint8)
    left, top = (longest - image.width) // 2, (longest - image.height) // 2
    canvas[top : top + image.height, left : left + image.width] = np.asarray(image)
    pixels = np.asarray(Image.fromarray(canvas).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)
    blue_first = pixels[:, :, [2, 1, 0]]
    means = np.concatenate([blue_first.mean(axis=0), blue_first.mean(axis=1)]).reshape(-1)
    matrix, bias = tagger_weights(len(TAGGER_TAGS), SIDE, seed)
    return 1 / (1 + np.exp(-(means @ matrix.astype(np.float64) + bias)))


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    return Tagger(make_tagger(tmp_path_factory.mktemp("tagger"), seed=4), threads=1)


@pytest.mark.parametrize("size", [(300, 200), (120, 700), (448, 448), (900, 900)])
def test_probabilities_are_those_of_the_weights(tagger, size):
    rng = np.random.default_rng(size[0])
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).resize(size)
    (found,) = tagger.probabilities([image])
    assert found == pytest.approx(reference(image, 4), abs=2e-4)


def test_photographs_of_one_batch_are_what_they_are_alone(tagger, photographs):
    images = [Image.open(path).convert("RGB") for path in sorted((photographs / "can").glob("*.jpg"))[:3]]
    together = tagger.probabilities(images)
    for image, found in zip(images, together, strict=True):
        assert found == pytest.approx(reference(image, 4), abs=2e-4)


def test_an_image_is_padded_with_white_and_its_blue_comes_first():
    pixels = square(Image.new("RGB", (100, 50), (10, 20, 30)), 100)
    assert pixels.shape == (100, 100, 3) and pixels.dtype == np.float32
    assert pixels[50, 50].tolist() == [30, 20, 10]
    assert pixels[10, 50].tolist() == [255, 255, 255] and pixels[90, 50].tolist() == [255, 255, 255]


def test_underscores_become_blanks_but_not_in_faces_and_brackets_stay(tmp_path):
    path = tmp_path / "selected_tags.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["tag_id", "name", "category", "count"],
                [1, "long_hair", 0, 5],
                [2, "^_^", 0, 4],
                [3, "saber_(fate)", 4, 3],
            ]
        )
    assert [tag.text for tag in read_tags(path)] == ["long hair", "^_^", "saber (fate)"]


TAGS = [Tag("general", "9"), Tag("sky", "0"), Tag("dog", "0"), Tag("grass", "0"), Tag("rin", "4"), Tag("miku", "4")]


def test_thresholds_are_0_35_and_0_85_and_the_surest_comes_first():
    probabilities = np.array([0.99, 0.36, 0.9, 0.34, 0.84, 0.86])
    assert caption(TAGS, probabilities, prompt="plain", left_out=()) == "miku, dog, sky"


def test_where_a_trigger_word_stands_for_the_character_no_other_name_is_given():
    probabilities = np.array([0.99, 0.36, 0.9, 0.34, 0.84, 0.86])
    assert caption(TAGS, probabilities, prompt="subject", left_out=()) == "dog, sky"


def test_tags_of_the_prompt_are_left_out():
    left_out = left_out_tags("Dog, blue_eyes")
    assert left_out == {"dog", "blue eyes"}
    assert caption(TAGS, np.full(6, 0.9), prompt="Dog, blue_eyes", left_out=left_out) == "rin, miku, sky, grass"
    assert left_out_tags("subject") == frozenset()


def test_a_table_of_another_length_is_refused(tmp_path):
    folder = make_tagger(tmp_path)
    (folder / "model.onnx").write_bytes(onnx_model(4, side=SIDE, seed=1))
    with pytest.raises(SettingsError, match=r"gives 4 numbers .* has 11 tags"):
        Tagger(folder, threads=1).probabilities([Image.new("RGB", (8, 8))])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no model", "no model that onnxruntime reads"),
        (
            field(1, 8)
            + field(
                7,
                field(1, node("Identity", ["x"], "y"))
                + field(2, "g")
                + field(11, value_info("x", ["n", 3, SIDE, SIDE]))
                + field(12, value_info("y", ["n", 3, SIDE, SIDE])),
            )
            + field(8, field(1, "") + field(2, 18)),
            r"reads \[\['n', 3, 448, 448\]\]",
        ),
    ],
)
def test_another_onnx_file_is_refused(tmp_path, content, says):
    folder = make_tagger(tmp_path)
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(SettingsError, match=says):
        Tagger(folder, threads=1)


@pytest.mark.parametrize(("changes", "tolerance"), [({"batch": 1}, 2e-4), ({"kind": 10}, 2e-2)])
def test_a_tagger_for_one_image_and_one_of_float16_are_read(tmp_path, changes, tolerance):
    folder = make_tagger(tmp_path)
    (folder / "model.onnx").write_bytes(onnx_model(len(TAGGER_TAGS), side=SIDE, seed=4, **changes))
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 256, (90, 60, 3), dtype=np.uint8)) for _ in range(3)]
    found = Tagger(folder, threads=1).probabilities(images)
    assert found.shape == (3, len(TAGGER_TAGS))
    for image, row in zip(images, found, strict=True):
        assert row == pytest.approx(reference(image, 4), abs=tolerance)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 4}, "reads 4 images at once"),
        ({"kind": 11}, r"reads tensor\(double\)|no model that onnxruntime reads"),
    ],
)
def test_a_tagger_of_another_batch_or_type_is_refused(tmp_path, changes, says):
    folder = make_tagger(tmp_path)
    (folder / "model.onnx").write_bytes(onnx_model(len(TAGGER_TAGS), side=SIDE, seed=4, **changes))
    with pytest.raises(SettingsError, match=says):
        Tagger(folder, threads=1)


def test_a_tagger_that_fails_while_it_runs_is_named(tmp_path):
    folder = make_tagger(tmp_path)
    tagger = Tagger(folder, threads=1)
    tagger.side = 8
    with pytest.raises(SettingsError, match=r"model.onnx: onnxruntime cannot run it"):
        tagger.probabilities([Image.new("RGB", (8, 8))])


def test_a_table_without_its_columns_is_refused(tmp_path):
    folder = make_tagger(tmp_path)
    (folder / "selected_tags.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SettingsError, match="needs the columns name and category"):
        Tagger(folder, threads=1)
