"""A training step as other trainers do it, with code of theirs: from a checkout that is named, and whose needs are met.

OneTrainer: its 8-bit layer (`LinearW8A8`) in diffusers' model, with peft's adapters. sd-scripts: its own Flux.1 and
LoRA network, weights kept in FP8 (`fp8_base`), multiplied in bf16.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import step
from trainer.engine.cuda_graphs import EagerStep
from trainer.spec.family import get_family

SMALL = {"hidden_size": 256, "num_heads": 2, "depth": 1, "depth_single_blocks": 2}


def module(checkout: Path, name: str) -> Any:
    """A module of theirs."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module(name)


def onetrainer(checkout: Path, dtype: torch.dtype) -> Callable[[torch.nn.Module], None]:
    """What puts OneTrainer's layers into a block, for weights and products in `dtype`: int8 or float8_e4m3fn."""
    layer = module(checkout, "modules.module.quantized.LinearW8A8").LinearW8A8

    def replace(block: torch.nn.Module) -> None:
        for parent in list(block.modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is torch.nn.Linear:
                    made = layer(dtype, linear.in_features, linear.out_features, linear.bias is not None, device="meta")
                    made.weight, made.bias, made.compute_dtype = linear.weight, linear.bias, torch.bfloat16
                    made.scale = torch.ones((), device=linear.weight.device)
                    made.quantize()
                    setattr(parent, name, made)

    return replace


class Other(step.Bench):
    """What is not ours, in bf16."""

    def trains(self, params: list[torch.nn.Parameter]) -> None:
        self.params = self.optimizer_params = params
        self.size, self.dtype, self.runner = step.SIZES[self.name], torch.bfloat16, EagerStep(params)
        self.optimizer = torch.optim.AdamW(params, lr=1e-4, fused=not self.small)


class SdScripts(Other):
    """Flux.1 of sd-scripts with its LoRA of the same rank, everything recomputed, nothing compiled."""

    def __init__(self, checkout: Path, *, small: bool) -> None:
        self.name, self.kind, self.precision, self.small = "flux", get_family("flux"), "fp8_base", small
        models = module(checkout, "library.flux_models")
        params = models.configs["dev"].params
        with step.random_weights(step.DEVICE):
            self.model = models.Flux(dataclasses.replace(params, **SMALL) if small else params)
        self.model.requires_grad_(False).train().enable_gradient_checkpointing()
        network = module(checkout, "networks.lora_flux").create_network(
            1.0, step.RANK, step.RANK, None, [None, None], self.model
        )
        network.apply_to([], self.model, apply_text_encoder=False, apply_unet=True)
        self.model.to(torch.float8_e4m3fn)
        self.trains(list(network.to(step.DEVICE).parameters()))

    def work(self, _: Any, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        noisy, target = (torch.nn.functional.pixel_unshuffle(given[k], 2) for k in ("noisy", "target"))
        places = torch.cartesian_prod(torch.zeros(1), *(torch.arange(n, dtype=torch.float32) for n in noisy.shape[2:]))
        tokens, count = given["tokens"], len(noisy)
        with torch.autocast(step.DEVICE, torch.bfloat16):
            out = self.model(
                img=noisy.flatten(2).transpose(1, 2).to(self.dtype),
                img_ids=places.to(step.DEVICE).expand(count, -1, -1),
                txt=tokens,
                txt_ids=torch.zeros(count, tokens.shape[1], 3, device=step.DEVICE),
                timesteps=given["t"],
                y=given["pooled"],
                guidance=torch.ones(count, device=step.DEVICE),
            )
        loss = torch.nn.functional.mse_loss(out.float(), target.flatten(2).transpose(1, 2))
        return loss, loss * given["scale"]
