"""What FlashAttention 4 is given and what becomes of its answers: a package of its signature computes in float64 here.

tests/gpu/test_attention.py has the package itself.
"""

import itertools
import logging
import math
import sys
import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import step
from trainer.checkpoints import resume, state_files
from trainer.checkpoints.resume import _warn_of_other_software
from trainer.engine.attention import flash_attention_4
from trainer.spec.plan import EnginePlan

HEADS = 3
LAYOUTS = ("joined", "transposed", "apart")
OPERATORS = (
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_backward,
)


def scores_of(q, k, scale, causal):
    """The package's layout: (batch, tokens, heads, numbers)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * (scale or 1 / math.sqrt(q.shape[-1]))
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf) if causal else scores


class Package:
    """The two functions that are used, with the parameters that are, as the real ones name and order them."""

    def __init__(self, *, off=0.0, raises=None):
        self.off, self.raises, self.calls = off, raises, []

    def _flash_attn_fwd(self, q, k, v, qv=None, *, softmax_scale=None, causal=False, return_lse=False, out=None):
        self.calls.append("forward")
        if self.raises:
            raise self.raises
        assert return_lse and out.shape == q.shape and out.stride(-1) == 1
        scores = scores_of(q, k, softmax_scale, causal)
        out.copy_(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double()) * (1 + self.off))
        return out, scores.logsumexp(-1), None, None, None

    def _flash_attn_bwd(
        self,
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale=None,
        causal=False,
        *,
        deterministic=False,
        dq=None,
        dk=None,
        dv=None,
    ):
        self.calls.append("backward" + deterministic * ", deterministic")
        scale, g = softmax_scale or 1 / math.sqrt(q.shape[-1]), dout.double()
        assert lse.is_contiguous() and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        weights = (scores_of(q, k, softmax_scale, causal) - lse.double().unsqueeze(-1)).exp()
        products = torch.einsum("bqhd,bkhd->bhqk", g, v.double())
        by_score = weights * (products - (g * out.double()).sum(-1).transpose(1, 2).unsqueeze(-1)) * scale
        dq.copy_(torch.einsum("bhqk,bkhd->bqhd", by_score, k.double()))
        dk.copy_(torch.einsum("bhqk,bqhd->bkhd", by_score, q.double()))
        dv.copy_(torch.einsum("bhqk,bqhd->bkhd", weights, g))
        return dq, dk, dv


class Original:
    """torch's own kernel: what it is called with."""

    def __init__(self):
        self.calls = []

    def call_boxed(self, *given, **more):
        self.calls.append((given, more))
        return "torch's own"


@pytest.fixture(autouse=True)
def all_is_heard(caplog):
    """Whatever level another test has left the log at."""
    caplog.set_level(logging.WARNING)


