"""A LoRA that is merged into the frozen weights, and left out of samples: against weights that were merged by hand."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from tests.support import models
from trainer.engine import adapters, training_adapter
from trainer.engine.load import place_denoiser
from trainer.engine.quantization.frozen_linear import FrozenLinear
from trainer.spec.errors import SettingsError
from trainer.spec.family import get_family

RANK, ALPHA = 3, 6.0
TARGETS = {
    "z_image": ("layers.0.attention.to_q", "layers.2.feed_forward.w2", "noise_refiner.0.adaLN_modulation.0"),
    # One of the three projections that train as one layer, two of another one, and a layer outside of the blocks.
    "flux": (
        *("transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.attn.to_q"),
        *("single_transformer_blocks.0.attn.to_v", "x_embedder"),
    ),
}


def saved(path, name, denoiser, prefix="transformer", targets=None):
    """A file in PEFT's names, as diffusers writes it; and scale * B A of each layer in float64."""
    torch.manual_seed(5)
    tensors, changes = {}, {}
    for target in targets or TARGETS[name]:
        rows, columns = denoiser.get_submodule(target).weight.shape
        down, up = torch.randn(RANK, columns) * 0.3, torch.randn(rows, RANK) * 0.3
        tensors |= {
            f"{prefix}.{target}.lora_A.weight": down, f"{prefix}.{target}.lora_B.weight": up,
            f"{prefix}.{target}.alpha": torch.tensor(ALPHA),
        }  # fmt: skip
        changes[target] = ALPHA / RANK * up.double() @ down.double()
    save_file(tensors, path)
    return changes


def placed(name, denoiser, adapter=None, *, precision="fp32", dtype=torch.float32):
    family = get_family(name)
    options = {"fused": family.FACTS.fused_targets, "targets": family.FACTS.targets}
    where = {"precision": precision, "dtype": dtype, "device": "cpu", "rank": 2}
    forwards = family.fused_forwards() if precision == "fp8" else None
    place_denoiser(denoiser, family.blocks(denoiser), **where, **options, forwards=forwards, training_adapter=adapter)
    adapters.add_adapters(denoiser, family.blocks(denoiser), **options, rank=2, alpha=2.0, seed=0)
    torch.manual_seed(2)
    for parameter_name, p in denoiser.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(p, std=0.1)
    if adapter:
        adapter.place(denoiser, fused=family.FACTS.fused_targets, device="cpu", dtype=dtype)
    return denoiser


def output(name, denoiser, dtype=torch.float32):
    torch.manual_seed(3)
    if name == "z_image":
        text = models.z_image_text()
    else:
        config = denoiser.config
        text = {
            "tokens": torch.randn(2, 6, config.joint_attention_dim),
            "pooled": torch.randn(2, config.pooled_projection_dim),
        }
    text = {key: value.to(dtype) if value.is_floating_point() else value for key, value in text.items()}
    with torch.no_grad():
        return get_family(name).predict(
            denoiser, torch.randn(2, 16, 8, 8), torch.tensor([0.6, 0.3]), text=text, guidance=1.0
        )


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("name", TARGETS)
def test_it_is_merged_into_the_weights_and_subtracted_from_what_samples_see(name, tmp_path):
    original = getattr(models, f"{name}_denoiser")()
    changes = saved(tmp_path / "a.safetensors", name, original)
    by_hand = copy.deepcopy(original)
    for target, change in changes.items():
        weight = by_hand.get_submodule(target).weight
        weight.data = (weight.double() + change).float()
    adapter = training_adapter.load(tmp_path / "a.safetensors", get_family(name).FACTS)
    merged = placed(name, copy.deepcopy(original), adapter)
    wanted, unmerged = placed(name, by_hand), placed(name, copy.deepcopy(original))
    assert adapter.merged == set(changes)
    assert error(output(name, merged), output(name, wanted)) < 1e-5
    with adapter.without():
        assert error(output(name, merged), output(name, unmerged)) < 1e-4
    assert error(output(name, merged), output(name, unmerged)) > 0.05
    assert error(output(name, merged), output(name, wanted)) < 1e-5  # nothing is left behind
    assert adapters.state(merged).keys() == adapters.state(unmerged).keys()


def test_samples_of_fp8_blocks_are_without_it_too(tmp_path, monkeypatch):
    """Their fused forward passes do not call the layers, unless these have something to subtract."""
    monkeypatch.setattr("trainer.spec.adapter_columns.MIN_SIDE_PER_COLUMN", 0)
    options = {"dim": 48, "n_heads": 3, "n_kv_heads": 3, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 24}
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    original = ZImageTransformer2DModel(**options, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64]).requires_grad_(False)
    targets = [
        f"layers.{i}.{layer}" for i in range(2) for layer in ("attention.to_q", "feed_forward.w1", "feed_forward.w2")
    ]
    saved(tmp_path / "a.safetensors", "z_image", original, "diffusion_model", targets)
    adapter = training_adapter.load(tmp_path / "a.safetensors", get_family("z_image").FACTS)
    as_fp8 = {"precision": "fp8", "dtype": torch.bfloat16}
    exact, merged = (
        placed("z_image", copy.deepcopy(original)),
        placed("z_image", copy.deepcopy(original), adapter, **as_fp8),
    )
    assert any(isinstance(module, FrozenLinear) and module.in_fp8 for module in merged.modules())
    wanted = output("z_image", exact)
    with adapter.without():
        assert error(output("z_image", merged, torch.bfloat16), wanted) < 0.1
    assert error(output("z_image", merged, torch.bfloat16), wanted) > 0.3


def test_a_file_for_another_model_is_refused_by_name(tmp_path):
    path = tmp_path / "a.safetensors"
    denoiser = models.z_image_denoiser()
    facts = get_family("z_image").FACTS
    deeper = copy.deepcopy(denoiser)
    deeper.layers.append(copy.deepcopy(deeper.layers[0]))
    saved(path, "z_image", deeper, targets=["layers.3.attention.to_q"])
    with pytest.raises(SettingsError, match=r"PARAMS_TRAINING_ADAPTER=.*lacks 1 of its 1 layers: layers\.3"):
        placed("z_image", copy.deepcopy(denoiser), training_adapter.load(path, facts))
    deeper.layers[0].attention.to_q = torch.nn.Linear(64, 32)
    saved(path, "z_image", deeper, targets=["layers.0.attention.to_q"])
    with pytest.raises(SettingsError, match=r"layers\.0\.attention\.to_q is \(32, 64\) in it and \(32, 32\)"):
        placed("z_image", copy.deepcopy(denoiser), training_adapter.load(path, facts))
    with pytest.raises(SettingsError, match="cannot be read"):
        training_adapter.load(path, get_family("flux").FACTS)
