"""Attention as jobs run it on this device: right at every length, and nothing beside its inputs is read."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from entrypoint.fetch.flash_attention import version
from entrypoint.system.hardware import detect
from trainer.engine.attention import flash_attention_4
from trainer.engine.attention.cudnn_fix import apply_fix

pytestmark = pytest.mark.gpu
HEADS, BESIDE = 3, 2**20
# Those of a text alone; Flux.1's at 320 x 192, 512 x 512 and 640 x 640; SD3's at 1024 x 1024. Kernels work on blocks of
# 64 or 128 tokens, and what is left over after them is where they were wrong before (pytorch/pytorch#196678).
TOKENS = [77, 752, 1536, 2112, 4429]


@pytest.fixture(params=["native", "flash_4"], autouse=True)
def kind(request):
    """Whose attention runs."""
    if request.param == "flash_4" and not (version() and detect().runs_flash_4):
        pytest.skip("it is not installed, or not for this device")
    flash_attention_4.set_enabled(request.param == "flash_4")
    yield request.param
    flash_attention_4.set_enabled(False)


def placed(tokens, dim, generator):
    """(2, heads, tokens, dim) as blocks hand it over, between numbers that are none."""
    shape = (2, tokens, HEADS, dim)
    room = torch.full((2 * BESIDE + 2 * tokens * HEADS * dim,), float("nan"), device="cuda", dtype=torch.bfloat16)
    inside = room[BESIDE:-BESIDE].view(shape)
    inside.copy_(torch.randn(shape, device="cuda", generator=generator))
    return inside.transpose(1, 2)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_and_its_gradients_are_those_of_full_precision(tokens, dim):
    generator = torch.Generator("cuda").manual_seed(tokens)
    q, k, v, g = (placed(tokens, dim, generator) for _ in "qkvg")
    found, wanted = [], []
    for results, dtype, backends in (
        (found, torch.bfloat16, None),
        (wanted, torch.float32, [SDPBackend.MATH]),
    ):
        given = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        if backends is None:
            out = scaled_dot_product_attention(*given)
        else:
            with sdpa_kernel(backends):
                out = scaled_dot_product_attention(*given)
        results += [out, *torch.autograd.grad(out, given, g.to(dtype))]
    for a, b in zip(found, wanted, strict=True):
        assert a.isfinite().all() and (a.float() - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_may_be_laid_out_in_any_way(compiled):
    """As Flux.1's blocks lay it out: a part of longer rows, or rows of its own."""
    apply_fix()
    tokens, dim = (1088, 64) if compiled else (1216, 64)  # of a size that nothing else has used

    def attended(q, k, v, extra):
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.cat([out, extra], 2) if extra is not None else out

    run = torch.compile(attended) if compiled else attended
    generator = torch.Generator("cuda").manual_seed(0)
    for more in (4 * HEADS * dim, 0, 3, 8):  # numbers beside it in each row
        q, k, v, g = (placed(tokens, dim, generator) for _ in "qkvg")
        g = g.transpose(1, 2).flatten(2)
        extra = torch.zeros(2, tokens, more, device="cuda", dtype=g.dtype) if more else None
        given = [t.detach().requires_grad_() for t in (q, k, v)]
        wide = g if extra is None else torch.cat([g, extra], 2)
        found = torch.autograd.grad(run(*given, extra), given, wide)
        exact = [t.detach().float().requires_grad_() for t in (q, k, v)]
        with sdpa_kernel([SDPBackend.MATH]):
            wanted = torch.autograd.grad(attended(*exact, None), exact, g.float())
        for a, b in zip(found, wanted, strict=True):
            assert a.isfinite().all() and (a.float() - b).norm() < 2e-2 * b.norm()


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def with_gradients(q, k, v, g, causal=False):
    given = [t.detach().requires_grad_() for t in (q, k, v)]
    out = scaled_dot_product_attention(*given, is_causal=causal)
    return out.detach(), *torch.autograd.grad(out, given, g)


@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_there_may_be_fewer_keys_than_queries(dim):
    """As SDXL's text has; and heads of a size that FlashAttention 4 is not asked for."""
    generator = torch.Generator("cuda").manual_seed(dim)
    q, g = (placed(1024, dim, generator) for _ in "qg")
    k, v = (placed(77, dim, generator) for _ in "kv")
    for found, wanted in zip(
        with_gradients(q, k, v, g), flash_attention_4.reference_attention(q, k, v, g), strict=True
    ):
        assert error(found, wanted) < 1e-2


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_a_token_may_see_those_before_it_alone(dim):
    """As in a text encoder of CLIP."""
    generator = torch.Generator("cuda").manual_seed(dim)
    q, k, v, g = (placed(77, dim, generator) for _ in "qkvg")
    for found, wanted in zip(
        with_gradients(q, k, v, g, True), flash_attention_4.reference_attention(q, k, v, g, causal=True), strict=True
    ):
        assert error(found, wanted) < 1e-2


