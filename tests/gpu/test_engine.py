"""The engine on an accelerator: its kernels against plain torch, and what is kept on the host against what is not."""

import contextlib
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.engine.cuda_graphs import EagerStep, GraphStep
from trainer.engine.execution import Engine
from trainer.engine.kernels import reference
from trainer.engine.memory import checkpointing
from trainer.engine.memory.activation_offload import ActivationOffload
from trainer.engine.quantization import formats
from trainer.spec.adapter_columns import padding_for

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
TYPES = [torch.float8_e4m3fn, torch.int8]


def same_bits(a, b):
    return (a.view(torch.int8) == b.view(torch.int8)).float().mean().item()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("with_column_scales", [False, True])
@pytest.mark.parametrize("width", [64, 640, 3072, 15360])
def test_quantize_rows_is_as_in_plain_torch(width, with_column_scales, dtype):
    from trainer.engine.kernels import quantize_triton

    x = torch.randn(300, width, device="cuda").bfloat16()
    x[3], x[5, 7], x[9, 1] = 0, float("inf"), 1e30
    column_scales = torch.rand(1, width, device="cuda") + 0.1 if with_column_scales else None
    values, scale = quantize_triton.quantize_rows(x, column_scales, dtype)
    wanted, wanted_scale = reference.quantize_rows(x, column_scales, dtype)
    assert same_bits(values, wanted) > 0.998  # a division may round a value to its other neighbour
    assert torch.allclose(scale, wanted_scale, rtol=1e-6) and (values.float() * scale).isfinite().all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(9216, 3072), (100, 64), (33, 17)])
def test_dequantize_rows_has_the_bits_of_plain_torch(shape, dtype):
    from trainer.engine.kernels import quantize_triton

    values, scale = reference.quantize_rows(torch.randn(shape, device="cuda"), None, dtype)
    for kind in (torch.bfloat16, torch.float16):
        given = values, scale.t().contiguous(), kind
        assert quantize_triton.can_dequantize(values) and torch.equal(
            quantize_triton.dequantize_rows(*given), reference.dequantize_rows(*given)
        )


@pytest.mark.parametrize("padding", [0, 48])
@pytest.mark.parametrize("shape", [(9216, 3072), (100, 64), (33, 17)])
def test_transpose_is_as_in_plain_torch(shape, padding):
    from trainer.engine.kernels import quantize_triton

    w = torch.randint(-127, 127, shape, device="cuda", dtype=torch.int8)
    w_NK = w[:, : shape[1] - padding // 6]  # rows of a wider matrix
    found = quantize_triton.transpose(w_NK, padding)
    assert torch.equal(found[:, : shape[0]], w_NK.t()) and found.shape[1] == shape[0] + padding


@pytest.mark.parametrize("rank", [1, 5, 16, 64])
def test_adapter_columns_are_as_in_plain_torch(rank):
    """Both sides to the bit. The LoRA term, where it is as large as the rest, is as precise in the product as bf16."""
    from trainer.engine.kernels import quantize_triton

    torch.manual_seed(0)
    (m, n, k), dtype = (300, 1024, 768), torch.float8_e4m3fn
    x, w = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda") * 0.05
    down, up = (
        torch.randn(rank, k, device="cuda").bfloat16() / k**0.5,
        torch.randn(n, rank, device="cuda").bfloat16() * 0.2,
    )
    padding = padding_for(rank, k)
    h = x @ down.t()
    x8, x_scale = quantize_triton.quantize_rows(x, None, dtype, padding)
    w8, w_scale = reference.quantize_weight(w, dtype)
    w8 = reference.pad_columns(w8, padding)
    plain = formats.fp8_product(x8, x_scale, w8, w_scale, None, None, None, k, formats.FORWARD_UP_FACTOR)
    other = x8.clone(), w8.clone()
    found = formats.fp8_product(x8, x_scale, w8, w_scale, None, h, up, k, formats.FORWARD_UP_FACTOR)
    reference.append_adapter_columns(other[0], x_scale, h, other[1], w_scale, up, k, formats.FORWARD_UP_FACTOR)
    written = slice(k, None)
    for ours, theirs in zip((x8, w8), other, strict=True):
        assert same_bits(ours[:, written].contiguous(), theirs[:, written].contiguous()) > 0.998
    wanted = h.double() @ up.double().t()
    assert ((found.double() - plain.double()) - wanted).norm() < 6e-3 * (wanted + plain.double()).norm()


@pytest.mark.parametrize("rows", [1, 77, 192, 2048])
@pytest.mark.parametrize("width", [640, 5120, 15360])
def test_an_fp8_product_has_a_bias_at_any_number_of_rows(width, rows):
    """cuBLAS has no kernel for some of these sizes: SDXL's second MLP layers on small images."""
    padding, n = padding_for(16, width), 640
    x, w = torch.randn(rows, width, device="cuda").bfloat16(), torch.randn(n, width, device="cuda") * 0.05
    bias, h = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((n,), (rows, 16)))
    up = torch.randn(n, 16, device="cuda").bfloat16() * 0.02
    x8, x_scale = reference.quantize_rows(x, None, torch.float8_e4m3fn, padding)
    w8, w_scale = reference.quantize_weight(w, torch.float8_e4m3fn)
    values = (x8[:, :width].double() * x_scale) @ (w8.double() * w_scale.t()).t() + h.double() @ up.double().t()
    w8 = reference.pad_columns(w8, padding)
    found = formats.fp8_product(x8, x_scale, w8, w_scale, bias, h, up, width, formats.FORWARD_UP_FACTOR)
    assert ((found.double() - values - bias.double()).norm() / values.norm()).item() < 1e-2


