"""A step of each family is one that a CUDA graph can hold: it copies nothing from the host and waits for nothing."""

import pytest
import torch

from tests.support import fused_models, host_copies, models
from tests.support.variants import VARIANTS
from trainer.engine.kernels import dispatch
from trainer.spec.family import family_names, get_family

MASKED = [name for name in family_names() if get_family(name).FACTS.masks_captions]


def text_of(name):
    """Of two captions, of other lengths where the family has a mask for them."""
    return getattr(models, f"{name}_text", models.text)()


def noted_in_a_step(family, denoiser, text, dtype):
    """On the device "meta", the second time: the first one keeps what is the same for all steps of a size."""
    denoiser.to("meta")
    for _ in range(2):
        channels = 4 if family.FACTS.name == "sdxl" else 16
        noisy = torch.empty(2, channels, 8, 12, device="meta", requires_grad=True)
        given = {key: value.to("meta", dtype if value.is_floating_point() else None) for key, value in text.items()}
        t, geometry = torch.empty(2, device="meta"), torch.empty(2, 6, device="meta")
        with host_copies.noted() as noted:
            out = family.predict(denoiser, noisy, t, text=given, guidance=1.0, geometry_B6=geometry)
            out.float().square().mean().backward()
    return noted


@pytest.mark.parametrize(
    ("name", "masked"), [(n, m) for n in family_names() for m in (False, True) if m <= (n in MASKED)]
)
def test_a_step_copies_nothing_from_the_host_and_waits_for_nothing(name, masked):
    text = text_of(name)
    if not masked:
        text.pop("padding", None)
    denoiser = getattr(models, f"{name}_denoiser")()
    assert noted_in_a_step(get_family(name), denoiser, text, torch.float32) == []


@pytest.mark.parametrize("base", fused_models.WIDE)
def test_nor_do_fused_blocks(base, monkeypatch):
    monkeypatch.setattr("trainer.spec.adapter_columns.MIN_SIDE_PER_COLUMN", 0)
    monkeypatch.setattr(dispatch, "_on_cpu", lambda _arguments: True)  # plain torch, not Triton, runs on "meta"
    family, denoiser = fused_models.model(base)
    dtype = torch.bfloat16
    forwards = family.fused_forwards()
    fused_models.adapted(family, denoiser, precision="fp8", dtype=dtype, forwards=forwards)
    text = fused_models.texts(denoiser.config, dtype)
    if VARIANTS[base][0] not in MASKED:
        text.pop("padding", None)
    assert noted_in_a_step(family, denoiser, text, dtype) == []


def test_what_no_graph_can_hold_is_noted():
    on_meta = torch.empty(3, device="meta")
    with host_copies.noted() as names:
        torch.as_tensor(3, device="meta")
        on_meta.new_tensor([1.0])
        torch.ones(3).to("meta")
        on_meta.copy_(torch.ones(3))
        on_meta.add_(1.0)
    assert names == ["as_tensor", "new_tensor", "aten::_to_copy", "aten::copy_"]
