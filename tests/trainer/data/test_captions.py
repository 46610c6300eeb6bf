"""What the pipeline makes of a caption."""

from __future__ import annotations

import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import captions
from trainer.data.captions import clean, compose_caption, dropped, fill_placeholders, removed_characters
from trainer.spec.plan import Source, Subset

SOURCE = Source("folder", "pictures")


def subset(**keys) -> Subset:
    return Subset(SOURCE, **keys)


def outcomes(caption: str | None, **keys) -> set[str]:
    """All that 200 draws of the pipeline make of a caption."""
    return {compose_caption(caption, subset(**keys), random.Random(i)) for i in range(200)}


# ---- cleaning


def test_lines_are_stripped_and_empty_ones_left_out():
    assert clean("  a cat \r\n\r\n \t\r\n a dog\n") == "a cat\na dog"
    assert clean(" \n\t ") == ""
    assert clean("one\u2028two") == "one\u2028two"


def test_controls_become_blanks_and_what_has_no_width_goes():
    assert clean("a\x85b\0c") == "a b c"
    assert clean("caf\ufffd \ud800\ufdd2x") == "caf    x"
    assert clean("\ufeffa \u200bcat\u2060") == "a cat"
    assert clean("\U0001f469\u200d\U0001f4bb") == "\U0001f469\u200d\U0001f4bb"  # a joiner makes one emoji of two
    assert removed_characters("a\0\u200b\0\ufffd") == ["U+0000", "U+200B", "U+FFFD"]


@given(st.text())
def test_no_control_character_stays(text):
    cleaned = clean(text)
    assert removed_characters(cleaned) == [] and clean(cleaned) == cleaned
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in cleaned.replace("\n", "").replace("\t", ""))


# ---- the pipeline


def test_nothing_asked_for_changes_nothing():
    assert outcomes("a cat , sitting,, {x|y} {{z}}") == {"a cat , sitting,, {x|y} {{z}}"}
    assert outcomes(None) == {""}


def test_prefix_and_suffix():
    assert outcomes("a cat", caption_prefix="photo of", caption_suffix=", film") == {"photo of a cat , film"}
    assert outcomes(None, caption_prefix="photo") == {"photo"}


def test_only_the_first_line_counts_or_a_random_one_with_wildcards():
    assert outcomes("one\ntwo", caption_suffix="end") == {"one end"}
    assert outcomes("one\ntwo", caption_suffix="end", enable_wildcard=True) == {"one end", "two end"}


def test_wildcards():
    assert outcomes("a {red|blue} {cat|dog}", enable_wildcard=True) == {
        "a red cat",
        "a red dog",
        "a blue cat",
        "a blue dog",
    }
    assert outcomes("a {{red|blue}} {cat}", enable_wildcard=True) == {"a {red|blue} cat"}


def test_tags_are_shuffled_but_the_first_are_kept():
    got = outcomes("a, b, c", shuffle_caption=True, keep_tokens=1)
    assert got == {"a, b, c", "a, c, b"}


def test_tokens_around_the_separator_are_kept():
    got = outcomes("a, b ||| c, d ||| e", shuffle_caption=True, keep_tokens_separator="|||")
    assert got == {"a, b, c, d, e", "a, b, d, c, e"}


def test_tags_are_dropped_one_by_one_but_kept_ones_never():
    got = outcomes("a, b, c", caption_tag_dropout_rate=0.5, keep_tokens=1)
    assert got == {"a", "a, b", "a, c", "a, b, c"}


def test_the_secondary_separator_holds_tags_together():
    got = outcomes("a;;b, c", shuffle_caption=True, secondary_separator=";;", caption_separator=",")
    assert got == {"a,b, c", "c, a,b"}


def test_the_trigger_word_is_put_in_front_if_it_is_not_there():
    assert outcomes("a cat", trigger_word="sks") == {"sks, a cat"}
    assert outcomes("a sks cat", trigger_word="sks") == {"a sks cat"}
    assert outcomes("he asks", trigger_word="sks") == {"sks, he asks"}
    assert outcomes(None, trigger_word="sks") == {"sks"}
    assert outcomes("a cat", trigger_word="sks", is_reg=True) == {"a cat"}
    assert all(c.count("sks") == 1 for c in outcomes("sks, a, b", trigger_word="sks", caption_tag_dropout_rate=0.9))


