"""A model's answer as a caption."""

from __future__ import annotations

import pytest

from trainer.captioning.tidy import tidy


def text(answer: str, *, was_cut: bool = False) -> str:
    return tidy(answer, "m", was_cut=was_cut).text


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("This image shows a dog on grass.", "A dog on grass."),
        ("The photo depicts a dog.", "A dog."),
        ("Here is a detailed caption for this image: A dog.", "A dog."),
        ("Sure! Here's a caption: ohwx sits.", "Ohwx sits."),
        ("Caption: **A dog** in the rain.", "A dog in the rain."),
        ('"A dog in the rain."', "A dog in the rain."),
        ("A dog.\n\nIt is\twet.", "A dog. It is wet."),
        ('A sign says "Stop" and a dog\'s leash hangs there.', 'A sign says "Stop" and a dog\'s leash hangs there.'),
        ("The image of a saint hangs on a wall.", "The image of a saint hangs on a wall."),
        ("<s>A dog</s><pad>", "A dog"),
    ],
)
def test_what_models_write_around_a_caption_is_taken_off(answer, expected):
    assert text(answer) == expected


def test_a_caption_that_was_cut_ends_with_its_last_whole_sentence():
    assert text("A dog sits. Behind it a red", was_cut=True) == "A dog sits."
    assert text("A dog sits on a very long", was_cut=True) == "A dog sits on a very long"
    assert text("A dog sits. Behind it a red") == "A dog sits. Behind it a red"


def test_a_model_that_goes_round_in_a_circle_is_cut_at_the_first_repeat():
    assert text("A dog sits. The grass is green. The grass is green. The grass is green.") == (
        "A dog sits. The grass is green."
    )


@pytest.mark.parametrize("answer", ["I'm sorry, but I can't help with that.", "I cannot describe people.", "", " . "])
def test_a_refusal_is_no_caption(answer):
    made = tidy(answer, "m", was_cut=False)
    assert made.text == "" and made.problem
