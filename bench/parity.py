"""Gradient parity: the gradient of every adapter in each precision against bf16 (or `--against`), on the same batch.

    python -m bench parity --family flux

`--precision fp8+plain`: with diffusers' own forward passes of blocks. `fp32`: shows the error of bf16 itself. `again`:
the largest relative difference between the gradients of two runs of the same pass; 0 if all sums have a fixed order.
"""

from __future__ import annotations

import statistics

import torch

from bench import step
from bench.report import Report, options
from trainer.training.step_guard import LOSS_SCALE

PRECISIONS = ("bf16", "fp32", "fp16", "fp8", "fp8-storage", "int8", "nf4", "torchao")


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS[1:]))
    parser.add_argument("--against", default=PRECISIONS[0])
    asked = parser.parse_args(arguments)
    report = Report(f"{asked.base or asked.family}: gradients against {asked.against}", asked.markdown)
    reference: list[torch.Tensor] = []
    for precision in (asked.against, *asked.precision):
        step.free()
        weights, *words = precision.split("+")
        bench = step.Bench(asked.family, weights, base=asked.base, small=asked.small)
        engine = bench.engine({"all", "eager", *words})
        scale = LOSS_SCALE.get(str(bench.dtype).removeprefix("torch."), 1.0)
        passes: list[list[torch.Tensor]] = []
        for _ in range(2):
            loss = bench.backward(engine, 1, seed=3, scale=scale).item()
            passes.append([p.grad.flatten().double().cpu() / scale for p in bench.params if p.grad is not None])
            bench.runner.clear()
        gradients, repeated = passes
        del bench, engine
        reference = reference or gradients
        cosines: list[float] = []
        errors: list[float] = []
        for a, b in zip(gradients, reference, strict=True):
            if a.any() or b.any():  # else nothing depends on this adapter
                cosines.append(torch.cosine_similarity(a, b, dim=0).item())
                errors.append(((a - b).norm() / b.norm()).item())
        differences: list[float] = []
        for a, b in zip(gradients, repeated, strict=True):
            if a.any():
                differences.append(((a - b).norm() / a.norm()).item())
        report.row(
            {
                "format": precision,
                "worst cosine": round(min(cosines), 5),
                "median cosine": round(statistics.median(cosines), 5),
                "median error": round(statistics.median(errors), 4),
                "again": f"{max(differences):.1e}",
                "below 0.99": sum(c < 0.99 for c in cosines),
                "adapters": len(cosines),
                "loss": round(loss, 5),
            }
        )
