"""Which layers get adapters, how those begin, and what is refused; by tables and against peft's own layers."""

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from trainer.engine import adapters
from trainer.spec.errors import SettingsError

FUSED = {"attn.to_qkv": ("attn.to_q", "attn.to_k")}
BOTH = FUSED["attn.to_qkv"]


class Model(torch.nn.Module):
    """One block with two projections of the same input and another layer."""

    def __init__(self, *, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.block = torch.nn.Module()
        self.block.attn = torch.nn.Module()
        self.block.attn.to_q = torch.nn.Linear(4, 6, bias)
        self.block.attn.to_k = torch.nn.Linear(4, 8, bias)
        self.block.out = torch.nn.Linear(6, 4)
        self.block.norm = torch.nn.LayerNorm(4)
        self.requires_grad_(False)

    def add_adapter(self, config, adapter_name):
        inject_adapter_in_model(config, self, adapter_name)

    @property
    def blocks(self):
        return [("block", self.block)]


def adapted(**changes):
    model = Model()
    options = {"targets": (*BOTH, "out"), "fused": {}, "rank": 4, "alpha": 2.0, "seed": 3, **changes}
    return model, adapters.add_adapters(model, model.blocks, **options)


@pytest.mark.parametrize(
    ("name", "targets", "wanted"),
    [
        ("b.0.attn.to_q", BOTH, True),
        ("b.0.attn.to_v", BOTH, False),
        ("b.0.attn.to_qkv", BOTH, True),
        ("b.0.attn.to_qkv", BOTH[:1], False),
        ("b.0.attn.to_qkv", BOTH[1:], False),
        ("attn.to_qkv", BOTH, True),
        ("b.0.cross_attn.to_qkv", BOTH, False),
        ("b.0.attn.to_qkv", ("b.0.attn.to_q", "b.0.attn.to_k"), True),
        ("b.1.attn.to_qkv", ("b.0.attn.to_q", "b.0.attn.to_k"), False),
        ("b.0.attn.to_added_qkv", BOTH, False),
    ],
)
def test_a_joined_layer_gets_an_adapter_if_all_its_parts_are_targets(name, targets, wanted):
    assert adapters.gets_adapter(name, targets=targets, fused=FUSED) is wanted


@pytest.mark.parametrize("bias", [True, False])
def test_joined_projections_give_the_outputs_of_their_parts(bias):
    model, plain = Model(bias=bias), Model(bias=bias)
    adapters.fuse_projections(model.blocks, fused=FUSED, targets=BOTH)
    x = torch.randn(3, 4)
    attn = model.block.attn
    wanted = torch.cat([plain.block.attn.to_q(x), plain.block.attn.to_k(x)], -1)
    torch.testing.assert_close(attn.to_qkv(x), wanted)
    assert (attn.to_qkv.in_features, attn.to_qkv.out_features) == (4, 14)
    assert attn.fused_projections is True and not hasattr(attn, "to_q") and not hasattr(attn, "to_k")
    assert (attn.to_qkv.bias is not None) is bias and not any(p.requires_grad for p in attn.parameters())


@pytest.mark.parametrize("targets", [BOTH[:1], BOTH[1:], ()])
def test_projections_are_left_apart_where_one_is_no_target(targets):
    model = Model()
    adapters.fuse_projections(model.blocks, fused=FUSED, targets=targets)
    assert hasattr(model.block.attn, "to_q") and not hasattr(model.block.attn, "fused_projections")


def test_projections_are_left_apart_where_one_is_missing():
    model = Model()
    del model.block.attn.to_k
    adapters.fuse_projections(model.blocks, fused=FUSED, targets=BOTH)
    assert hasattr(model.block.attn, "to_q") and not hasattr(model.block.attn, "to_qkv")


@pytest.mark.parametrize(("kind", "scale"), [("lora", 2.0 / 4), ("rslora", 2.0 / math.sqrt(4)), ("dora", 2.0 / 4)])
def test_adapters_begin_as_those_of_peft_with_the_same_seed(kind, scale):
    model, params = adapted(kind=kind)
    plain = Model()
    torch.manual_seed(3)
    names = ["block.attn.to_q", "block.attn.to_k", "block.out"]
    plain.add_adapter(
        LoraConfig(r=4, lora_alpha=2.0, target_modules=names, use_rslora=kind == "rslora", use_dora=kind == "dora"),
        "default",
    )
    found, wanted = adapters.state(model), adapters.state(plain)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert len(found) == len(params) == (9 if kind == "dora" else 6)
    assert any("magnitude" in name for name in found) == (kind == "dora")
    assert model.block.out.scaling["default"] == pytest.approx(scale)
    assert {p.dtype for p in params} == {torch.float32}
    ids = {id(p) for p in params}
    assert ids == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_seed_decides_alone_and_the_programs_generator_is_left_as_it_was():
    first = adapters.state(adapted()[0])
    model = Model()
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    adapters.add_adapters(model, model.blocks, targets=(*BOTH, "out"), fused={}, rank=4, alpha=2.0, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "block.out.lora_A.weight"
    assert torch.equal(adapters.state(model)[name], first[name])
    assert not torch.equal(adapters.state(adapted(seed=4)[0])[name], first[name])


def test_targets_that_mean_no_linear_layer_are_named():
    model = Model()
    assert adapters.unmatched_targets(model.blocks, ("out", "norm", "to_x", *BOTH)) == ["norm", "to_x"]
    with pytest.raises(
        SettingsError, match=r"^PARAMS_TARGET_MODULES norm,to_x matches no linear layer of the model\.$"
    ):
        adapters.add_adapters(model, model.blocks, targets=("norm", "to_x"), fused={}, rank=4, alpha=2.0, seed=3)


def test_tensors_overwrite_the_adapters_or_are_refused_by_the_first_name():
    model, _ = adapted()
    new = {name: torch.randn_like(tensor) for name, tensor in adapters.state(model).items()}
    adapters.load(model, {name: tensor.clone() for name, tensor in new.items()})
    assert all(torch.equal(tensor, new[name]) for name, tensor in adapters.state(model).items())
    first, last = min(new), max(new)
    missing = {name: tensor for name, tensor in new.items() if name not in (first, last)}
    for wrong, count, name in (
        (missing, 2, first),
        ({**new, "zzz": torch.zeros(1)}, 1, "zzz"),
        ({**new, last: torch.zeros(1, 1)}, 1, last),
    ):
        with pytest.raises(ValueError, match=rf"^{count} of 6 tensors do not match, {name} first$"):
            adapters.load(model, wrong)
