"""Weights that are larger than the memory that may be taken for them. Here small; tests/gpu has the full size."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel

from bench import full_size, layouts
from bench.original_names import miniature
from trainer.base_model import single_file
from trainer.engine.load import place_denoiser, stored_dtype
from trainer.spec.family import get_family


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["file", "shards"])
@pytest.mark.parametrize("name", full_size.FULL)
def test_the_measurement_writes_and_finds_every_weight_of_a_miniature(name, layout, dtype, tmp_path):
    plan = layouts.write_model(tmp_path, name, layout, changes={}, dtype=dtype, shard=10**6)
    denoiser, row = layouts.measure(plan, tmp_path / "cache", device="cpu")
    assert {k for k in row if k.endswith("own_gib")} == {"assembled_own_gib", "loaded_own_gib", "placed_own_gib"}
    folder = single_file.convert_single_files(plan, tmp_path / "cache") / get_family(name).FACTS.parts["denoiser"]
    assert len(list(folder.glob("*.safetensors"))) > (layout == "shards")
    assert layouts.wrong_weights(folder) == []
    for key, tensor in denoiser.state_dict().items():
        own = torch.float32 if name == "krea2" and "norm" in key else torch.bfloat16
        assert torch.equal(tensor, layouts.weight(key, tensor.to(dtype)).to(own)), key


def test_a_weight_at_another_place_is_noticed(tmp_path):
    plan = layouts.write_model(tmp_path, "flux", "shards", changes={}, dtype=torch.bfloat16, shard=10**6)
    file = next((tmp_path / "model" / "transformer").glob("*-00001-*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"x_embedder.weight"', b'"x_embedder.weighT"'))
    assert layouts.wrong_weights(file.parent) == ["x_embedder.weighT"]
    assert plan.parts == {}


@pytest.mark.parametrize("name", full_size.FULL)
def test_the_full_size_is_that_of_the_published_models(name, tmp_path):
    """Weights, counted on the device "meta"."""
    models = full_size.write_configs(tmp_path / "model", name, full_size.FULL[name])
    counts = {part: sum(p.numel() for p in model.parameters()) for part, model in models.items()}
    published = {"clip_l": 123_060_480, "clip_g": 694_659_840, "t5": 4_762_310_656}
    published |= {"vae": {"sdxl": 83_653_863, "flux2": 84_046_115}.get(name, 83_819_683)}
    denoisers = {"flux": 11_901_408_320, "sdxl": 2_567_463_684, "sd3": 2_028_328_000, "z_image": 6_154_908_736}
    denoisers |= {"flux2": 3_875_544_576, "qwen_image": 20_430_401_088, "krea2": 12_820_073_036}
    published |= {"denoiser": denoisers[name], "qwen3": 4_022_468_096, "qwen2_5_vl": 7_070_619_136}
    published |= {"qwen3_vl": 4_022_468_096}
    if name in ("qwen_image", "krea2"):
        published["vae"] = 126_892_531
    if name == "sd3":
        published["clip_l"] += 768 * 768  # with its projection
    assert counts == {part: published[part] for part in counts}
    config = json.loads((tmp_path / "model" / get_family(name).FACTS.parts["denoiser"] / "config.json").read_text())
    assert config["_class_name"] == type(models["denoiser"]).__name__


def test_weights_stay_in_the_mapped_file_until_their_block_is_placed(tmp_path):
    """Also where they become another format: 24 GB in 16 bits would else be 24 GB of the host's memory."""
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=2, num_attention_heads=8, guidance_embeds=True)
    model.half().save_pretrained(tmp_path / "transformer")
    size = 2 * sum(p.numel() for p in model.parameters())
    expected = {k: v.bfloat16() for k, v in model.state_dict().items()}
    kind = get_family("flux")
    assert stored_dtype(tmp_path / "transformer") == torch.float16 and size > 150e6
    with layouts.memory_taken() as most:
        there = kind.load_denoiser(tmp_path, device="cpu", dtype=stored_dtype(tmp_path / "transformer"))
    assert most[0] < size / 8
    with layouts.memory_taken() as most:
        place_denoiser(
            there, kind.blocks(there), precision="bf16", dtype=torch.bfloat16, device="cpu", fused={}, targets=()
        )
    assert size / 2 < most[0] < 1.2 * size
    assert all(torch.equal(v, expected[k]) for k, v in there.state_dict().items())


def test_the_format_of_a_folder_is_that_of_most_of_its_weights_and_not_of_copies(tmp_path):
    model = get_family("sdxl").load_denoiser(miniature("sdxl"), device="cpu", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert stored_dtype(tmp_path) == torch.float32
