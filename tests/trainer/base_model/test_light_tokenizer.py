"""Tokens are counted before a job as transformers counts them in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bench.original_names import facts, miniature
from tests.support.miniatures import base
from tests.support.single_files import planned
from trainer.base_model.light_tokenizer import LightTokenizer
from trainer.data import caption_length
from trainer.spec.family import family_names

WORDS = [
    "red",
    "a",
    "Ünïcode",
    "blue,",
    "😀",
    "  two",
    "x" * 30,
    "don't",
    "\n",
    "123",
    "<|endoftext|>",
    "<|im_end|>",
    "\r\n \t",
    "</s>",
    "é",
    "ﬁ",
    "[INST]",
    "2048",
]
texts = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join) | st.text(max_size=60)


def clip_files(place: Path) -> list[Path]:
    """CLIP's tokenizer as its open repository has it, with the miniature's words."""
    model = json.loads((miniature("flux") / "tokenizer" / "tokenizer.json").read_text())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (place / "vocab.json").write_text(json.dumps(model["vocab"]))
    (place / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    config = (miniature("flux") / "tokenizer" / "tokenizer_config.json").read_text()
    (place / "tokenizer_config.json").write_text(config)
    return [place / "vocab.json", place / "merges.txt"]


@pytest.fixture(scope="module", params=["CLIP's two files", "CLIP", "T5", "Qwen", "Qwen2.5-VL", "Mistral"])
def both(request, tmp_path_factory):
    if request.param == "CLIP's two files":
        place = tmp_path_factory.mktemp("clip")
        return LightTokenizer(clip_files(place)), AutoTokenizer.from_pretrained(place)
    if request.param.startswith("Qwen"):
        place = miniature("z_image" if request.param == "Qwen" else "qwen_image") / "tokenizer"
        return LightTokenizer([place / "tokenizer.json"]), AutoTokenizer.from_pretrained(place)
    if request.param == "Mistral":
        place = miniature("flux2_dev") / "tokenizer"
        return LightTokenizer([place / "tokenizer.json"]), AutoTokenizer.from_pretrained(place)
    place = miniature("flux") / ("tokenizer" if request.param == "CLIP" else "tokenizer_2")
    return LightTokenizer([place / "tokenizer.json"]), AutoTokenizer.from_pretrained(place)


@given(text=texts)
def test_the_same_tokens_at_the_same_places(both, text):
    light, heavy = both
    found, want = light.encode(text), heavy(text, return_offsets_mapping=True, verbose=False)
    assert found.input_ids == want.input_ids
    assert [tuple(place) for place in found.offset_mapping] == [tuple(place) for place in want.offset_mapping]


@pytest.mark.parametrize("family", [*family_names(), "flux2_dev"])
def test_the_same_reader_before_a_job_and_in_it(tmp_path, family):
    (tmp_path / "photos").mkdir()
    asked = {"BASE_MODEL": base(family), "DATASET_NAME": str(tmp_path / "photos"), "BACKEND": "cpu"}
    light = caption_length.load_light_reader(planned(asked), max_tokens=77, hub_cache=None)
    heavy = caption_length.load_reader(facts(family), miniature(family))
    assert (light.name, light.limit) == (heavy.name, heavy.limit)
    assert light.cut("a red wall " * 300) == heavy.cut("a red wall " * 300)


def test_a_tokenizer_that_is_not_here_counts_nothing(tmp_path):
    (tmp_path / "photos").mkdir()
    asked = {"BASE_MODEL": "flux-dev", "DATASET_NAME": str(tmp_path / "photos"), "BACKEND": "cpu"}
    assert caption_length.load_light_reader(planned(asked), max_tokens=77, hub_cache=tmp_path) is None
