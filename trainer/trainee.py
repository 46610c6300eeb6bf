"""What is being trained: the adapters, their optimiser, its schedule, and their average; and the state of all four."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trainer import checkpoint, lora, optim
from trainer.errors import SettingsError
from trainer.loop import Ema


@dataclass
class Trainee:
    """The live objects of a run that change with every step."""

    denoiser: Any
    params: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: Ema | None

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, besides the data."""
        return {
            "adapters": lora.state(self.denoiser),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": {"steps": self.ema.steps, "shadow": self.ema.shadow} if self.ema else None,
            "random": checkpoint.random_state(),
        }

    def restore(self, tree: dict[str, Any]) -> None:
        """Put back what `state` gave. Raises SettingsError where it does not fit."""
        try:
            lora.load(self.denoiser, tree["adapters"])
            optim.load_state(self.optimizer, tree["optimizer"])
            self.schedule.load_state_dict(tree["schedule"])
        except (KeyError, ValueError) as problem:
            raise SettingsError(f"The state does not fit this plan: {problem}.") from problem
        if self.ema and tree["ema"]:
            self.ema.steps = tree["ema"]["steps"]
            self.ema.shadow = [s.to(p.device) for s, p in zip(tree["ema"]["shadow"], self.params, strict=True)]
        checkpoint.set_random_state(tree["random"])

    @contextlib.contextmanager
    def published(self) -> Iterator[None]:
        """Inside, the adapters are those to use: the average where there is one. Afterwards exactly what they were."""
        kept = [p.detach().clone() for p in self.params]
        optim.set_training(self.optimizer, False)
        if self.ema:
            self._overwrite(self.ema.shadow)
        try:
            yield
        finally:
            optim.set_training(self.optimizer, True)
            self._overwrite(kept)

    def _overwrite(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self.params, values, strict=True):
                p.copy_(value)
