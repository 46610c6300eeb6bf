"""A training step as users would otherwise run it, and ours, on the same shapes in the same run.

    python -m bench peers --family flux --batch 1 4

bf16, eager and compiled: diffusers' model with peft's adapters and its own gradient checkpointing. torchao: the same,
compiled, with its float8 training (rowwise scales are its slower recipe; this one is tensorwise). Where a checkout is
named, what others run (`bench/others.py`): `--onetrainer FOLDER`, with its 8-bit layers, compiled;
`--sd-scripts FOLDER`, for Flux.1 alone. Then each way of ours that `--ours` names, as in `python -m bench step`.
`--only bf16 OneTrainer`: of the others, those whose names begin so. `images_s`: the batch by the median of five steps.
Attention is torch's own for the others, mended (`trainer/engine/attention/cudnn_fix.py`), without which some of them
end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from bench import others, step
from bench.report import Report, options
from trainer.engine.attention import cudnn_fix
from trainer.engine.quantization import frozen_linear
from trainer.spec.family import get_family


class Peer(others.Other):
    """diffusers' model with peft's adapters, and nothing of ours but the arguments of its forward pass."""

    def __init__(
        self, name: str, what: str, *, small: bool, change: Callable[[torch.nn.Module], None] | None = None
    ) -> None:
        """`change`: what is done to each block before it gets its adapters."""
        self.name, self.kind, self.precision, self.small = name, get_family(name), what.split()[0], small
        self.model = step.denoiser(name, small=small)
        blocks, targets = self.kind.blocks(self.model), self.kind.FACTS.targets
        names = [
            f"{prefix}.{layer}"
            for prefix, block in blocks
            for layer, module in block.named_modules()
            if isinstance(module, torch.nn.Linear) and any(f".{layer}".endswith(f".{t}") for t in targets)
        ]
        for _, block in blocks if change else ():
            change(block)
        self.model.add_adapter(LoraConfig(r=step.RANK, lora_alpha=step.RANK, target_modules=names))
        self.trains([p for p in self.model.parameters() if p.requires_grad])
        self.model.enable_gradient_checkpointing()
        if what.endswith("compiled"):
            for region in self.kind.regions(self.model):
                region.compile()

    def work(self, engine: Any, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(step.DEVICE, torch.bfloat16, enabled=self.precision == "OneTrainer"):  # as it trains
            return super().work(engine, given)


def _peers(asked: Any) -> list[tuple[str, Callable[[], step.Bench]]]:
    """What they are, and how each is made."""
    changes: dict[str, Callable[[torch.nn.Module], None] | None] = {
        "bf16 eager": None,
        "bf16 compiled": None,
        "torchao compiled": partial(frozen_linear.freeze, weight_format="torchao"),
    }
    if asked.onetrainer:
        changes["OneTrainer float8 compiled"] = others.onetrainer(asked.onetrainer, torch.float8_e4m3fn)
        changes["OneTrainer int8 compiled"] = others.onetrainer(asked.onetrainer, torch.int8)
    found: list[tuple[str, Callable[[], step.Bench]]] = [
        (what, partial(Peer, asked.family, what, small=asked.small, change=change)) for what, change in changes.items()
    ]
    if asked.sd_scripts and asked.family == "flux":
        found.append(("sd-scripts fp8_base", partial(others.SdScripts, asked.sd_scripts, small=asked.small)))
    return found


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--ours", nargs="*", default=["fp8+all", "fp8+attention"])
    parser.add_argument("--only", nargs="*", default=[""], metavar="NAME")
    parser.add_argument("--onetrainer", type=Path)
    parser.add_argument("--sd-scripts", type=Path)
    asked = parser.parse_args(arguments)
    cudnn_fix.apply_fix()
    report = Report(f"{asked.family}: what else there is", asked.markdown)
    for what, made in (p for p in _peers(asked) if p[0].startswith(tuple(asked.only))):
        step.free()
        peer = made()
        for batch in asked.batch:
            row = peer.measured(lambda p=peer, b=batch: p.step(None, b))
            report.row({"what": what, "batch": batch, **row, "images_s": round(batch / row["step_s"], 3)})
        del peer
        torch.compiler.reset()
    ours: dict[str, Any] = {}
    for variant in asked.ours:
        if ours.get("precision") != variant.split("+")[0]:
            ours.clear()
            step.free()
            ours = {"precision": variant.split("+")[0]}
            ours["bench"] = step.Bench(asked.family, ours["precision"], small=asked.small)
        for batch in asked.batch:
            report.row(step.measure(ours["bench"], variant, batch))
