"""Fused kernels on a GPU: each against plain torch, and whole blocks against diffusers' blocks."""

import pytest
import torch

from bench import step
from trainer.engine.kernels import reference as quantize
from trainer.engine.kernels import self_test

pytestmark = pytest.mark.gpu
FP8 = torch.float8_e4m3fn
WIDTHS = [64, 640, 1280, 1536, 3072, 6144]  # features of the families' models, and a power of two


def error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def normal(*shape, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator).bfloat16()


def agree(kernel, reference, options):
    """Values, scales and rows are those of plain torch, and the values and scales are those of the rows.

    With padding and without, with rows and without, and each time the same.
    """
    values, scale, rows = kernel(*options, True)
    for keep_rows, padding in ((True, 0), (False, 48)):
        again = kernel(*options, keep_rows, padding)
        assert again[0].shape[1] == values.shape[1] + padding and torch.equal(again[1], scale)
        assert torch.equal(again[0][:, : values.shape[1]].view(torch.int8), values.view(torch.int8))
    wanted = reference(*options, True)
    assert error(rows, wanted[2]) < 1e-3 and error(values.float() * scale, wanted[0].float() * wanted[1]) < 0.01
    quantised, own_scale = quantize.quantize_rows(rows, None, values.dtype)
    assert (values.view(torch.int8) == quantised.view(torch.int8)).float().mean() > 0.998
    assert torch.allclose(scale, own_scale, rtol=1e-6)


def test_the_self_test_passes():
    assert self_test.agree("cuda", FP8)