@pytest.mark.parametrize("width", [100, 3072])
def test_gated_residual_is_as_in_plain_torch(width):
    from trainer.engine.kernels import quantize_triton

    x, y = (torch.randn(3, 77, width, device="cuda").bfloat16() for _ in "xy")
    gate = torch.randn(3, 2 * width, device="cuda").bfloat16()[:, width:]
    for given in (
        (x, gate, y),
        (None, gate, y),
        (x[:, 5:], gate, y[:, 5:]),
        (x.transpose(1, 2).contiguous().transpose(1, 2), gate, y),
    ):
        assert torch.equal(quantize_triton.gated_residual(*given), reference.gated_residual(*given))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("policy", ["all", "attention", "none"])
def test_what_waits_on_the_host_comes_back_whole(policy, compiled):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(512, 512)

        def forward(self, x):
            q = self.q(x).unflatten(-1, (8, 64)).transpose(1, 2)
            return x + torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Block() for _ in range(4))).cuda().bfloat16()
    checkpointing.apply(model, [policy] * 4, compiled=compiled)
    x = torch.randn(4, 1024, 512, device="cuda").bfloat16().requires_grad_()
    offload, found = ActivationOffload(model, smallest=2**18), []
    for _ in range(3):
        model(x).float().square().mean().backward()
        wanted, x.grad = x.grad, None
        with offload:
            loss = model(x).float().square().mean()
        loss.backward()
        found.append((x.grad, wanted))
        x.grad = None
    # Not to the bit: attention's backward pass adds in no fixed order.
    assert all((a - b).norm() < 1e-2 * b.norm() for a, b in found) and offload.free


@pytest.mark.parametrize("recorded", [False, True])
def test_what_waits_on_the_host_takes_no_memory_and_gives_the_same_bits(recorded):
    torch.manual_seed(0)
    block = lambda: torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))  # noqa: E731
    model = torch.nn.Sequential(*(block() for _ in range(32))).cuda().bfloat16()
    params, offload = list(model.parameters()), ActivationOffload(model, smallest=2**18)

    def steps(around):
        def work(given):
            with around:
                found = model(given["x"]).float().square().mean()
            return found, found

        runner = (GraphStep if recorded else EagerStep)(params)
        random, found = torch.Generator("cuda").manual_seed(1), []
        for rows in (8192, 8192, 4096, 8192, 8192):
            runner.clear()
            runner(work, {"x": torch.randn(rows, 256, device="cuda", generator=random).bfloat16()})
            found.append(runner.flat_grad.clone())
        torch.cuda.synchronize()
        runner.clear()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if not recorded:
            runner(work, {"x": torch.randn(8192, 256, device="cuda", generator=random).bfloat16()})
            torch.cuda.synchronize()
        assert not recorded or (not runner.short_of_memory and all(runner.captured.values()))
        held = torch.cuda.memory_reserved() if recorded else torch.cuda.max_memory_allocated() - before
        runner.release()
        return found, held

    (wanted, whole), (found, less) = steps(contextlib.nullcontext()), steps(offload)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert less < (0.75 if recorded else 0.4) * whole
    assert sum(map(len, offload.free)) == sum(map(len, offload.buffers))  # all have come back


