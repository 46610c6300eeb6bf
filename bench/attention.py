"""The kernels of attention that torch can choose from, with FlashAttention 4: speed, error, and what they get wrong.

    python -m bench attention --tokens 4032 4096 4352 --dim 64 128
    python -m bench attention --tokens 4096 --dim 128 --deterministic
    python -m bench attention --tokens 4224 4608 --dim 128 --masked --kernels cudnn efficient

Heads are as many as make a width of 1,280 (dim 64) or 3,072 (dim 128). `error`: the worst relative error of output and
gradients, against float64, with two heads. `again`: whether a second backward pass has the same bits. `negative`:
whether the gradients are numbers where all logits are about -120; cuDNN's backward pass on compute capability 9.0 gives
NaN there, where 64 of 128 keys are left over (NVIDIA/cudnn-frontend#628). `trainer.engine.attention.cudnn_fix` avoids
it; `--as-torch-has-it` shows it. `--deterministic`: with `torch.use_deterministic_algorithms(True)`. `--masked`: the
last 64 keys are left out, as those that fill up a caption are; flash attention, of whatever version, takes no mask.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from bench.report import Report
from trainer.engine.attention import cudnn_fix, flash_attention_4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = {64: 1280, 128: 3072}
TIMES = 10
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FLASH_4 = "flash_4"
MASKED = 64  # keys that `--masked` leaves out


def inputs(tokens: int, dim: int, heads: int) -> list[torch.Tensor]:
    """q, k, v and the output's gradient, (1, heads, tokens, dim), laid out as blocks hand them over."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    made: list[torch.Tensor] = []
    for _ in range(4):
        rows = torch.randn(1, tokens, heads, dim, device=DEVICE, generator=generator)
        made.append(rows.bfloat16().transpose(1, 2))
    return made


def mask_of(k: torch.Tensor) -> torch.Tensor:
    """Which keys count, (1, 1, 1, tokens)."""
    tokens = k.shape[2]
    return (torch.arange(tokens, device=k.device) < tokens - MASKED)[None, None, None]


def both_passes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, kernel: str, masked: bool
) -> list[torch.Tensor]:
    """The output, and the gradients of q, k and v."""
    given = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    with sdpa_kernel(KERNELS.get(kernel, SDPBackend.FLASH_ATTENTION)):
        out = scaled_dot_product_attention(*given, attn_mask=mask_of(k) if masked else None)
        return [out, *torch.autograd.grad(out, given, grad)]


def milliseconds(kernel: str, tensors: list[torch.Tensor], masked: bool) -> tuple[float, float]:
    """Of the forward pass, and of both."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None

    def timed(step: Any) -> float:
        step()
        wait()
        started = time.perf_counter()
        for _ in range(TIMES):
            step()
        wait()
        return (time.perf_counter() - started) / TIMES * 1e3

    q, k, v, _ = tensors
    mask = mask_of(k) if masked else None
    with torch.no_grad(), sdpa_kernel(KERNELS.get(kernel, SDPBackend.FLASH_ATTENTION)):
        forward = timed(lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask))
    return forward, timed(lambda: both_passes(*tensors, kernel, masked))


def worst_error(kernel: str, tokens: int, dim: int, masked: bool) -> float:
    """The worst relative error of the output and the gradients."""
    q, k, v, grad = inputs(tokens, dim, 2)
    left_out = MASKED if masked else 0
    seen = [tensor[:, :, : tokens - left_out] for tensor in (k, v)]
    out, *gradients = flash_attention_4.reference_attention(q, *seen, grad)
    wanted = [out, gradients[0], *(pad(gradient, (0, 0, 0, left_out)) for gradient in gradients[1:])]
    errors: list[float] = []
    for result, reference in zip(both_passes(q, k, v, grad, kernel, masked), wanted, strict=True):
        errors.append(((result.double() - reference).norm() / reference.norm()).item())
    return max(errors)


def is_finite_below_zero(kernel: str, tokens: int, dim: int, masked: bool) -> bool:
    """Whether the gradients are numbers where all logits of all rows are about -120."""
    q, k, v, grad = inputs(tokens, dim, 2)
    q, k = 0.1 * q, 0.1 * k
    q[..., 0], k[..., 0] = 1.0, -120 * math.sqrt(dim)
    return all(bool(result.isfinite().all()) for result in both_passes(q, k, v, grad, kernel, masked))


def measure(kernel: str, tokens: int, dim: int, masked: bool) -> dict[str, Any]:
    """The row of one kernel and size."""
    row: dict[str, Any] = {"kernel": kernel, "tokens": tokens, "dim": dim}
    tensors = inputs(tokens, dim, WIDTHS[dim] // dim)
    try:
        forward, both = milliseconds(kernel, tensors, masked)
        row |= {"forward_ms": round(forward, 3), "backward_ms": round(both - forward, 3)}
        pairs = zip(*(both_passes(*tensors, kernel, masked) for _ in range(2)), strict=True)
        row["again"] = all(torch.equal(a, b) for a, b in pairs)
        row["error"] = f"{worst_error(kernel, tokens, dim, masked):.1e}"
        row["negative"] = is_finite_below_zero(kernel, tokens, dim, masked)
    except RuntimeError as problem:  # the kernel does not take this size, or has no deterministic form
        row["problem"] = str(problem).splitlines()[0][:100]
    return row


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4032, 4096, 4352])
    parser.add_argument("--dim", type=int, nargs="+", choices=WIDTHS, default=[64, 128])
    parser.add_argument("--kernels", nargs="+", choices=[*KERNELS, FLASH_4], default=["cudnn", "flash", "efficient"])
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--masked", action="store_true", help="the last keys are left out")
    parser.add_argument("--as-torch-has-it", action="store_true", help="without cudnn_fix")
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    asked = parser.parse_args(arguments)
    torch.use_deterministic_algorithms(asked.deterministic)
    if not asked.as_torch_has_it:
        cudnn_fix.apply_fix()
    report = Report(f"attention on {DEVICE}, cuDNN {torch.backends.cudnn.version()}", asked.markdown)
    for kernel in asked.kernels:
        flash_attention_4.set_enabled(kernel == FLASH_4)
        for dim in asked.dim:
            for tokens in asked.tokens:
                report.row(measure(kernel, tokens, dim, asked.masked))
    flash_attention_4.set_enabled(False)
    torch.use_deterministic_algorithms(False)
