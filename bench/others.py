"""A training step of other trainers, with their own code, from a checkout whose requirements are installed.

OneTrainer: its 8-bit layer (`LinearW8A8`) in diffusers' model, with peft's adapters. sd-scripts: its own Flux.1 and
LoRA network, weights stored in FP8 (`fp8_base`) and multiplied in bf16.
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

# Flux.1 of sd-scripts with --small: a few narrow blocks.
SMALL = {"hidden_size": 256, "num_heads": 2, "depth": 1, "depth_single_blocks": 2}


def module(checkout: Path, name: str) -> Any:
    """A module of a checkout."""
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module(name)


def onetrainer(checkout: Path, dtype: torch.dtype) -> Callable[[torch.nn.Module], None]:
    """A function that puts OneTrainer's layers into a block. `dtype` of weights and products: int8, float8_e4m3fn."""
    linear_w8a8 = module(checkout, "modules.module.quantized.LinearW8A8").LinearW8A8

    def replace(block: torch.nn.Module) -> None:
        for parent in list(block.modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is torch.nn.Linear:
                    has_bias = linear.bias is not None
                    layer = linear_w8a8(dtype, linear.in_features, linear.out_features, has_bias, device="meta")
                    layer.weight = linear.weight
                    layer.bias = linear.bias
                    layer.compute_dtype = torch.bfloat16
                    layer.scale = torch.ones((), device=linear.weight.device)
                    layer.quantize()
                    setattr(parent, name, layer)

    return replace


class Other(step.Bench):
    """A model that is not ours, with activations in bf16."""

    def set_trained(self, params: list[torch.nn.Parameter]) -> None:
        """Train `params`."""
        self.params = params
        self.optimizer_params = params
        self.size = step.SIZES[self.name]
        self.dtype = torch.bfloat16
        self.runner = EagerStep(params)
        self.optimizer = torch.optim.AdamW(params, lr=1e-4, fused=not self.small)


class SdScripts(Other):
    """Flux.1 of sd-scripts with its own LoRA of the same rank; everything is recomputed, nothing compiled."""

    def __init__(self, checkout: Path, *, small: bool) -> None:
        self.name = "flux"
        self.family = get_family("flux")
        self.precision = "fp8_base"
        self.small = small
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
        self.set_trained(list(network.to(step.DEVICE).parameters()))

    def loss(self, _: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        noisy = torch.nn.functional.pixel_unshuffle(inputs["noisy"], 2)
        target = torch.nn.functional.pixel_unshuffle(inputs["target"], 2)
        rows = torch.arange(noisy.shape[2], dtype=torch.float32)
        columns = torch.arange(noisy.shape[3], dtype=torch.float32)
        positions = torch.cartesian_prod(torch.zeros(1), rows, columns)
        tokens = inputs["tokens"]
        count = len(noisy)
        with torch.autocast(step.DEVICE, torch.bfloat16):
            out = self.model(
                img=noisy.flatten(2).transpose(1, 2).to(self.dtype),
                img_ids=positions.to(step.DEVICE).expand(count, -1, -1),
                txt=tokens,
                txt_ids=torch.zeros(count, tokens.shape[1], 3, device=step.DEVICE),
                timesteps=inputs["t"],
                y=inputs["pooled"],
                guidance=torch.ones(count, device=step.DEVICE),
            )
        loss = torch.nn.functional.mse_loss(out.float(), target.flatten(2).transpose(1, 2))
        return loss, loss * inputs["scale"]
