"""A training step of other trainers, and ours, on the same shapes in the same run.

    python -m bench peers --family flux --batch 1 4

bf16, eager and compiled: diffusers' model with peft's adapters and its own gradient checkpointing. torchao: the same,
compiled, with torchao's float8 training (tensorwise; rowwise scales are its slower recipe). With a checkout of another
trainer (`bench/others.py`): `--onetrainer FOLDER`, its 8-bit layers, compiled; `--sd-scripts FOLDER`, for Flux.1 only.
Then our variants that `--ours` names, as in `python -m bench step`. `--only bf16 OneTrainer`: only those of the others
whose names begin like this. `images_s`: the batch divided by the median of five steps.

Attention is torch's own for the others, with our fix for its backward pass (`trainer/engine/attention/cudnn_fix.py`):
without it, some of them end with an illegal access.
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
from trainer.spec.targets import is_target


class Peer(others.Other):
    """diffusers' model with peft's adapters; only the arguments of its forward pass are ours."""

    def __init__(
        self,
        name: str,
        what: str,
        *,
        base: str = "",
        small: bool,
        change: Callable[[torch.nn.Module], None] | None = None,
    ) -> None:
        """`change`: applied to each block before it gets its adapters."""
        self.name = name
        self.base = base
        self.family = get_family(name)
        self.precision = what.split()[0]
        self.small = small
        self.model = step.denoiser(name, base=base, small=small)
        blocks = self.family.blocks(self.model)
        names: list[str] = []
        for prefix, block in blocks:
            for layer, module in block.named_modules():
                if isinstance(module, torch.nn.Linear) and is_target(layer, self.family.FACTS.targets):
                    names.append(f"{prefix}.{layer}")
        if change:
            for _, block in blocks:
                change(block)
        self.model.add_adapter(LoraConfig(r=step.RANK, lora_alpha=step.RANK, target_modules=names))
        self.set_trained([p for p in self.model.parameters() if p.requires_grad])
        self.model.enable_gradient_checkpointing()
        if what.endswith("compiled"):
            for region in self.family.regions(self.model):
                region.compile()

    def loss(self, engine: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(step.DEVICE, torch.bfloat16, enabled=self.precision == "OneTrainer"):  # as it trains
            return super().loss(engine, inputs)


def _peers(asked: Any) -> list[tuple[str, Callable[[], step.Bench]]]:
    """The name of each, and a function that creates it."""
    changes: dict[str, Callable[[torch.nn.Module], None] | None] = {
        "bf16 eager": None,
        "bf16 compiled": None,
        "torchao compiled": partial(frozen_linear.freeze, weight_format="torchao"),
    }
    if asked.onetrainer:
        changes["OneTrainer float8 compiled"] = others.onetrainer(asked.onetrainer, torch.float8_e4m3fn)
        changes["OneTrainer int8 compiled"] = others.onetrainer(asked.onetrainer, torch.int8)
    peers: list[tuple[str, Callable[[], step.Bench]]] = []
    for what, change in changes.items():
        peers.append((what, partial(Peer, asked.family, what, base=asked.base, small=asked.small, change=change)))
    if asked.sd_scripts and asked.family == "flux":
        peers.append(("sd-scripts fp8_base", partial(others.SdScripts, asked.sd_scripts, small=asked.small)))
    return peers


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--ours", nargs="*", default=["fp8+all", "fp8+attention"])
    parser.add_argument("--only", nargs="*", default=[""], metavar="NAME")
    parser.add_argument("--onetrainer", type=Path)
    parser.add_argument("--sd-scripts", type=Path)
    asked = parser.parse_args(arguments)
    cudnn_fix.apply_fix()
    report = Report(f"{asked.base or asked.family}: other trainers", asked.markdown)
    for what, create in _peers(asked):
        if not what.startswith(tuple(asked.only)):
            continue
        step.free()
        peer = create()
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
            ours["bench"] = step.Bench(asked.family, ours["precision"], base=asked.base, small=asked.small)
        for batch in asked.batch:
            report.row(step.measure(ours["bench"], variant, batch))