@pytest.mark.parametrize("placeholder", ["[trigger]", "[Trigger]", "[trigger word]", "[trigger_word]", "[name]"])
def test_the_trigger_word_takes_its_place(placeholder):
    caption = f"a photo of {placeholder}, and {placeholder}"
    assert outcomes(caption, trigger_word="sks") == {"a photo of sks, and sks"}
    assert outcomes("a cat", caption_prefix=f"{placeholder},", trigger_word="sks") == {"sks, a cat"}
    assert outcomes(caption) == {caption}
    assert outcomes(caption, trigger_word="sks", is_reg=True) == {caption}
    assert fill_placeholders(caption, subset(trigger_word="sks")) == "a photo of sks, and sks"
    assert fill_placeholders(caption, subset()) == caption


@pytest.mark.parametrize("written", ["ohwx woman", "[trigger]"])
def test_the_trigger_word_is_never_shuffled_nor_dropped(written):
    keys = {"trigger_word": "ohwx woman", "shuffle_caption": True, "caption_tag_dropout_rate": 0.5}
    got = outcomes(f"red, {written}, hat", **keys)
    assert all(caption.startswith("ohwx woman") for caption in got) and len(got) > 4
    assert all("a photo of ohwx woman" in caption for caption in outcomes(f"red, a photo of {written}, hat", **keys))
    assert outcomes(f"{written}, b", trigger_word="ohwx woman", shuffle_caption=True) == {"ohwx woman, b"}


def test_a_trigger_word_with_a_separator_in_it_stays_one():
    got = outcomes("zot, dog, red, hat", trigger_word="zot, dog", shuffle_caption=True)
    assert got == {"zot, dog, red, hat", "zot, dog, hat, red"}
    assert outcomes("a;;b", trigger_word="x;;y", secondary_separator=";;") == {"x;;y, a,b"}


def test_a_separator_of_kept_tokens_is_taken_out_without_shuffling():
    assert outcomes("a, b ||| c, d ||| e ||| f", keep_tokens_separator="|||") == {"a, b, c, d, e, f"}
    assert outcomes("a ,b", keep_tokens_separator="|||") == {"a ,b"}


def test_every_third_epoch_goes_without_captions():
    rng = random.Random(0)
    got = [dropped(subset(caption_dropout_every_n_epochs=3), rng=rng, epoch=e) for e in range(7)]
    assert got == [False, False, True, False, False, True, False]


TAG = st.text(st.characters(categories=("L", "N", "Zs")), min_size=1, max_size=8).filter(str.strip)


@given(st.lists(TAG, max_size=8), st.integers(0, 9), st.booleans(), st.sampled_from([0.0, 0.5]), st.integers())
def test_kept_tags_stay_in_place_and_nothing_is_invented(tags, keep, shuffle, rate, seed):
    keys = {"keep_tokens": keep, "shuffle_caption": shuffle, "caption_tag_dropout_rate": rate}
    got = compose_caption(", ".join(tags), subset(**keys), random.Random(seed))
    stripped = [t.strip() for t in tags]
    parts = [t.strip() for t in got.split(",")] if got else []
    assert parts[: min(keep, len(tags))] == stripped[:keep]
    left = list(stripped)
    for part in parts:
        left.remove(part)  # each tag at most as often as it was there
    if rate == 0:
        assert not left
    if not shuffle:
        rest = iter(stripped)
        assert all(part in rest for part in parts)  # in the old order


@given(st.text(), st.integers())
def test_the_same_generator_gives_the_same_text(caption, seed):
    keys = {"enable_wildcard": True, "shuffle_caption": True, "caption_tag_dropout_rate": 0.3, "trigger_word": "sks"}
    first, second = (compose_caption(clean(caption), subset(**keys), random.Random(seed)) for _ in range(2))
    assert first == second and "sks" in first


@given(st.text())
def test_any_text_without_options_is_its_first_line(text):
    assert compose_caption(clean(text), subset(), random.Random(0)) == clean(text).split("\n")[0]


def test_tag_frequency():
    assert captions.tag_frequency(["a, b", "a,\nc", None], ",") == {"a": 2, "b": 1}