def test_a_pass_that_fails_leaves_nothing_on_the_device():
    """GroupNorm keeps its own results, the means; in a pass that is not run back nobody else lets them go."""
    gc.collect()  # what tests before this one have left
    before = torch.cuda.memory_allocated()
    norm = torch.nn.GroupNorm(4, 64).cuda()
    offload = ActivationOffload(norm, smallest=2**18)
    x = torch.randn(4, 64, 64, 64, device="cuda")
    with pytest.raises(torch.OutOfMemoryError), offload:
        for _ in range(3):
            x = norm(x)
        raise torch.OutOfMemoryError
    offload.join()
    del x, norm, offload
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_are_streamed_give_the_same_step(compiled):
    from trainer.spec.plan import EnginePlan

    def gradients(offload):
        torch.manual_seed(0)
        layers = [torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.Linear(2048, 512)) for _ in range(5)]
        model = torch.nn.Sequential(*layers).cuda().bfloat16().requires_grad_(False)
        torch.compiler.reset()
        engine = Engine(model, layers, EnginePlan("cuda", recompute="all", offload=offload, compile=compiled))
        x, found = torch.randn(64, 512, device="cuda").bfloat16().requires_grad_(), []
        for _ in range(3):
            with engine.saved_tensors():
                loss = model(x).float().square().mean()
            loss.backward()
            found.append(x.grad)
            x.grad = None
        return found

    assert all(torch.equal(a, b) for a, b in zip(gradients("none"), gradients("weights"), strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_replayed_step_has_the_gradient_of_one_that_is_launched(compiled):
    torch.manual_seed(0)
    torch.compiler.reset()
    layers = [torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)) for _ in "abc"]
    model = torch.nn.Sequential(*layers, torch.nn.Dropout(0.5)).cuda()
    for layer in layers:
        layer.compile() if compiled else None
    params = list(model.parameters())

    def work(given):
        each = (model(given["x"]) - given["y"]).square().mean(1)
        return each, each.sum() * given["share"]

    def steps(runner):
        torch.cuda.manual_seed(5)
        random, found = torch.Generator("cuda").manual_seed(1), []
        for rows, drop in ((8, False), (8, False), (4, False), (8, True), (8, False)):
            runner.clear()
            if drop:
                runner.release()
            for _ in range(2):  # accumulated
                x, y = (torch.randn(rows, 256, device="cuda", generator=random) for _ in "xy")
                told = runner(work, {"x": x, "y": y, "share": torch.full((), 0.25, device="cuda")})
            found.append([told.clone(), *(p.grad.clone() for p in params)])
        return found

    replayed, launched = steps(GraphStep(params)), steps(EagerStep(params))
    for a, b in zip(replayed, launched, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def blocks(count=24, width=512):
    layers = []
    for _ in range(count):
        layers += [torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)]
    return torch.nn.Sequential(*layers).cuda().bfloat16()


