"""Whole jobs with PARAMS_TRAINING_ADAPTER: in the weights that train, and neither in the samples nor in the LoRA."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.miniatures import base, folder
from trainer.storage.digests import sha256

ASKED = {
    "BASE_MODEL": "mini-z-image",
    "PARAMS_OPTIMIZER_TYPE": "adamw",
    "PARAMS_MAX_STEPS": "2",
    "PARAMS_SAMPLE_EVERY_N_STEPS": "2",
    "SAMPLE_PROMPTS": '["a red circle --w 64 --h 64 --s 2"]',
}


# Family → the ends of the layers that its adapters change here, by diffusers' names; those names → the files' own.
LAYERS = {
    "z_image": ({"layers.": "layers."}, {"attention.to_q": "attention.to_q", "feed_forward.w2": "feed_forward.w2"}),
    "krea2": ({"transformer_blocks.": "blocks."}, {"attn.to_q": "attn.wq", "ff.down": "mlp.down"}),
}


def adapter(path, strength, family="z_image"):
    """As ostris publishes them: ComfyUI's prefix, no alpha."""
    torch.manual_seed(0)
    weights = load_file(next((folder(family) / "transformer").glob("*.safetensors")))
    tensors = {}
    starts, ends = LAYERS[family]
    for name, weight in weights.items():
        if name.startswith(tuple(starts)) and name.removesuffix(".weight").endswith(tuple(ends)):
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            for ours, theirs in (*starts.items(), *ends.items()):
                layer = layer.replace(ours, theirs)
            tensors[f"{layer}.lora_A.weight"] = torch.randn(4, weight.shape[1]) * strength
            tensors[f"{layer}.lora_B.weight"] = torch.randn(weight.shape[0], 4) * strength
    save_file(tensors, path)
    return str(path)


def image(out, step):
    return np.asarray(Image.open(out / "sample" / f"step-{step:08}-00.png"), dtype=float)


def first_loss(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next(row["loss"] for row in rows if "loss" in row)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", LAYERS)
def test_the_lora_trains_on_top_of_it_and_is_drawn_and_saved_without_it(job, tmp_path, family):
    asked = {**ASKED, "BASE_MODEL": base(family), "CACHE_PATH": str(tmp_path / "cache")}
    plain, out = tmp_path / "plain", tmp_path / "out"
    code, printed = job.run(**asked, OUTPUT_PATH=str(plain))
    assert code == 0, printed
    named = adapter(tmp_path / "a.safetensors", 0.2, family)
    code, printed = job.run(**asked, OUTPUT_PATH=str(out), PARAMS_TRAINING_ADAPTER=named)
    assert code == 0 and "layers. The LoRA trains on top of it" in printed, printed
    # The LoRA is zero before the first step: images are those of the base model, but for rounding.
    assert np.abs(image(out, 0) - image(plain, 0)).mean() < 0.5
    assert abs(first_loss(plain) - first_loss(out)) > 1e-3  # from equal noise
    with_it, without = (load_file(place / "x.safetensors") for place in (out, plain))
    assert {name: t.shape for name, t in with_it.items()} == {name: t.shape for name, t in without.items()}


@pytest.mark.timeout(900)
def test_a_run_goes_on_with_the_same_file_wherever_it_is_and_with_no_other(job, tmp_path):
    asked = {**ASKED, "CACHE_PATH": str(tmp_path / "cache"), "PARAMS_SAMPLE_EVERY_N_STEPS": "0"}
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    code, printed = job.run(**asked, PARAMS_TRAINING_ADAPTER=adapter(first, 0.2))
    assert code == 0, printed
    before = sha256(job.out / "x.safetensors")
    second.write_bytes(first.read_bytes())
    code, printed = job.run(**asked, PARAMS_TRAINING_ADAPTER=str(second))
    assert code == 0 and "This job is done" in printed, printed
    code, printed = job.run(**asked, PARAMS_TRAINING_ADAPTER=adapter(second, 0.1))
    assert code == 0 and "the file of PARAMS_TRAINING_ADAPTER has changed" in printed, printed
    assert sha256(job.out / "x.safetensors") == before and (job.out / "x-2.safetensors").is_file()