@pytest.fixture
def package(monkeypatch):
    """`package(...)`: a stand-in is what is installed."""
    error = type("DSLBaseError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "cutlass.base_dsl.common", types.SimpleNamespace(DSLBaseError=error))

    def put(**options):
        made = Package(**options)
        monkeypatch.setattr(flash_attention_4, "_module", lambda: made)
        flash_attention_4._is_correct.cache_clear()
        return made

    yield put
    flash_attention_4._is_correct.cache_clear()


def made(layout, tokens, dim, dtype, generator, batch=2):
    """(batch, heads, tokens, dim): parts of joined rows, rows with heads side by side, or heads apart."""
    if layout == "joined":
        rows = torch.randn(batch, tokens, 3 * HEADS * dim, generator=generator, dtype=torch.float64).to(dtype)
        return rows.chunk(3, 2)[1].unflatten(2, (HEADS, dim)).transpose(1, 2)
    if layout == "transposed":
        return (
            torch.randn(batch, tokens, HEADS, dim, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        )
    return torch.randn(batch, HEADS, tokens, dim, generator=generator, dtype=torch.float64).to(dtype)


def with_autograd(q, k, v, g, **how):
    given = [t.detach().requires_grad_() for t in (q, k, v)]
    out = scaled_dot_product_attention(*given, **how)
    return out.detach(), *torch.autograd.grad(out, given, g)


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize(("causal", "keys"), [(False, 7), (False, 5), (True, 5)])
def test_what_is_compared_with_is_what_autograd_gives(causal, keys):
    generator = torch.Generator().manual_seed(keys)
    q, g = (made("apart", 5, 8, torch.float64, generator) for _ in "qg")
    k, v = (made("apart", keys, 8, torch.float64, generator) for _ in "kv")
    for found, wanted in zip(
        flash_attention_4.reference_attention(q, k, v, g, causal=causal),
        with_autograd(q, k, v, g, is_causal=causal),
        strict=True,
    ):
        assert error(found, wanted) < 1e-12


@pytest.mark.parametrize(("layout", "of_gradient"), [*itertools.product(LAYOUTS, LAYOUTS)])
@pytest.mark.parametrize(
    ("causal", "scale", "keys"), [(False, None, 9), (True, None, 6), (False, 0.3, 6), (True, 0.3, 6)]
)
def test_both_passes_are_those_of_torch(package, layout, of_gradient, causal, scale, keys):
    package()
    generator = torch.Generator().manual_seed(1)
    q = made(layout, 6, 64, torch.float64, generator)
    k, v = (made(layout, keys, 64, torch.float64, generator) for _ in "kv")
    g = made(of_gradient, 6, 64, torch.float64, generator)
    out, lse = flash_attention_4._attention(q, k, v, causal=causal, scale=scale)
    found = out, *flash_attention_4._gradients(g, q, k, v, out, lse, causal=causal, scale=scale)
    for a, wanted in zip(found, with_autograd(q, k, v, g, is_causal=causal, scale=scale), strict=True):
        assert error(a, wanted) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_returned_is_what_compiled_code_expects(package, layout):
    """It goes by torch's account of the operators: sizes, strides and types, without running them."""
    package()
    forward, backward = OPERATORS
    q, k, v, g = (made(layout, 6, 64, torch.bfloat16, torch.Generator().manual_seed(2)) for _ in "qkvg")

    def described(answer):
        return [(t.shape, t.stride(), t.dtype) if isinstance(t, torch.Tensor) else t for t in answer]

    def meta(t):
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

    found = flash_attention_4._forward(Original(), None, q, k, v)
    wanted = forward(meta(q), meta(k), meta(v))
    about = described(found)
    about[1] = (*about[1][:2], torch.float32)  # here it is more exact than the package's
    assert about == described(wanted)
    out, lse, *others, _ = found
    gradients = flash_attention_4._backward(
        Original(), None, g, q, k, v, out, lse, *others[:4], 0.0, False, *others[4:]
    )
    own = [meta(t) for t in (g, q, k, v, out, lse)]
    assert described(gradients) == described(backward(*own, *others[:4], 0.0, False, *map(meta, others[4:])))


def test_torchs_operators_take_what_is_handed_on():
    names = [[a.name for a in each.default._schema.arguments] for each in OPERATORS]
    assert names[0] == ["query", "key", "value", "dropout_p", "is_causal", "return_debug_mask", "scale"]
    assert names[1][:6] == ["grad_out", "query", "key", "value", "out", "logsumexp"]
    assert names[1][-5:] == ["dropout_p", "is_causal", "philox_seed", "philox_offset", "scale"]


def both_passes(q, k, v, dropout=0.0, mask=False):
    """What is called of torch's own: the ways there and back."""
    own, lse = Original(), torch.zeros(q.shape[:3])
    flash_attention_4._forward(own, "keys", q, k, v, dropout, False, mask, scale=0.5)
    flash_attention_4._backward(own, "keys", q, q, k, v, q, lse, None, None, 6, 6, dropout, False, lse, lse, scale=0.5)
    return own.calls


def test_what_it_does_not_take_goes_to_torchs_own_kernel_as_it_came(package):
    installed, generator = package(), torch.Generator().manual_seed(3)
    q, k, v = (made("transposed", 6, 64, torch.bfloat16, generator) for _ in "qkv")
    assert both_passes(q, k, v) == []
    used = len(installed.calls)
    others = [made("transposed", 6, dim, torch.bfloat16, generator) for dim in (16, 96, 256)]
    for q1, k1, v1 in (
        *((t, t, t) for t in others),  # heads of another size
        (q, k, v[..., :32]),  # of two sizes
        (q, k[:, :1], v[:, :1]),  # several to one
        (q[:, :, :0], k, v),
        (q, k[:, :, :0], v[:, :, :0]),
        (q.float(), k.float(), v.float()),
    ):
        ahead, back = both_passes(q1, k1, v1)
        assert ahead[0][0] == back[0][0] == "keys" and ahead[1] == back[1] == {"scale": 0.5}
        assert all(a is b for a, b in zip(ahead[0][1:4], (q1, k1, v1), strict=True)) and ahead[0][4:] == (
            0.0,
            False,
            False,
        )
        assert len(back[0]) == 15 and all(a is b for a, b in zip(back[0][2:5], (q1, k1, v1), strict=True))
    assert len(both_passes(q, k, v, dropout=0.1)) == 2
    assert len(installed.calls) == used


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_tried_once_for_each_kind_of_call(package, caplog, dtype, causal):
    installed = package()
    q = made("apart", 6, 128, dtype, torch.Generator().manual_seed(4))
    assert flash_attention_4._supports(q, q, q, causal=causal) and flash_attention_4._supports(q, q, q, causal=causal)
    assert installed.calls == ["forward", "backward"] and not caplog.messages


def test_a_fixed_order_of_sums_is_asked_for_where_torch_is_to_keep_one(package):
    installed = package()
    torch.use_deterministic_algorithms(True)
    try:
        assert flash_attention_4._is_correct(64, torch.bfloat16, torch.device("cpu"), False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert installed.calls[-1] == "backward, deterministic"


@pytest.mark.parametrize("off", [0.1, math.nan])
def test_wrong_numbers_are_told_once_and_not_used(package, caplog, off):
    package(off=off)
    q = made("transposed", 6, 64, torch.bfloat16, torch.Generator().manual_seed(5))
    assert len(both_passes(q, q, q)) == 2 and len(both_passes(q, q, q)) == 2
    (message,) = caplog.messages
    assert "from what plain torch gives" in message and "torch's own attention is used" in message


@pytest.mark.parametrize("kind", ["its own", RuntimeError, ValueError, AssertionError, ImportError, OSError, KeyError])
def test_where_it_cannot_run_that_is_told_once_and_torchs_own_is_used(package, caplog, kind):
    installed = package()
    installed.raises = (flash_attention_4._problems()[0] if kind == "its own" else kind)("no such device")
    q = made("transposed", 6, 64, torch.bfloat16, torch.Generator().manual_seed(6))
    assert len(both_passes(q, q, q)) == 2
    (message,) = caplog.messages
    assert "does not run on this device" in message and "no such device" in message


@pytest.mark.parametrize("family", ["flux", "flux2", "sd3", "sdxl", "z_image", "qwen_image", "krea2"])
def test_it_suits_models_whose_heads_it_takes_and_where_it_is_right(package, caplog, monkeypatch, family):
    full = {"sdxl": {"block_out_channels": (64, 128, 256)}}.get(family, {})  # heads as wide as published ones
    monkeypatch.setitem(step.SMALL, family, step.SMALL[family] | full)
    model = step.denoiser(family, small=True)
    installed = package()
    assert flash_attention_4.supports_model(model, torch.bfloat16, "cpu") and not flash_attention_4.supports_model(
        model, torch.float32, "cpu"
    )
    assert len(installed.calls) == 2  # of one size
    assert not flash_attention_4.supports_model(torch.nn.Linear(2, 2), torch.bfloat16, "cpu") and not caplog.messages
    package(off=0.1)
    assert not flash_attention_4.supports_model(model, torch.bfloat16, "cpu") and len(caplog.messages) == 1


def test_want_of_memory_is_no_reason_to_do_without_it(package, caplog):
    """The engine gives something up and tries again."""
    installed = package(raises=torch.OutOfMemoryError("full"))
    q = made("transposed", 6, 64, torch.bfloat16, torch.Generator().manual_seed(7))
    with pytest.raises(torch.OutOfMemoryError):
        both_passes(q, q, q)
    installed.raises = None
    assert both_passes(q, q, q) == [] and not caplog.messages


def test_what_flash_attention_cannot_compute_goes_where_it_went_before(package, monkeypatch):
    package()
    monkeypatch.setattr(torch.library, "get_kernel", lambda *_names: None)  # of a GPU; nothing here calls it
    before = torch._C._get_sdp_priority_order()
    cudnn, flash, efficient, plain, other = of_torch = [3, 1, 2, 0, 4]  # on compute capability 9.0
    torch._C._set_sdp_priority_order(of_torch)
    try:
        flash_attention_4.set_enabled(True)
        assert torch._C._get_sdp_priority_order() == [flash, cudnn, efficient, plain, other]
        assert torch.backends.cuda.cudnn_sdp_enabled()  # a mask needs it
        flash_attention_4.set_enabled(False)
        assert torch._C._get_sdp_priority_order() == of_torch
    finally:
        flash_attention_4.set_enabled(False)
        torch._C._set_sdp_priority_order(before)


@pytest.mark.parametrize("found", ["nothing", "what breaks"])
def test_without_a_package_that_loads_all_is_as_it_was(monkeypatch, caplog, tmp_path, found):
    (tmp_path / "broken.py").write_text("raise RuntimeError('built for another torch')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        flash_attention_4, "MODULE", "broken" if found == "what breaks" else "no_such_package.interface"
    )
    flash_attention_4._module.cache_clear()
    try:
        flash_attention_4.set_enabled(True)
        flash_attention_4.set_enabled(True)
        assert not flash_attention_4._registered and torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        flash_attention_4.set_enabled(False)
        flash_attention_4._module.cache_clear()
    (message,) = caplog.messages
    assert "cannot be loaded: torch's own attention is used" in message
    assert ("another torch" if found == "what breaks" else "no_such_package") in message


def test_the_log_of_a_resumed_run_says_that_attention_is_another(caplog, tmp_path):
    state = state_files.State(3, tmp_path, {"made_by": resume.made_by("native"), "essence": {}})
    _warn_of_other_software(state, EnginePlan(attention="native"))
    assert not caplog.messages
    _warn_of_other_software(state, EnginePlan(attention="flash_4"))
    (message,) = caplog.messages
    assert "PARAMS_ATTENTION native, and this is flash_4: the result will not be bit-identical" in message
