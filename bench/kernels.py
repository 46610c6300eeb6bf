"""Each kernel of the FP8 engine alone, on the rows of one image: its time, and the bandwidth that it reaches.

python -m bench kernels [--tokens 4352] [--width 3072]

Each tensor that a kernel reads or writes counts once, so TB/s compares with the memory's bandwidth (H200: 4.8).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench.report import Report
from trainer.engine import fused_linear, rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEAD_DIM = 128
REPEATS = 20
FP8 = torch.float8_e4m3fn
FLUSH_BYTES = 2**28  # more than the L2 cache of any GPU that we measure (50 MB on an H200)

Case = tuple[Callable[..., Any], tuple[Any, ...]]  # a kernel and its arguments


def seconds(run_kernel: Callable[[], Any]) -> float:
    """The median time of `run_kernel`, on a GPU between two events there."""
    times = []
    for _ in range(REPEATS if DEVICE == "cuda" else 1):
        if DEVICE == "cpu":
            started = time.monotonic()
            run_kernel()
            times.append(time.monotonic() - started)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Empties the caches, and keeps the GPU busy until the host has queued the kernel.
        torch.empty(FLUSH_BYTES, device=DEVICE, dtype=torch.int8).zero_()
        start.record()
        run_kernel()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]


def cases(tokens: int, width: int) -> dict[str, Case]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).bfloat16()

    x, hidden, vector = normal(tokens, width), normal(tokens, 4 * width), normal(1, width)
    # With GEGLU, y has two halves; with a left part, the gradient of a row is wider.
    geglu_y, wide_gradient = normal(tokens, 8 * width), normal(tokens, 5 * width)
    norm = (x, vector, vector, 1.0, 1e-6, True)
    qkv, head = normal(1, tokens, 3 * width), normal(HEAD_DIM)
    angles = torch.randn(tokens, HEAD_DIM, device=DEVICE)  # for cosines and sines
    gradients = [normal(1, tokens, width // HEAD_DIM, HEAD_DIM) for _ in range(3)]
    rms = (x, vector, None, 0.0, 1e-6, False)
    rms_shift = (x, vector.float(), vector, 0.0, 1e-6, False)
    heads = (x[None], head, torch.randn(1, tokens, HEAD_DIM // 2, 2, device=DEVICE))
    return {
        "quantize_rows": (fused_linear.quantize_rows, (x, None, FP8)),
        "norm_rows": (fused_linear.norm_rows, (*norm, FP8, True)),
        "norm_gradient, of one": (fused_linear.norm_gradient, (*norm, x.clone(), None, None, x.clone(), True)),
        "norm_gradient, of two": (fused_linear.norm_gradient, (*norm, x.clone(), x.clone(), None, x.clone(), True)),
        "norm_rows, RMS": (fused_linear.norm_rows, (*rms, FP8, True)),
        "norm_gradient, RMS": (fused_linear.norm_gradient, (*rms, x.clone(), x.clone(), x.clone(), x.clone(), True)),
        "norm_rows, RMS and shift": (fused_linear.norm_rows, (*rms_shift, FP8, True)),
        "norm_residual": (fused_linear.norm_residual_kernel, (x[None], x.clone()[None], vector, 1e-6)),
        "swiglu_rows": (fused_linear.swiglu_rows, (None, hidden, hidden.clone(), True, FP8, True)),
        "swiglu_gradient": (fused_linear.swiglu_gradient, (None, hidden, hidden.clone(), True, hidden.clone(), True)),
        "swiglu_rows, a gate": (fused_linear.swiglu_rows, (None, x, x.clone(), False, FP8, True)),
        "swiglu_gradient, a gate": (fused_linear.swiglu_gradient, (None, x, x.clone(), False, x.clone(), True)),
        "gelu_rows": (fused_linear.gelu_rows, (None, hidden, False, FP8, True)),
        "gelu_rows, with left": (fused_linear.gelu_rows, (x, hidden, False, FP8, True)),
        "gelu_rows, GEGLU": (fused_linear.gelu_rows, (None, geglu_y, True, FP8, True)),
        "gelu_gradient": (fused_linear.gelu_gradient, (None, hidden, hidden.clone(), False, True)),
        "gelu_gradient, with left": (fused_linear.gelu_gradient, (x, hidden, wide_gradient, False, True)),
        "gelu_gradient, GEGLU": (fused_linear.gelu_gradient, (None, geglu_y, hidden, True, True)),
        "rotate": (rope.rotate, (qkv, head, head, None, None, None, angles, angles, 1e-6)),
        "rotate_gradient": (rope.rotate_gradient, (qkv, head, head, angles, angles, *gradients, 0, 1e-6)),
        "rotate_heads": (rope.rotate_heads, (*heads, 1e-6)),
        "rotate_heads_gradient": (rope.rotate_heads_gradient, (*heads, gradients[0], 1e-6)),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4352)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--markdown", type=Path, help="a file for the table")
    options = parser.parse_args(arguments)
    report = Report("kernels", options.markdown)
    for name, (kernel, kernel_arguments) in cases(options.tokens, options.width).items():
        result = kernel(*kernel_arguments)
        outputs = [result] if torch.is_tensor(result) else result
        sizes = {t.data_ptr(): t.nbytes for t in tensors(kernel_arguments) + tensors(outputs)}
        moved_bytes = sum(sizes.values())
        if name == "rotate":  # without a second source, it does not read the values
            moved_bytes -= kernel_arguments[0].nbytes // 3
        taken = seconds(lambda kernel=kernel, args=kernel_arguments: kernel(*args))  # type: ignore[misc]  # defaults bind
        report.row({"kernel": name, "us": round(taken * 1e6, 1), "TB/s": round(moved_bytes / taken / 1e12, 3)})