def test_parts_of_joined_rows_are_read_where_they_lie():
    rows = torch.randn(2, 700, 3 * HEADS * 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = (t.unflatten(2, (HEADS, 64)).transpose(1, 2) for t in rows.chunk(3, 2))
    g = torch.randn(2, 700, HEADS * 64, device="cuda", dtype=torch.bfloat16).unflatten(2, (HEADS, 64)).transpose(1, 2)
    for found, wanted in zip(
        with_gradients(q, k, v, g), flash_attention_4.reference_attention(q, k, v, g), strict=True
    ):
        assert error(found, wanted) < 1e-2


@pytest.mark.parametrize("compiled", [False, True])
def test_it_can_be_recorded(compiled):
    """And reads then what lies there later."""
    generator = torch.Generator("cuda").manual_seed(5)
    q, k, v, g = (placed(1536, 128, generator) for _ in "qkvg")
    run = torch.compile(with_gradients) if compiled else with_gradients
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(q, k, v, g)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(q, k, v, g)
    for t in (q, k, v, g):
        t.copy_(torch.randn(t.shape, device="cuda", generator=generator))
    graph.replay()
    for a, b in zip(found, flash_attention_4.reference_attention(q, k, v, g), strict=True):
        assert error(a, b) < 1e-2


def test_a_mask_goes_to_the_kernel_that_torch_takes_for_it_anyway(kind):
    some = torch.randn(1, HEADS, 256, 128, device="cuda").bfloat16()
    mask = torch.ones(1, 1, 1, 256, device="cuda", dtype=torch.bool)
    chosen, with_mask = (SDPBackend(torch._fused_sdp_choice(some, some, some, m)) for m in (None, mask))
    preferred = SDPBackend.CUDNN_ATTENTION if torch.cuda.get_device_capability()[0] in (9, 10) else None
    assert chosen == (SDPBackend.FLASH_ATTENTION if kind == "flash_4" or not preferred else preferred)
    assert with_mask == (preferred or SDPBackend.EFFICIENT_ATTENTION)


def test_how_fast_it_is(kind):
    """Prints TFLOP/s at the sizes of Flux.1 with four pictures and with one of 512 x 512, and of SD3 with four."""
    for batch, heads, tokens, dim in ((4, 24, 4352, 128), (1, 24, 1536, 128), (4, 24, 4429, 64)):
        q, k, v, g = (torch.randn(batch, tokens, heads, dim, device="cuda").bfloat16().transpose(1, 2) for _ in "qkvg")
        given = [t.requires_grad_() for t in (q, k, v)]
        out = scaled_dot_product_attention(*given)
        operations = 4 * batch * heads * tokens**2 * dim / 1e12
        ahead = seconds(lambda given=given: scaled_dot_product_attention(*given))
        back = seconds(lambda out=out, given=given, g=g: torch.autograd.grad(out, given, g, retain_graph=True))
        there = f"forward {operations / ahead:.0f}, backward {2.5 * operations / back:.0f} TFLOP/s"
        print(f"\n{kind} {batch} x {tokens} x {heads} x {dim}: {there}", end="")


def seconds(work, times=20):
    """Of one of several calls that the device has waiting."""
    for _ in range(3):
        work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times / 1e3


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "masked"])
@pytest.mark.parametrize("shared", [1, 3], ids=["all heads", "grouped heads"])
@pytest.mark.parametrize("tokens", [1984, 4032, 4096])
def test_low_logits_leave_gradients_numbers(tokens, shared, masked, kind):
    """cuDNN's backward pass gives NaN where 64 of 128 keys are left over and a row's logits are all below -88."""
    apply_fix()
    generator = torch.Generator("cuda").manual_seed(tokens)
    q, k, v, g = (placed(tokens, 64, generator) for _ in "qkvg")
    q, k = 0.1 * q, 0.1 * k
    q[..., 0], k[..., 0] = 1.0, -120 * 8.0  # logits of about -120
    k, v = k[:, : HEADS // shared], v[:, : HEADS // shared]
    mask = None
    if masked:
        mask = torch.zeros(2, 1, 1, tokens, device="cuda", dtype=torch.bfloat16)
        mask[1, ..., -100:] = -torch.inf
    results = []
    for dtype, backend in ((torch.bfloat16, SDPBackend.CUDNN_ATTENTION), (torch.float64, SDPBackend.MATH)):
        given = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        with sdpa_kernel(backend):
            bias = mask if mask is None else mask.to(dtype)
            out = scaled_dot_product_attention(*given, attn_mask=bias, enable_gqa=shared > 1)
        results.append([out, *torch.autograd.grad(out, given, g.to(dtype))])
    for found, wanted in zip(*results, strict=True):
        assert found.isfinite().all()
        # The gradient of q's first numbers is zero but for rounding, which keys of -960 magnify.
        found, wanted = found[..., 1:].double(), wanted[..., 1:]
        assert (found - wanted).norm() < 2e-2 * wanted.norm()
