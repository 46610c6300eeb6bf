"""The gradient of every adapter in each format against bf16 (or `--against` another), on the same batch.

python -m bench parity --family flux

`--precision fp8+plain`: with diffusers' own forward passes; `fp32`: what bf16 itself loses. `again`: the largest
relative difference that the same pass makes to a gradient when it is run twice; 0 where all adds up in a fixed order.
"""

from __future__ import annotations

import statistics

import torch

from bench import step
from bench.report import Report, options
from trainer.training.step_guard import LOSS_SCALE

FORMATS = ("bf16", "fp32", "fp16", "fp8", "fp8-storage", "int8", "nf4", "torchao")


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--precision", nargs="+", default=list(FORMATS[1:]))
    parser.add_argument("--against", default=FORMATS[0])
    asked = parser.parse_args(arguments)
    report = Report(f"{asked.family}: gradients against {asked.against}", asked.markdown)
    reference: list[torch.Tensor] = []
    for precision in (asked.against, *asked.precision):
        step.free()
        form, *words = precision.split("+")
        bench = step.Bench(asked.family, form, small=asked.small)
        engine = bench.engine({"all", "eager", *words})
        scale = LOSS_SCALE.get(str(bench.dtype).removeprefix("torch."), 1.0)
        passes = []
        for _ in range(2):
            loss = bench.backward(engine, 1, seed=3, scale=scale).item()
            passes.append([p.grad.flatten().double().cpu() / scale for p in bench.params if p.grad is not None])
            bench.runner.clear()
        found, again = passes
        del bench, engine
        reference = reference or found
        # An adapter that nothing depends on has no gradient in either.
        pairs = [(a, b) for a, b in zip(found, reference, strict=True) if a.any() or b.any()]
        cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in pairs]
        errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        apart = [((a - b).norm() / a.norm()).item() for a, b in zip(found, again, strict=True) if a.any()]
        report.row(
            {
                "format": precision,
                "worst cosine": round(min(cosines), 5),
                "median cosine": round(statistics.median(cosines), 5),
                "median error": round(statistics.median(errors), 4),
                "again": f"{max(apart):.1e}",
                "below 0.99": sum(c < 0.99 for c in cosines),
                "adapters": len(cosines),
                "loss": round(loss, 5),
            }
        )