def test_graphs_of_ten_sizes_take_the_memory_of_one_and_give_the_launched_bits():
    torch.manual_seed(0)
    model = blocks()
    params = list(model.parameters())

    def work(given):
        found = model(given["x"]).float().square().mean()
        return found[None], found

    inputs = [torch.randn(8192 - 512 * i, 512, device="cuda").bfloat16() for i in range(10)]
    captured, launched = GraphStep(params, warms_up_each=lambda: False), EagerStep(params)
    held = []
    for x in inputs:
        captured(work, {"x": x})
        held.append(torch.cuda.memory_reserved())
    assert len(captured.captured) == 10 and max(held) < 1.05 * held[0]
    captured.comparing = True
    for x in inputs:
        captured(work, {"x": x})
    assert captured.capturing
    captured.comparing = False
    for x in reversed(inputs):
        captured.clear()
        captured(work, {"x": x})
        replayed = captured.flat_grad.clone()
        launched.clear()
        launched(work, {"x": x})
        assert torch.equal(replayed, launched.flat_grad)
    reserved = torch.cuda.memory_reserved()
    captured.release()
    assert torch.cuda.memory_reserved() < 0.7 * reserved


def test_pictures_between_captured_steps_are_those_drawn_without_them():
    """What is kept from pass to pass is not overwritten by a replay, and steps go on as before."""
    torch.manual_seed(0)
    model, decoder = blocks(), blocks(8)
    params = list(model.parameters())
    decoder.decode = decoder.forward

    def work(given):
        found = model(given["x"]).float().square().mean()
        return found[None], found

    def draw(count):
        drawn = []
        with torch.no_grad():
            for seed in range(count):
                latents = torch.randn(2048, 512, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
                for _ in range(6):
                    kept = [latents * factor for factor in (0.5, 0.25)]  # allocated between two passes
                    latents = kept[0] + kept[1] + model(latents.bfloat16()).float()
                drawn.append(decoder.decode(latents.bfloat16()).clone())
        return drawn

    x = {"x": torch.randn(8192, 512, device="cuda").bfloat16()}
    wanted = draw(3)
    runner = GraphStep(params)
    for _ in range(2):
        runner.clear()
        runner(work, x)
        before = runner.flat_grad.clone()
        with runner.sampling(model, decoder):
            found = draw(3)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert runner.capturing and len(runner.captured) == 1 and len(runner.calls.captured) == 1
        runner.clear()
        runner(work, x)
        assert torch.equal(runner.flat_grad, before)


@pytest.mark.parametrize("compiled", [False, True])
def test_after_a_recording_that_fails_random_numbers_are_drawn(compiled):
    """The compiler draws some, to measure kernels with; torch's generator would still wait for the end of a capture."""
    params = [torch.nn.Parameter(torch.ones(8, device="cuda"))]

    def work(given):
        if torch.cuda.is_current_stream_capturing():
            torch.empty(2**50, device="cuda", dtype=torch.int8)
        found = (params[0] * given["x"]).sum()
        return found, found

    runner = GraphStep(params)
    for _ in range(2):
        runner(work, {"x": torch.ones(8, device="cuda")})
    assert runner.short_of_memory and torch.equal(params[0].grad, torch.full((8,), 2.0, device="cuda"))
    drop = torch.nn.Dropout(0.5)
    assert (torch.compile(drop) if compiled else drop)(torch.rand(8, device="cuda")).isfinite().all()


def test_a_job_on_the_accelerator_leaves_a_verified_lora(tmp_path):
    concept = ROOT / "trainer" / "families" / "miniatures" / "concept"
    settings = {
        "BASE_MODEL": "mini-flux", "DATASET_NAME": str(concept), "OUTPUT_PATH": str(tmp_path / "out"),
        "CACHE_PATH": str(tmp_path / "cache"), "OUTPUT_NAME": "x", "PARAMS_MAX_STEPS": "6", "TRIGGER_WORD": "",
        "PARAMS_SAVE_EVERY_N_STEPS": "3", "PARAMS_OPTIMIZER_TYPE": "adamw",
        "SAMPLE_PROMPTS": str(concept / "prompts.txt"),
        "PARAMS_SAMPLE_EVERY_N_STEPS": "6", "PARAMS_PRECISION": "fp8",
    }  # fmt: skip
    job = subprocess.run(
        [sys.executable, "-m", "entrypoint"], cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True
    )
    assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-3000:]
    assert (tmp_path / "out" / "x.safetensors").is_file() and (tmp_path / "out" / "sample").is_dir()
    assert "read back" in job.stderr  # where the log goes
