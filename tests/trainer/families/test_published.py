"""The configs that are written down make the published models: their weights are as many, and their files fit."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from transformers import AutoConfig

from bench.full_size import FULL
from tests.support import full_size_files, miniatures
from trainer.base_model import weight_kinds
from trainer.base_model.loading import empty_model
from trainer.data import cache
from trainer.spec.family import base_models, facts_of, get_family

# Weights of the published parts, counted in their repositories' files.
DENOISERS = {
    "flux-dev": 11_901_408_320,
    "flux-krea": 11_901_408_320,
    "flux-schnell": 11_891_178_560,
    "sdxl": 2_567_463_684,
    "sd3": 2_028_328_000,
    "sd3.5-medium": 2_243_171_520,
    "sd3.5-large": 8_056_627_520,
    "z-image": 6_154_908_736,
    "z-image-turbo": 6_154_908_736,
    "flux2-klein-4b": 3_875_544_576,
    "flux2-klein-9b": 9_078_581_248,
    "flux2-dev": 32_223_281_152,
    "qwen-image": 20_430_401_088,
    "qwen-image-2512": 20_430_401_088,
    "krea2": 12_820_073_036,
    "krea2-turbo": 12_820_073_036,
}
OTHERS = {"vae": (83_819_683, 83_653_863, 84_046_115, 126_892_531), "clip_l": (123_060_480, 123_650_304)}
OTHERS |= {"clip_g": (694_659_840,), "t5": (4_762_310_656,), "qwen3": (4_022_468_096, 7_568_405_504)}
OTHERS |= {"mistral3": (17_343_759_360,)}  # of its 40 layers, the 30 that are read
OTHERS |= {"qwen3_vl": OTHERS["qwen3"][:1]}  # of Qwen3-VL-4B, its language model
# Of Qwen2.5-VL-7B's 8,292,166,656 without what reads images and without the output layer.
OTHERS |= {"qwen2_5_vl": (8_292_166_656 - 676_550_144 - 3584 * 152064,)}


@pytest.mark.parametrize("base", DENOISERS)
def test_the_parts_have_as_many_weights_as_published(base, tmp_path):
    family, model = base_models()[base]
    for name, config in model.published.configs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(config))
    index = model.published.configs["model_index.json"]
    facts = facts_of(family, base)
    for part, folder in facts.parts.items():
        made = empty_model(facts.kinds[folder], tmp_path / folder)
        count = sum(weight.numel() for weight in made.parameters())
        assert count == DENOISERS[base] if part == "denoiser" else count in OTHERS[part], part
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.num_train_timesteps == 1000


@pytest.mark.parametrize("base", DENOISERS)
def test_the_marks_are_in_the_file_of_this_model(base):
    family, model = base_models()[base]
    state = full_size_files.denoiser(base)
    for name, shape in model.published.marks.items():
        assert (tuple(state[name].shape) if name in state else None) == shape, name
    renamed = full_size_files.parts(base)["denoiser"]
    marks = weight_kinds.marks_in(renamed, model.published, family)
    assert any(shape is not None for shape in marks.values())
    for name, shape in marks.items():
        assert (tuple(renamed[name].shape) if name in renamed else None) == shape, name


def test_schedules_are_the_published_ones():
    def schedule(base: str) -> dict:
        return base_models()[base][1].published.configs["scheduler/scheduler_config.json"]

    assert schedule("flux-dev")["shift"] == 3.0 and schedule("flux-dev")["use_dynamic_shifting"]
    assert schedule("flux-schnell")["shift"] == 1.0 and "use_dynamic_shifting" not in schedule("flux-schnell")
    assert schedule("sd3.5-large")["shift"] == 3.0
    assert [schedule(base)["shift"] for base in ("z-image", "z-image-turbo")] == [6.0, 3.0]
    assert schedule("sdxl")["timestep_spacing"] == "leading" and schedule("sdxl")["steps_offset"] == 1


@pytest.mark.parametrize(
    ("family", "base"),
    [
        *(("flux", "flux-dev"), ("flux2", "flux2-klein-4b"), ("sdxl", "sdxl"), ("sd3", "sd3")),
        *(("z_image", "z-image"), ("qwen_image", "qwen-image"), ("krea2", "krea2")),
    ],
)
def test_they_agree_with_the_configs_that_the_benchmarks_measure(family, base):
    configs = base_models()[base][1].published.configs
    for part, expected in FULL[family].items():
        found = configs[f"{get_family(family).FACTS.parts[part]}/config.json"]
        for key, value in expected.items():
            if key in found and not (part == "vae" and key.endswith(("factor", "_mean", "_std"))):
                assert found[key] == (list(value) if isinstance(value, tuple) else value), (part, key)


def test_every_published_base_has_configs_and_tokenizers_from_open_repositories():
    gated = {model.source for _, model in base_models().values() if model.gated}
    for base, (family, model) in base_models().items():
        if model.is_miniature:
            continue
        facts = facts_of(family, base)
        folders = {name.split("/")[0] for name in model.published.configs}
        assert folders == {"model_index.json", "scheduler", *facts.parts.values()}, base
        encoders = {folder for folder in facts.parts.values() if folder.startswith("text_encoder")}
        tokenizers = model.published.tokenizers
        assert {name.replace("tokenizer", "text_encoder") for name in tokenizers} == encoders
        assert not {tokenizer.repository for tokenizer in tokenizers.values()} & gated


def test_clip_takes_the_last_of_its_end_tokens_whatever_the_config_calls_it(tmp_path: Path):
    """transformers reads the pooled output at the highest token where the config says 2, as published configs do."""
    (tmp_path / "config.json").write_text(
        json.dumps(base_models()["sdxl"][1].published.configs["text_encoder/config.json"])
    )
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id == 2
    assert torch.tensor([49406, 320, 49407, 49407]).argmax().item() == 2


# Tokens of a caption that the planner counts: as many as any has, or (krea2) as many as are usual.
CAPTION_TOKENS = {"flux": 512, "flux2": 512, "sd3": 77 + 256, "sdxl": 77, "z_image": 512, "qwen_image": 512}
CAPTION_TOKENS["krea2"] = 160
POOLED = {"flux": 768, "sd3": 768 + 1280, "sdxl": 1280}
TEXT_WIDTHS = ("joint_attention_dim", "cross_attention_dim", "cap_feat_dim", "text_hidden_dim")


@pytest.mark.parametrize("base", DENOISERS)
def test_the_planner_knows_what_the_cache_holds(base):
    """By the miniature's cache, at the widths of the published model."""
    name, model = base_models()[base]
    place = miniatures.folder("flux2_dev" if base == "flux2-dev" else name)
    family, footprint = get_family(name), model.footprint
    part = family.FACTS.parts["denoiser"]
    small = json.loads((place / part / "config.json").read_text())
    full = model.published.configs[f"{part}/config.json"]
    (width,) = (key for key in TEXT_WIDTHS if key in full)
    encoders = family.load_encoders(place, device="cpu", dtype=torch.bfloat16)
    (text,) = family.encode_text(encoders, ["a red spot"])
    tokens = text["tokens"]
    taken = len(cache._bytes({"tokens": tokens})) - len(cache._bytes({"tokens": tokens[:0]}))
    per_token = taken / len(tokens) / 2 * full[width] / small[width]
    expected = CAPTION_TOKENS[name] * per_token + POOLED.get(name, 0)
    assert footprint.caption_values == pytest.approx(expected, rel=2e-3)  # a header differs by some bytes

    pixels = torch.rand(1, 3, 128, 128)
    latents = family.encode_images(family.load_vae(place, device="cpu"), pixels)[0]
    of_vae = json.loads((place / "vae" / "config.json").read_text())
    channels = next(key for key in ("latent_channels", "z_dim") if key in of_vae)
    ratio = model.published.configs["vae/config.json"][channels] / of_vae[channels]
    assert latents.nbytes * ratio == 128 * 128 / 64 * 2 * footprint.latent_channels * 4