@pytest.mark.parametrize("plus", [0.0, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_rows_is_as_in_plain_torch(width, plus):
    from trainer.engine.kernels import norm_gelu_triton

    x, scale, shift = normal(300, width) * 3 + 1, normal(2, 6 * width)[:, width : 2 * width], normal(2, width, seed=1)
    x[3], x[5, 7] = 0, 1e10
    agree(norm_gelu_triton.norm_rows, quantize.norm_rows, (x, scale, shift, plus, 1e-6, True, FP8))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_gradient_is_as_in_plain_torch(width, count):
    from trainer.engine.kernels import norm_gelu_triton

    x, scale, shift = normal(300, width) * 3 + 1, normal(2, width), normal(2, width, seed=1)
    gs = [*(normal(300, width, seed=2 + i) for i in range(count)), *[None] * (3 - count)]
    options = (x, scale, shift, 1.0, 1e-6, True, *gs, normal(300, width, seed=9))
    found, wanted = norm_gelu_triton.norm_gradient(*options, True), quantize.norm_gradient(*options, True)
    assert error(found[0], wanted[0]) < 2e-3 and error(found[1], wanted[1]) < 1e-3
    assert torch.equal(norm_gelu_triton.norm_gradient(*options, False)[0], found[0])


@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("left", [0, 48, 3072])
@pytest.mark.parametrize("width", [100, 2560, 12288])
def test_gelu_rows_and_their_gradient_are_as_in_plain_torch(width, left, geglu):
    from trainer.engine.kernels import norm_gelu_triton

    y, before = normal(300, width * (1 + geglu)) * 2, normal(300, left, seed=1) if left else None
    y[3], y[5, 7] = 0, 100
    agree(norm_gelu_triton.gelu_rows, quantize.gelu_rows, (before, y, geglu, FP8))
    options = (before, y, normal(300, left + width, seed=2), geglu)
    found, wanted = norm_gelu_triton.gelu_gradient(*options, True), quantize.gelu_gradient(*options, True)
    assert error(found[0], wanted[0]) < 2e-3 and torch.equal(found[1], wanted[1]) and error(found[2], wanted[2]) < 1e-3
    assert all(map(torch.equal, norm_gelu_triton.gelu_gradient(*options, False)[:2], found[:2]))


@pytest.mark.parametrize("wider", [0, 96])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("heads", "dim"), [(24, 128), (3, 16)])
def test_norm_and_rotary_embedding_are_as_in_plain_torch(heads, dim, several, wider):
    """`wider`: features that follow in each row of the layer's output, of which q, k and v are views."""
    from trainer.engine.kernels import rope_reference, rope_triton

    lengths = (100, 33) if several else (133, 0)
    width = 3 * heads * dim
    first, second = (normal(2, n, width + wider, seed=n)[..., :width] if n else None for n in lengths)
    norms = [normal(dim, seed=i) for i in range(4)]
    more = norms[2:] if several else [None, None]
    cos_sin = [normal(133, dim, seed=7 + i).float() for i in range(2)]
    options = (first, *norms[:2], second, *more, *cos_sin, 1e-6)
    for found, wanted in zip(rope_triton.rotate(*options), rope_reference.rotate(*options), strict=True):
        assert found.shape == wanted.shape and (not wanted.numel() or error(found, wanted) < 1e-3)
    gs = [normal(2, 133, heads, dim, seed=20 + i) for i in range(3)]
    sources = [(first, norms[:2], 0), *([(second, norms[2:], lengths[0])] if several else [])]
    for source, weights, offset in sources:
        options = (source, *weights, *cos_sin, *gs, offset, 1e-6)
        found, wanted = rope_triton.rotate_gradient(*options), rope_reference.rotate_gradient(*options)
        assert error(found, wanted) < 2e-3


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norms_are_as_in_plain_torch(width, count, shifted):
    from trainer.engine.kernels import norm_gelu_triton

    x, weight = normal(300, width) * 3 + 1, normal(2, width).float()
    norm = (x, weight, normal(2, width, seed=1) if shifted else None, 0.0, 1e-6, False)
    agree(norm_gelu_triton.norm_rows, quantize.norm_rows, (*norm, FP8))
    gs = [*(normal(300, width, seed=2 + i) for i in range(count)), *[None] * (3 - count)]
    for residual in (None, normal(300, width, seed=9)):
        options = (*norm, *gs, residual, True)
        found, wanted = norm_gelu_triton.norm_gradient(*options), quantize.norm_gradient(*options)
        assert error(found[0], wanted[0]) < 2e-3 and error(found[1], wanted[1]) < 1e-3
    options = (normal(2, 150, width, seed=5), x.view(2, 150, width), weight, 1e-6)
    assert error(norm_gelu_triton.norm_residual(*options), quantize.norm_residual(*options)) < 2e-3


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("left", [0, 48, 3072])
@pytest.mark.parametrize("width", [100, 2560, 9216, 16384])
def test_swiglu_and_its_gradient_are_as_in_plain_torch(width, left, joined, silu):
    from trainer.engine.kernels import swiglu_triton

    both, before = normal(300, 2 * width) * 2, normal(300, left, seed=1) if left else None
    both[3], both[5, 7] = 0, 100
    a, b = both.chunk(2, -1) if joined else (half.contiguous() for half in both.chunk(2, -1))
    agree(swiglu_triton.swiglu_rows, quantize.swiglu_rows, (before, a, b, silu, FP8))
    options = (before, a, b, silu, normal(300, left + width, seed=2))
    found, wanted = swiglu_triton.swiglu_gradient(*options, True), quantize.swiglu_gradient(*options, True)
    assert all(error(*pair) < 2e-3 for pair in zip(found, wanted, strict=True) if pair[1].numel())
    assert all(map(torch.equal, swiglu_triton.swiglu_gradient(*options, False)[:3], found[:3]))


@pytest.mark.parametrize(("images", "tokens"), [(1, 133), (2, 133), (1, 1)])  # that have rotations of their own
@pytest.mark.parametrize(("heads", "dim"), [(30, 128), (12, 128), (3, 16)])
def test_rotated_heads_are_as_in_plain_torch(heads, dim, images, tokens):
    from trainer.engine.kernels import rope_reference, rope_triton

    given = normal(2, 133, heads * dim), normal(dim, seed=1), normal(images, tokens, dim // 2, 2, seed=2).float()
    g = normal(2, 133, heads, dim, seed=3)
    found, wanted = (module.rotate_heads(*given, 1e-6) for module in (rope_triton, rope_reference))
    assert found.shape == wanted.shape and error(found, wanted) < 1e-3
    found, wanted = (module.rotate_heads_gradient(*given, g, 1e-6) for module in (rope_triton, rope_reference))
    assert found.shape == wanted.shape and error(found, wanted) < 2e-3


FULL_WIDTH = {
    "flux": {"num_layers": 1, "num_single_layers": 2},
    "flux2": {"num_layers": 1, "num_single_layers": 2},
    "krea2": {"num_layers": 2, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
    "qwen_image": {"num_layers": 2},
    "sd3": {"num_layers": 2},
    "sdxl": {"transformer_layers_per_block": (1, 1, 1), "layers_per_block": 1},
    "z_image": {"n_layers": 2, "n_refiner_layers": 1},
}


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in FULL_WIDTH for way in ("none+eager", "none", "all")]
    + [
        ("flux", "products"),
        ("flux", "attention"),
        ("flux", "all+eager"),
        ("flux2", "products"),
        ("flux2", "all+eager"),
    ]
    + [(name, way) for name in ("krea2", "qwen_image") for way in ("products", "all+eager", "none+eager+masked")],
)
def test_fused_blocks_give_adapters_gradients_as_good_as_diffusers_blocks_do(name, way, monkeypatch):
    monkeypatch.setitem(step.SMALL, name, FULL_WIDTH[name])
    monkeypatch.delitem(step.SMALL_TEXT, name, raising=False)  # the text has its full width too

    def gradients(precision, way):
        bench = step.Bench(name, precision, small=True)
        bench.backward(bench.engine(set(way.split("+"))), 2)
        return [p.grad.flatten().double() for p in bench.params if p.grad is not None]

    mask = "+masked" if "masked" in way else ""
    exact, plain = (gradients(*of) for of in (("bf16", f"none+eager{mask}"), ("fp8", f"none+eager+plain{mask}")))
    ours = gradients("fp8", way)
    used = [i for i, g in enumerate(exact) if g.norm() > 0]
    off, wanted = (sorted(error(g[i], exact[i]) for i in used) for g in (ours, plain))
    for share in (0.5, 0.9):  # of adapters
        a, b = (errors[int(share * len(errors))] for errors in (off, wanted))
        print(name, way, share, a, "plain:", b)
        assert a < 1.15 * b < 0.4


@pytest.mark.parametrize("name", ["krea2", "qwen_image", "z_image"])
def test_a_step_of_captions_of_other_lengths_is_captured(name):
    bench = step.Bench(name, "fp8", small=True)
    engine = bench.engine({"none", "eager", "masked", "replay"})
    for _ in range(2):
        bench.backward(engine, 2)
    assert bench.runner.capturing and len(bench.runner.captured) == 1
