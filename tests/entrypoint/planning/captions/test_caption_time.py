"""How long captions take on a card, against sums by hand."""

import dataclasses

import pytest

from entrypoint.planning.captions.caption_time import HOST_S, LAYER_S, PRODUCTS, caption_times, size_of
from entrypoint.system.cards import hardware_of
from entrypoint.system.hardware import Hardware
from entrypoint.system.speeds import SPEEDS
from tests.support.captioners import make_florence2, make_llava, make_tagger
from trainer.captioning import kinds
from trainer.spec.plan import CaptionerPlan
from trainer.spec.rules import captioners
from trainer.spec.rules.captioners import FLORENCE2, LLAVA, TAGGER

CPU = Hardware("cpu", "x86_64", 8.0, 0, "", 8.0, 4)


# Seconds for a token of 8 images, and for all else of an image without reading it: models of these sizes with random
# weights in bf16 on an H200.
MEASURED = {
    "florence-2": (0.0085, 0.0113),
    "florence-2-large": (0.0154, 0.0080),
    "qwen3-vl": (0.0835, 0.0165),
    "qwen3-vl-8b": (0.0464, 0.186),
    "joycaption": (0.0385, 0.0108),
}


def of(name, card="RTX 4090", **options):
    plan = CaptionerPlan(captioners.SHORT_NAMES[name], max_tokens=77, words=46) if name else None
    if options:
        plan = CaptionerPlan(plan.source, **{"max_tokens": 77, "words": 46, **options})
    return caption_times(plan, hardware_of(card))


def test_every_short_name_has_a_size():
    assert set(captioners.SHORT_NAMES.values()) == set(captioners.SIZES)


def test_a_sum_by_hand():
    """8.77 billion weights of 2 bytes at 1,008 GB/s: 17.4 ms a token, less than the host needs for 36 layers."""
    size = captioners.SIZES["Qwen/Qwen3-VL-8B-Instruct"]
    read = 2 * 8.77e9 * (2025 + 100) / (PRODUCTS * 165.2e12)
    tokens = 46 / 0.6
    assert max(size.layers * LAYER_S, 0.0174) == size.layers * LAYER_S
    by_hand = HOST_S + read + tokens * size.layers * LAYER_S / 8
    assert of("qwen3-vl-8b").image == pytest.approx(by_hand)


@pytest.mark.parametrize("name", MEASURED)
def test_it_is_within_a_factor_of_two_of_what_was_measured(name):
    token_s, image_s = MEASURED[name]
    measured = HOST_S + image_s + 80 * token_s / 8
    assert measured / 2 < of(name, "H200", max_tokens=80, words=100).image < measured * 2


def test_a_card_that_is_too_small_takes_4_bits_and_longer():
    """JoyCaption: 17 GB in 16 bits. On the smaller card, bandwidth decides."""
    moved = 8.48e9 * (0.5625 + 4) / (SPEEDS["RTX 3060"].gb_s * 1e9)
    assert moved > 32 * LAYER_S
    by_hand = HOST_S + 2 * 8.48e9 * 829 / (PRODUCTS * SPEEDS["RTX 3060"].tflops_16 * 1e12) + 46 / 0.6 * moved / 8
    assert of("joycaption", "RTX 3060").image == pytest.approx(by_hand)
    assert by_hand > 2 * of("joycaption", "RTX 4090").image


def test_longer_captions_and_larger_models_take_longer_and_faster_cards_less():
    assert of("qwen3-vl", max_tokens=256, words=120).image > 1.5 * of("qwen3-vl").image
    assert of("florence-2").image < of("florence-2-large").image < of("qwen3-vl").image
    assert of("qwen3-vl", "H100").image < of("qwen3-vl", "RTX 3060").image
    assert of("qwen3-vl").load > of("florence-2").load > 0


def test_a_tagger_takes_the_cores_of_the_host():
    plan = CaptionerPlan(captioners.SHORT_NAMES["wd"])
    assert caption_times(plan, CPU).image > 2 * caption_times(plan, dataclasses.replace(CPU, cpu_count=16)).image


def test_what_is_not_known_is_not_said():
    assert of("") == (0.0, 0.0)
    assert caption_times(CaptionerPlan("somebody/model"), hardware_of("RTX 4090")) == (0.0, 0.0)
    assert caption_times(CaptionerPlan(captioners.SHORT_NAMES["qwen3-vl"]), CPU) == (0.0, 0.0)


def test_a_damaged_folder_takes_no_time_that_is_known(tmp_path):
    """A plan is made nevertheless: what is damaged is named before a download, with all other problems."""
    folder = make_florence2(tmp_path / "model")
    plan = CaptionerPlan(str(folder), path=str(folder))
    assert size_of(CaptionerPlan("/none", path=str(tmp_path / "none"))) is None
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert size_of(plan) is None and caption_times(plan, hardware_of("RTX 4090")) == (0.0, 0.0)
    (folder / "config.json").write_text("{")
    assert size_of(plan) is None


def test_a_folder_is_as_large_as_its_files_say(tmp_path):
    for make, kind, layers in ((make_florence2, FLORENCE2, 1), (make_llava, LLAVA, 1)):
        folder = make(tmp_path / kind)
        size = size_of(CaptionerPlan(str(folder), path=str(folder)))
        assert size == (kind, kinds.weight_count(folder), layers)
    folder = make_tagger(tmp_path / "tagger")
    size = size_of(CaptionerPlan(str(folder), path=str(folder)))
    assert size == (TAGGER, (folder / "model.onnx").stat().st_size // 4, 0)
