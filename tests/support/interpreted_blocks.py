"""Whole models with fused blocks in Triton's interpreter, against the same in plain torch and in full precision.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_blocks krea2 qwen-image --case DoRA

So the kernels get what blocks hand them: views of wider rows, weights in fp32, gradients of other strides, captions of
other lengths. Prints a line of JSON for each case (`Found`). A process of its own, as
`tests.support.interpreted_kernels` is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from tests.support.interpreted_kernels import prepare_interpreter


class Case(NamedTuple):
    """A batch and its adapters. `lengths`: of the captions. `size`: height and width of the latents."""

    lengths: Sequence[int]
    size: tuple[int, int]
    kind: str = "lora"
    joined: bool = True
    dropped: str = ""  # layers whose name ends like this get no adapter


CASES = {
    "captions of other lengths": Case((6, 4), (8, 8)),
    "one token of text": Case((1,), (6, 4)),
    "three images, one with one token": Case((5, 1, 3), (6, 4)),
    "projections apart": Case((6, 4), (4, 4), joined=False),
    "rsLoRA": Case((6, 4), (4, 4), kind="rslora"),
    "DoRA": Case((6, 4), (4, 4), kind="dora"),
    "layers without an adapter": Case((6, 4), (4, 4), dropped="to_q"),
}


# One block of each kind: in more, what two kernels round differently grows.
SHALLOW: dict[str, dict[str, Any]] = {
    "flux2-klein-4b": {"num_layers": 1, "num_single_layers": 1},
    "krea2": {"num_layers": 1, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
    "qwen-image": {"num_layers": 1},
}


class Found(NamedTuple):
    """Relative errors. `kernels`: of the kernels to plain torch; `plain` and `ours`: of both to full precision."""

    base: str
    case: str
    kernels: dict[str, float]
    plain: dict[str, float]
    ours: dict[str, float]
    other_gradients: int  # trained matrices that have a gradient in one and not in another


def step(base: str, case: Case, *, precision: str, interpreted: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """Output and gradients of one step, in fused blocks if `precision` is fp8."""
    from tests.support.fused_models import adapted, model, predicted
    from trainer.engine.kernels import dispatch

    family, denoiser = model(base, **SHALLOW[base])
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    forwards = family.fused_forwards() if precision == "fp8" else None
    targets = [target for target in family.FACTS.targets if not case.dropped or not target.endswith(case.dropped)]
    options = {"targets": tuple(targets), "kind": case.kind, "joined": case.joined}
    adapted(family, denoiser, precision=precision, dtype=dtype, forwards=forwards, **options)
    on_cpu = dispatch._on_cpu
    if interpreted:
        dispatch._on_cpu = lambda _arguments: False
    try:
        return predicted(family, denoiser, dtype, lengths=case.lengths, size=case.size)
    finally:
        dispatch._on_cpu = on_cpu


def compared(bases: Sequence[str], cases: dict[str, Case]) -> Iterator[Found]:
    from tests.support.fused_models import error

    for base in bases:
        for name, case in cases.items():
            exact = step(base, case, precision="fp32", interpreted=False)
            plain = step(base, case, precision="fp8", interpreted=False)
            ours = step(base, case, precision="fp8", interpreted=True)
            others = len(exact[1].keys() ^ ours[1].keys()) + len(plain[1].keys() ^ ours[1].keys())

            def errors(found: Any, wanted: Any) -> dict[str, float]:
                of = [error(found[1][key], w) for key, w in wanted[1].items() if w.norm() > 1e-6]
                of.sort()
                return {"output": error(found[0], wanted[0]), "median": of[len(of) // 2], "most": of[-1]}

            yield Found(base, name, errors(ours, plain), errors(plain, exact), errors(ours, exact), others)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bases", nargs="+", choices=SHALLOW)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    asked = parser.parse_args(arguments)
    prepare_interpreter()
    from bench.targets.launches import import_kernels

    import_kernels()
    from trainer.engine.kernels import quantize_triton
    from trainer.spec import adapter_columns

    quantize_triton._has_fp8 = lambda _device: True
    adapter_columns.MIN_SIDE_PER_COLUMN = 0  # these narrow layers get adapter columns as well
    for found in compared(asked.bases, {name: CASES[name] for name in asked.case}):
        print(json.dumps(found._asdict()), flush=True)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    main(sys.argv[1:])
