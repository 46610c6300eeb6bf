"""A training step as users would otherwise run it, and ours, on the same shapes in the same run.

    python -m bench peers --family flux --batch 1 4

bf16, eager and compiled: diffusers' model with peft's adapters and its own gradient checkpointing. torchao: the same,
compiled, with its float8 training (rowwise scales are its slower recipe; this one is tensorwise). Then each way of ours
that `--ours` names, as in `python -m bench step`. `images_s`: the batch by the median of five steps.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig

from bench import step
from bench.report import Report, options
from trainer import frozen
from trainer.families import family
from trainer.replay import Direct

PEERS = ("bf16 eager", "bf16 compiled", "torchao compiled")


class Peer(step.Bench):
    """diffusers' model with peft's adapters, and nothing of ours but the arguments of its forward pass."""

    def __init__(self, name: str, what: str, *, small: bool) -> None:
        self.name, self.kind, self.precision, self.small = name, family(name), what.split()[0], small
        self.model = step.denoiser(name, small=small)
        blocks, targets = self.kind.blocks(self.model), self.kind.FACTS.targets
        names = [
            f"{prefix}.{layer}"
            for prefix, block in blocks
            for layer, module in block.named_modules()
            if isinstance(module, torch.nn.Linear) and any(f".{layer}".endswith(f".{t}") for t in targets)
        ]
        if self.precision == "torchao":
            for _, block in blocks:
                frozen.freeze(block, "torchao")
        self.model.add_adapter(LoraConfig(r=step.RANK, lora_alpha=step.RANK, target_modules=names))
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.model.enable_gradient_checkpointing()
        self.size, self.dtype, self.runner = step.SIZES[name], torch.bfloat16, Direct(self.params)
        self.wholes, self.optimizer = self.params, torch.optim.AdamW(self.params, lr=1e-4, fused=not small)
        if what.endswith("compiled"):
            for region in self.kind.regions(self.model):
                region.compile()


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--ours", nargs="*", default=["fp8+all", "fp8+attention"])
    asked = parser.parse_args(arguments)
    report = Report(f"{asked.family}: what else there is", asked.markdown)
    for what in PEERS:
        step.free()
        peer = Peer(asked.family, what, small=asked.small)
        for batch in asked.batch:
            report.row({"what": what, "batch": batch, **peer.measured(lambda p=peer, b=batch: p.step(None, b))})
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
