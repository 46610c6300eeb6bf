"""Operations fused with quantisation, against the modules one by one and against diffusers' own blocks."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch.utils.checkpoint import checkpoint

from tests.support.fused_models import WIDE, adapted, error, model, predicted
from trainer.engine import fused_linear, rope
from trainer.engine.kernels import reference
from trainer.engine.memory import checkpointing
from trainer.engine.quantization.frozen_linear import FrozenLinear
from trainer.families.fused_blocks.projections import join_tokens, split_tokens

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def roomy_weights(monkeypatch):
    """These narrow layers get adapter columns as well."""
    monkeypatch.setattr("trainer.spec.adapter_columns.MIN_SIDE_PER_COLUMN", 0)


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("base", WIDE)
def test_fused_blocks_compute_what_diffusers_blocks_do(base, joined):
    found = []
    for ours in (False, True):
        family, denoiser = model(base)
        targets = (
            family.FACTS.targets
            if joined
            else tuple(t for t in family.FACTS.targets if not t.endswith(("q", "q_proj")))
        )
        adapted(family, denoiser, precision="fp32", dtype=torch.float32, forwards=None, targets=targets)
        replaced = 0
        for module in denoiser.modules():
            if ours and type(module) in family.fused_forwards():
                module.__class__ = family.fused_forwards()[type(module)]
                replaced += 1
        assert replaced == 0 or not ours or replaced >= 3
        found.append(predicted(family, denoiser, torch.float32))
    (plain, wanted), (other, gradients) = found
    # Gates and sums in one operation round once where diffusers' two round twice.
    assert error(other, plain) < 1e-6 and gradients.keys() == wanted.keys()
    assert all(error(gradients[n], wanted[n]) < 1e-5 for n in wanted)


@pytest.mark.parametrize(
    ("base", "modulation", "count"),
    [("z-image", "adaLN_modulation.0", 3 + 2), ("qwen-image", "img_mod.1", 3)],  # of Z-Image, refiners of images too
)
def test_the_modulations_of_blocks_train_too(base, modulation, count):
    """Through scales and gates, which one kernel each multiplies in."""
    found = {}
    for way, precision, dtype in [("full", "fp32", torch.float32), ("ours", "fp8", torch.bfloat16)]:
        family, denoiser = model(base)
        forwards = family.fused_forwards()
        adapted(family, denoiser, precision=precision, dtype=dtype, forwards=forwards, targets=(modulation, "to_q"))
        found[way] = predicted(family, denoiser, dtype)[1]
        block = family.blocks(denoiser)[-1][1] if base == "qwen-image" else denoiser.layers[0]
        stored = block.get_submodule(modulation).base_layer
        assert way == "full" or (stored.weight_format, stored.in_fp8) == ("fp8-storage", False)
    names = [name for name in found["full"] if modulation in name]
    assert len(names) == 2 * count and found["ours"].keys() == found["full"].keys()
    assert max(error(found["ours"][name], found["full"][name]) for name in names) < 0.25


@pytest.mark.parametrize("base", WIDE)
def test_fused_blocks_are_as_near_to_full_precision_as_diffusers_blocks_in_fp8(base):
    found = {}
    for way, precision, dtype in [
        ("full", "fp32", torch.float32),
        ("plain", "fp8", torch.bfloat16),
        ("ours", "fp8", torch.bfloat16),
    ]:
        family, denoiser = model(base)
        forwards = family.fused_forwards() if way == "ours" else None
        adapted(family, denoiser, precision=precision, dtype=dtype, forwards=forwards)
        fused_blocks = set(family.fused_forwards().values())
        used = {type(m) for m in denoiser.modules()}
        assert used & fused_blocks == (fused_blocks if way == "ours" else set())
        found[way] = predicted(family, denoiser, dtype)
    out, gradients = found.pop("full")
    assert found["ours"][1].keys() == gradients.keys()
    assert error(found["ours"][0], out) < 1.3 * error(found["plain"][0], out)
    off = {
        way: sorted(error(g[n], w) for n, w in gradients.items() if w.norm() > 1e-6) for way, (_, g) in found.items()
    }
    for share in (0.5, 0.9):  # of adapters
        ours, plain = (off[way][int(share * len(off[way]))] for way in ("ours", "plain"))
        assert ours < 1.2 * plain < 0.5


def layers(*sizes, rank=4):
    """FP8 layers, (A, B) of each, and the fields of `_Fp8Layer` for all; the second layer has no adapter."""
    frozen = [FrozenLinear(torch.nn.Linear(k, n).bfloat16().requires_grad_(False), "fp8", rank) for k, n in sizes]
    weights = [
        (torch.randn(rank, k).bfloat16().requires_grad_(), torch.randn(n, rank).bfloat16().requires_grad_())
        for k, n in sizes
    ]
    weights[1:2] = [(None, None)] * len(weights[1:2])
    flat = [t for f, h in zip(frozen, weights, strict=True) for t in (f.weight_NF, f.scale_1N, f.bias, *h, None)]
    return frozen, weights, flat


def gradients(outs, leaves):
    torch.manual_seed(9)
    loss = sum((out.float() * torch.randn(out.shape)).sum() for out in outs)
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])


def assert_same(found, wanted, leaves):
    """Outputs have the same bits; gradients differ only by where they are rounded."""
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for a, b in zip(gradients(found, leaves), gradients(wanted, leaves), strict=True):
        assert a.dtype == b.dtype and error(a, b) < 0.02


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("plus", [0.0, 1.0])
def test_norm_linear_is_the_norm_then_the_layers(plus, count):
    torch.manual_seed(0)
    frozen, weights, flat = layers((64, 96), (64, 32), (64, 48), (64, 16))
    x = (torch.randn(12, 64) * 3 + 1).bfloat16().requires_grad_()
    scale, shift = (torch.randn(2, 64).bfloat16().requires_grad_() for _ in range(2))
    leaves = [x, scale, shift, *(t for pair in weights[:count] for t in pair)]

    wide = F.layer_norm(x.float(), (64,), eps=1e-6).view(2, 6, 64) * (plus + scale[:, None].float())
    rows = (wide + shift[:, None].float()).view(12, 64).bfloat16()
    wanted = [f.linear(rows, *pair) for f, pair in zip(frozen[:count], weights, strict=False)]
    found = fused_linear._norm_linear(x, scale, shift, plus, 1e-6, True, *flat[: 6 * count])
    assert_same(found, (*wanted, x), leaves)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("images", "plus"), [(1, 0.0), (2, 0.0), (1, 1.0)])
def test_norm_linear_that_is_not_centred_is_the_rms_norm_then_the_layers(images, plus, shifted):
    torch.manual_seed(0)
    frozen, weights, flat = layers((64, 96), (64, 32))
    x = (torch.randn(12, 64) * 3 + 1).bfloat16().requires_grad_()
    scale = torch.randn(images, 64).requires_grad_()
    shift = torch.randn(images, 64).bfloat16().requires_grad_() if shifted else None
    hat = F.rms_norm(x.float(), (64,), eps=1e-6).view(images, -1, 64)
    rows = hat * (plus + scale[:, None])
    rows = rows if shift is None else rows + shift[:, None].float()
    rows = rows.view(12, 64).bfloat16()
    wanted = [f.linear(rows, *pair) for f, pair in zip(frozen, weights, strict=True)]
    found = fused_linear._norm_linear(x, scale, shift, plus, 1e-6, False, *flat)
    assert_same(found, (*wanted, x), [x, scale, shift, *(t for pair in weights for t in pair)])


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("left", [0, 32])
@pytest.mark.parametrize("joined", [True, False])
def test_swiglu_linear_is_the_swiglu_or_the_gate_then_the_layer(joined, left, silu):
    torch.manual_seed(0)
    frozen, weights, flat = layers((64 + left, 48))
    both = (torch.randn(12, 128) * 2).bfloat16().requires_grad_()
    left_rows = torch.randn(12, left).bfloat16().requires_grad_() if left else None
    a, b = both.chunk(2, -1) if joined else (part.contiguous() for part in both.chunk(2, -1))
    rows = ((F.silu if silu else F.sigmoid)(a.float()) * b.float()).bfloat16()
    rows = rows if left_rows is None else torch.cat([left_rows, rows], -1)
    found, wanted = fused_linear._swiglu_linear(left_rows, a, b, silu, *flat), frozen[0].linear(rows, *weights[0])
    assert_same([found], [wanted], [left_rows, both, *weights[0]])


@pytest.mark.parametrize("gated", [True, False])
def test_norm_residual_is_the_norm_the_gate_and_the_sum(gated):
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm(64, eps=1e-5).requires_grad_(False)
    torch.nn.init.normal_(norm.weight)
    x, y = (torch.randn(2, 6, 64).requires_grad_() for _ in range(2))
    gate = torch.randn(2, 64).requires_grad_() if gated else None
    wanted = fused_linear.norm_residual(x, norm, gate, y)  # in fp32 by the modules
    found = fused_linear.norm_residual(x.bfloat16(), norm, None if gate is None else gate.bfloat16(), y.bfloat16())
    assert error(found, wanted) < 5e-3
    for a, b in zip(gradients([found], [x, gate, y]), gradients([wanted], [x, gate, y]), strict=True):
        assert error(a, b) < 0.01


@pytest.mark.parametrize("left", [0, 32])
@pytest.mark.parametrize("geglu", [False, True])
def test_gelu_linear_is_the_gelu_then_the_layer(geglu, left):
    torch.manual_seed(0)
    frozen, weights, flat = layers((64 + left, 48))
    y = (torch.randn(12, 64 * (1 + geglu)) * 2).bfloat16().requires_grad_()
    left_rows = torch.randn(12, left).bfloat16().requires_grad_() if left else None
    a, b = y.float().chunk(2, -1) if geglu else (1, y.float())
    rows = (a * F.gelu(b, approximate="none" if geglu else "tanh")).bfloat16()
    rows = rows if left_rows is None else torch.cat([left_rows, rows], -1)
    found, wanted = fused_linear._gelu_linear(left_rows, y, geglu, *flat), frozen[0].linear(rows, *weights[0])
    assert_same([found], [wanted], [left_rows, y, *weights[0]])


@pytest.mark.parametrize("wanted_of_x", [False, True])
def test_shared_input_linear_quantises_its_input_once(wanted_of_x, monkeypatch):
    torch.manual_seed(0)
    frozen, weights, flat = layers((64, 96), (64, 32), (64, 48))
    x = torch.randn(12, 64).bfloat16().requires_grad_(wanted_of_x)
    wanted = [f.linear(x, *pair) for f, pair in zip(frozen, weights, strict=True)]
    calls = []
    monkeypatch.setattr(fused_linear, "quantize_rows", lambda *a: calls.append(a) or reference.quantize_rows(*a))
    found = fused_linear._shared_input_linear(x, *flat)
    assert len(calls) == 1
    assert_same(found, wanted, [x if wanted_of_x else None, *(t for pair in weights for t in pair)])


def test_norm_linear_saves_only_its_input():
    """Neither the normalised rows nor the quantised ones."""
    _, _, flat = layers((64, 96))
    x, scale = torch.randn(12, 64).bfloat16().requires_grad_(), torch.randn(1, 64).bfloat16()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        fused_linear._norm_linear(x, scale, scale, 1.0, 1e-6, True, *flat)
    assert [t.data_ptr() for t in held if t.shape[0] == 12 and t.shape[1] == 64] == [x.data_ptr()]


def block(base="flux-dev"):
    """A block with adapters that runs our forward pass, and what it takes."""
    family, denoiser = model(base)
    adapted(family, denoiser, precision="fp8", dtype=torch.bfloat16, forwards=family.fused_forwards())
    torch.manual_seed(4)
    width = denoiser.config.attention_head_dim * denoiser.config.num_attention_heads
    x, y = (torch.randn(2, n, width).bfloat16().requires_grad_() for n in (16, 6))
    cos_sin = torch.randn(22, 16), torch.randn(22, 16)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    if base == "krea2":
        x = torch.randn(2, 22, width).bfloat16().requires_grad_()
        mask = torch.cat([mask, mask.new_ones(2, 16)], 1)[:, None, None]
        return denoiser.transformer_blocks[0], (x, torch.randn(2, 1, 6 * width).bfloat16(), cos_sin, mask)
    if base == "qwen-image":
        turns = tuple(torch.polar(torch.ones(n, 8), torch.randn(n, 8)) for n in (16, 6))
        return denoiser.transformer_blocks[0], (x, y, mask, torch.randn(2, width).bfloat16(), turns)
    if base.startswith("flux2"):  # text and image are one sequence, and the modulation is there
        x = torch.randn(2, 22, width).bfloat16().requires_grad_()
        return denoiser.single_transformer_blocks[0], (x, None, torch.randn(2, 3 * width).bfloat16(), cos_sin)
    return denoiser.single_transformer_blocks[0], (x, y, torch.randn(2, width).bfloat16(), cos_sin)


def leaves_of(one, inputs):
    """What of a block's inputs and of its own tensors has a gradient."""
    given = [value for value in inputs if isinstance(value, torch.Tensor) and value.requires_grad]
    return [*given, *(p for p in one.parameters() if p.requires_grad)]


