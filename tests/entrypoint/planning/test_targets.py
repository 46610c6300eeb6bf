"""PARAMS_TARGET_MODULES in the plan: every name means a layer of the model, or is refused with what is near it."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrypoint.planning.targets import check_targets
from entrypoint.settings.checks import Notes
from entrypoint.settings.read import read_settings
from trainer.spec.errors import SettingsError
from trainer.spec.family import family_names, get_family
from trainer.spec.plan import ModelPlan
from trainer.spec.targets import is_target, layer_names

UNSET = read_settings({"BASE_MODEL": "flux", "DATASET_NAME": "/x"}).adapter
REFUSED = [
    ("flux", "attn.to_qq", "did you mean attn.to_q?"),
    ("flux", "transformer_blocks.99.attn.to_q", "which has transformer_blocks.0.attn.to_q, transformer_blocks.1.attn"),
    ("flux", ".*attn.*", "not as a regular expression. Fix: the end of a layer's name"),
    ("flux", r"transformer_blocks\.\d+\.attn\.to_q", "single_transformer_blocks.*.attn.to_q|transformer_blocks.*.attn"),
    ("flux", "double_blocks.0.img_attn.proj", "PARAMS_TARGET_MODULES=transformer_blocks.0.attn.to_out.0"),
    ("flux", "lora_unet_double_blocks_0_img_attn_qkv", "is called transformer_blocks.0.attn.to_q and"),
    ("flux", "single_transformer_blocks.1", "Fix: name these, such as single_transformer_blocks.1.attn.to_q"),
    ("flux", "attn", "has layers inside"),
    ("flux", "norm_out.linear", "outside the blocks"),
    ("flux", "attn.to_qkv", "is attn.to_q, attn.to_k, attn.to_v here"),
    ("flux", "all-linear", "did you mean|known are attn.to_q"),
    ("sdxl", "down_blocks.0.resnets.0.conv1", "outside the blocks"),
    ("sdxl", "attn3.to_q", "did you mean attn"),
    ("sd3", "attn2.to_q", "which has none of that name"),
    ("sd3", "to_add_outt", "did you mean"),
]


@pytest.mark.parametrize(("family", "target", "advice"), REFUSED)
def test_a_name_that_means_no_layer_is_refused_with_names_near_it(family, target, advice, job_plan):
    with pytest.raises(SettingsError) as refusal:
        job_plan(family, PARAMS_TARGET_MODULES=f"to_k,{target}")
    assert target.replace("\\", "\\\\") in str(refusal.value)
    assert any(part in str(refusal.value) for part in advice.split("|"))


ACCEPTED = [
    ("flux", "to_q", ("to_q",)),
    ("flux", "['attn.to_q', 'attn.to_k']", ("attn.to_q", "attn.to_k")),
    ("flux", "transformer.transformer_blocks.0.attn.to_q", ("transformer_blocks.0.attn.to_q",)),
    ("flux", "single_transformer_blocks.*.proj_out", ("single_transformer_blocks.*.proj_out",)),
    ("flux", "to_q,to_q", ("to_q",)),
    ("sdxl", "unet.mid_block.attentions.0.proj_in", ("mid_block.attentions.0.proj_in",)),
]


@pytest.mark.parametrize(("family", "text", "targets"), ACCEPTED)
def test_names_of_layers_are_accepted(family, text, targets, job_plan):
    assert job_plan(family, PARAMS_TARGET_MODULES=text).lora.targets == targets


@pytest.mark.parametrize("family", family_names())
def test_the_family_s_own_targets_are_accepted_by_name(family, job_plan):
    targets = get_family(family).FACTS.targets
    assert job_plan(family, PARAMS_TARGET_MODULES=",".join(targets)).lora.targets == targets


@given(st.lists(st.text(max_size=60), max_size=12), st.sampled_from(family_names()))
def test_any_text_is_a_layer_or_is_named(names, family):
    notes, facts = Notes(), get_family(family).FACTS
    settings = dataclasses.replace(UNSET, target_modules=tuple(names))
    model = ModelPlan(base="", family=family, source="someone/model")
    checked = check_targets(settings, model=model, facts=facts, notes=notes).target_modules
    layers = [layer.replace("{}", "0") for layer in layer_names(family)]
    unknown = [name for name in checked if not any(is_target(layer, (name,)) for layer in layers)]
    assert len(notes.lines) >= min(len(unknown), 4)


@pytest.mark.parametrize("family", family_names())
def test_the_names_that_plans_know_are_the_layers_of_the_blocks(family):
    import torch

    from tests.support.miniatures import folder

    kind = get_family(family)
    denoiser = kind.load_denoiser(folder(family), device="cpu", dtype=torch.float32)
    blocks = []
    for prefix, block in kind.blocks(denoiser):
        blocks += [f"{prefix}.{n}" for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
    known = [name.replace("{}", "*") for name in layer_names(family)]
    assert all(is_target(name, known) for name in blocks)
    others = [n for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear) and n not in blocks]
    assert not [name for name in others if name in known or any("*" in k and is_target(name, (k,)) for k in known)]
