"""Each kernel of the 8-bit engine by itself, on the rows of one picture: its time, and how much it reads and writes.

python -m bench kernels [--tokens 4352] [--width 3072]
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
HEAD, TIMES, FP8 = 128, 20, torch.float8_e4m3fn


def seconds(work: Callable[[], Any]) -> float:
    """Of a usual run on the device, between two marks there."""
    found = []
    for _ in range(TIMES if DEVICE == "cuda" else 1):
        if DEVICE == "cpu":
            started = time.monotonic()
            work()
            found.append(time.monotonic() - started)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.empty(2**28, device=DEVICE, dtype=torch.int8).zero_()  # empties caches, fills the queue
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return statistics.median(found)


def tensors(things: Iterable[Any]) -> list[torch.Tensor]:
    return [t for t in things if isinstance(t, torch.Tensor)]


def cases(tokens: int, width: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).bfloat16()

    x, many, vector = normal(tokens, width), normal(tokens, 4 * width), normal(1, width)
    qkv, transposes, small = normal(1, tokens, 3 * width), torch.randn(tokens, HEAD, device=DEVICE), normal(HEAD)
    gs = [normal(1, tokens, width // HEAD, HEAD) for _ in range(3)]
    gated, wide = normal(tokens, 8 * width), normal(tokens, 5 * width)
    rotation = (small, small, transposes, transposes)
    return {
        "quantize_rows": (fused_linear.quantize_rows, (x, None, FP8)),
        "norm_rows": (fused_linear.norm_rows, (x, vector, vector, 1.0, 1e-6, FP8, True)),
        "norm_gradient, of one": (
            fused_linear.norm_gradient,
            (x, vector, vector, 1.0, 1e-6, x.clone(), None, None, x.clone(), True),
        ),
        "norm_gradient, of two": (
            fused_linear.norm_gradient,
            (x, vector, vector, 1.0, 1e-6, x.clone(), x.clone(), None, x.clone(), True),
        ),
        "gelu_rows": (fused_linear.gelu_rows, (None, many, False, FP8, True)),
        "gelu_rows, beside": (fused_linear.gelu_rows, (x, many, False, FP8, True)),
        "gelu_rows, gated": (fused_linear.gelu_rows, (None, gated, True, FP8, True)),
        "gelu_gradient": (fused_linear.gelu_gradient, (None, many, many.clone(), False, True)),
        "gelu_gradient, beside": (fused_linear.gelu_gradient, (x, many, wide, False, True)),
        "gelu_gradient, gated": (fused_linear.gelu_gradient, (None, gated, many, True, True)),
        "rotate": (rope.rotate, (qkv, small, small, None, None, None, transposes, transposes, 1e-6)),
        "rotate_gradient": (rope.rotate_gradient, (qkv, *rotation, *gs, 0, 1e-6)),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4352)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--markdown", type=Path, help="a file for the table")
    asked = parser.parse_args(arguments)
    report = Report("kernels", asked.markdown)
    for name, (kernel, given) in cases(asked.tokens, asked.width).items():
        made = kernel(*given)
        every = {t.data_ptr(): t.nbytes for t in tensors(given) + tensors([made] if torch.is_tensor(made) else made)}
        moved = sum(every.values()) - (given[0].nbytes // 3 if name == "rotate" else 0)  # it leaves the values alone
        taken = seconds(lambda kernel=kernel, given=given: kernel(*given))  # type: ignore[misc]
        report.row({"kernel": name, "us": round(taken * 1e6, 1), "TB/s": round(moved / taken / 1e12, 3)})
