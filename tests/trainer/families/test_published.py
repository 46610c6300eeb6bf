"""The configs that are written down make the published models: their weights are as many, and their files fit."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from transformers import AutoConfig

from bench.full_size import FULL
from tests.support import full_size_files
from trainer.base_model.loading import empty_model
from trainer.spec.family import base_models, get_family

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
    "qwen-image": 20_430_401_088,
    "qwen-image-2512": 20_430_401_088,
    "krea2": 12_820_073_036,
    "krea2-turbo": 12_820_073_036,
}
OTHERS = {"vae": (83_819_683, 83_653_863, 84_046_115, 126_892_531), "clip_l": (123_060_480, 123_650_304)}
OTHERS |= {"clip_g": (694_659_840,), "t5": (4_762_310_656,), "qwen3": (4_022_468_096, 7_568_405_504)}
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
    facts = get_family(family).FACTS
    for part, folder in facts.parts.items():
        made = empty_model(facts.kinds[folder], tmp_path / folder)
        count = sum(weight.numel() for weight in made.parameters())
        assert count == DENOISERS[base] if part == "denoiser" else count in OTHERS[part], part
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(tmp_path / "scheduler")
    assert scheduler.config.num_train_timesteps == 1000


@pytest.mark.parametrize("base", DENOISERS)
def test_the_marks_are_in_the_file_of_this_model(base):
    state = full_size_files.denoiser(base)
    for name, shape in base_models()[base][1].published.marks.items():
        assert (tuple(state[name].shape) if name in state else None) == shape, name


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
        facts = get_family(family).FACTS
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