FAMILIES = ["flux-dev", "flux2-klein-4b", "krea2", "qwen-image"]


@pytest.mark.parametrize("base", FAMILIES)
@pytest.mark.parametrize("policy", checkpointing.POLICIES)
def test_recomputing_changes_no_bit(policy, base):
    original, inputs = block(base)
    found = []
    for name in ("none", policy):
        one = copy.deepcopy(original)
        checkpointing.apply([one], [name], compiled=False)
        outs = one(*inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        found.append([*outs, *gradients(outs, leaves_of(one, inputs))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("policy", "times"), [("none", 1), ("products", 2), ("all", 2)])
def test_the_products_policy_recomputes_queries_and_keys_and_nothing_else(policy, times, monkeypatch):
    one, inputs = block()
    checkpointing.apply([one], [policy], compiled=False)
    rotated, normalised = [], []
    rotate, norm_rows = rope.rotate, fused_linear.norm_rows
    monkeypatch.setattr(rope, "rotate", lambda *args: rotated.append(1) or rotate(*args))
    monkeypatch.setattr(fused_linear, "norm_rows", lambda *args: normalised.append(1) or norm_rows(*args))
    outs = one(*inputs)
    gradients(outs, [*inputs[:2], *(p for p in one.parameters() if p.requires_grad)])
    assert len(rotated) == times and len(normalised) == (2 if policy == "all" else 1)


def test_a_forward_pass_that_fails_frees_its_tensors():
    """Attention saves its own output. A hook that returns it with its graph would make a cycle that is never freed."""
    one, inputs = block()
    checkpointing.apply([one], ["products"], compiled=False)
    leaf = inputs[0].detach().requires_grad_()
    x = leaf * 1.0
    held, outs = weakref.ref(x), one(x, *inputs[1:])
    del x, outs
    gc.collect()
    assert held() is None


def test_a_block_with_layers_that_cannot_be_fused_is_recomputed_entirely():
    one, _ = block()
    assert one.can_recompute_rope()
    one.proj_mlp.lora_dropout["default"] = torch.nn.Dropout(0.5)
    checkpointing.apply([one], ["products"], compiled=False)
    assert not one.can_recompute_rope() and not one.recompute_rope and "forward" in one.__dict__


@pytest.mark.parametrize("base", FAMILIES)
def test_a_checkpointed_block_compiles_in_one_graph(base):
    one, inputs = block(base)
    leaves = leaves_of(one, inputs)
    wanted = one(*inputs)

    def run(*given):
        return checkpoint(one, *given, use_reentrant=False)

    found = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    wanted, found = (outs if isinstance(outs, tuple) else (outs,) for outs in (wanted, found))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for a, b in zip(gradients(found, leaves), gradients(wanted, leaves), strict=True):
        assert error(a, b) < 1e-3


def test_an_adapter_with_dropout_is_computed_by_its_own_layer(monkeypatch):
    """The block stays a fused block; only this layer runs as a module."""
    one, inputs = block()
    monkeypatch.setattr(fused_linear, "_gelu_linear", None)  # which would be called otherwise
    with pytest.raises(TypeError):
        one(*inputs)
    one.proj_out.lora_dropout["default"] = torch.nn.Dropout(0.5)
    assert all(out.isfinite().all() for out in one(*inputs))


@pytest.mark.parametrize("several", [False, True])
def test_norm_rope_is_the_norms_and_the_rotation_of_diffusers(several):
    torch.manual_seed(0)
    heads, dim, lengths = 3, 16, (5, 4) if several else (9,)
    sources = [torch.randn(2, n, 3 * heads * dim).requires_grad_() for n in lengths]
    norms = [[torch.nn.RMSNorm(dim, eps=1e-6).requires_grad_(False) for _ in range(2)] for _ in lengths]
    for norm_q, norm_k in norms:
        torch.nn.init.normal_(norm_q.weight)
        torch.nn.init.normal_(norm_k.weight)
    cos_sin = torch.randn(9, dim), torch.randn(9, dim)

    each = []
    for source, (norm_q, norm_k) in zip(sources, norms, strict=True):
        q, k, v = (part.unflatten(-1, (heads, dim)) for part in source.chunk(3, -1))
        each.append((norm_q(q), norm_k(k), v))
    q, k, v = (torch.cat(parts, 1) for parts in zip(*each, strict=True))
    wanted = [apply_rotary_emb(q, cos_sin, sequence_dim=1), apply_rotary_emb(k, cos_sin, sequence_dim=1), v]
    found = rope.norm_rope([(s, *n) for s, n in zip(sources, norms, strict=True)], cos_sin)
    every = zip((*found, *gradients(found, sources)), (*wanted, *gradients(wanted, sources)), strict=True)
    assert all(a.shape == b.shape and error(a, b) < 1e-6 for a, b in every)


def test_joining_the_parts_of_one_tensor_copies_nothing():
    x = torch.randn(2, 7, 4, requires_grad=True)
    y = x * 1.0
    first, second = split_tokens(y, 3)
    assert join_tokens(first, second) is y
    assert (
        torch.equal(join_tokens(second, first), torch.cat([second, first], 1)) and join_tokens(second, first) is not y
    )
    assert torch.equal(join_tokens(first, second[:, :2]), y[:, :5])
    other = (x * 1.0)[:, :3]
    assert (
        torch.equal(join_tokens(other, second), torch.cat([other, second], 1)) and join_tokens(other, second) is not y
    )
    flat = (x * 1.0).view(-1, 4)  # the tensor that they are views of may have another shape
    assert torch.equal(join_tokens(*split_tokens(flat.view(2, 7, 4), 3)), flat.view(2, 7, 4))
    join_tokens(first, second).square().sum().backward()
    assert torch.equal(x.grad, 2 * x)
