"""Everything that changes with every step (`TrainingState`), and how it is saved and restored.

`TrainingState.state` is a tree of dicts, lists, tensors and JSON values. Its keys are part of the file format: states
on disk are read by later versions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.engine import adapter_strength
from trainer.engine import adapters as lora
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.engine.training_adapter import TrainingAdapter
from trainer.spec.errors import SettingsError
from trainer.training import optimizers, random_state
from trainer.training.ema import Ema
from trainer.training.step_guard import StepGuard
from trainer.training.text_encoders import TextEncoders


@dataclass
class TrainingState:
    """The live objects of a run that change with every step."""

    denoiser: Any
    texts: TextEncoders
    adapter_params: list[torch.nn.Parameter]  # of all adapters, in the order of the optimiser's groups
    optimizer_params: list[torch.nn.Parameter]  # those, or longer flat ones of which those are views
    optimizer: torch.optim.Optimizer
    new_optimizer: Callable[[], torch.optim.Optimizer]  # another one for the same parameters, as at the beginning
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: Ema | None
    guard: StepGuard
    weight_streamer: WeightStreamer | None = None  # of the denoiser's weights, where they stay in the host's memory
    training_adapter: TrainingAdapter | None = None  # a LoRA that is part of the frozen weights; it does not change
    # With DoRA: the norms of the rows of the layers that do not train, but that a file keeps as one with one that does.
    untrained_norms: dict[str, torch.Tensor] = field(default_factory=dict)

    @functools.cached_property
    def adapters(self) -> dict[str, torch.Tensor]:
        """The denoiser's live adapter tensors, by peft's names.

        Gathered once: on a large model that takes longer than to copy them.
        """
        return lora.state(self.denoiser)

    @functools.cached_property
    def text_adapters(self) -> dict[str, dict[str, torch.Tensor]]:
        """The live adapter tensors of each text encoder that trains, by component and peft's names."""
        return {component: lora.state(model) for component, model in self.texts.models.items()}

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, besides the data. The tensors are the live ones, not copies."""
        return {
            "adapters": self.adapters,
            "text_encoders": self.text_adapters,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": {"steps": self.ema.steps, "shadow": self.ema.shadow} if self.ema else None,
            "guard": self.guard.state(),
            "random": random_state.random_state(),
        }

    def first_state(self) -> dict[str, Any]:
        """A state as after a first step, for the rehearsal: of the size of all later ones.

        Only a step creates an optimiser's own tensors. It is taken by a second optimiser with gradients of one, and the
        parameters are restored afterwards, so nothing of what trains changes.
        """
        weights = [p.detach().clone() for p in self.optimizer_params]
        optimizer = self.new_optimizer()
        try:
            for p in self.optimizer_params:
                if p.grad is None:
                    p.grad = torch.ones_like(p)
                else:
                    p.grad.fill_(1)
            optimizer.step()
        finally:
            optimizer.zero_grad(set_to_none=True)
            self._overwrite(weights)
        return {**self.state(), "optimizer": optimizer.state_dict()}

    def restore(self, tree: dict[str, Any], *, renew: bool = False) -> None:
        """Put back what `state` returned. Raises SettingsError where it does not fit.

        `renew`: the run goes on with another end or other settings, which the optimiser and the schedule follow from
        here on. Without it, the next step is the one that would have followed.
        """
        settings = optimizers.group_settings(self.optimizer)
        try:
            lora.load(self.denoiser, tree["adapters"])
            for component, model in self.texts.models.items():
                lora.load(model, tree["text_encoders"][component])
            optimizers.load_state(self.optimizer, tree["optimizer"])
            self.schedule.load_state_dict(tree["schedule"])
            if renew:
                optimizers.renew(self.optimizer, self.schedule, settings)
            if self.ema and not tree["ema"]:
                self.ema = Ema(self.optimizer_params, self.ema.decay)  # from here on
            elif self.ema and tree["ema"]:
                self.ema.steps = tree["ema"]["steps"]
                pairs = zip(tree["ema"]["shadow"], self.optimizer_params, strict=True)
                self.ema.shadow = [shadow.to(p.device) for shadow, p in pairs]
        except (KeyError, ValueError) as problem:
            message = "The state does not fit this plan. Another version of Kiln may have written it"
            raise SettingsError(f"{message}: {problem}.") from problem
        self.guard.restore(tree["guard"])
        random_state.set_random_state(tree["random"])

    @property
    def has_averaged_weights(self) -> bool:
        """Whether the weights to use differ from those that train: an EMA, or a schedule-free optimiser's average."""
        return self.ema is not None or optimizers.is_schedule_free(self.optimizer)

    @contextlib.contextmanager
    def inference_weights(self) -> Iterator[None]:
        """Inside, the adapters hold the weights to use: the average where there is one. Afterwards the former bits."""
        if not self.has_averaged_weights:
            yield
            return
        weights = [p.detach().clone() for p in self.optimizer_params]
        optimizers.set_training(self.optimizer, False)
        if self.ema:
            self._overwrite(self.ema.shadow)
        try:
            yield
        finally:
            # A schedule-free optimiser computes its way back to the training weights, which rounds: so these are
            # overwritten with a copy, and sampling leaves no trace in the run.
            optimizers.set_training(self.optimizer, True)
            self._overwrite(weights)

    def at_strength(self, strength: float) -> contextlib.AbstractContextManager[None]:
        """Inside, all adapters act with this strength; 0 is the base model. Afterwards the former bits."""
        return adapter_strength.at_strength([self.denoiser, *self.texts.models.values()], strength)

    def as_used(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the frozen weights are those that the LoRA will be used with: without a training adapter."""
        return self.training_adapter.without() if self.training_adapter else contextlib.nullcontext()

    def _overwrite(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(self.optimizer_params, values, strict=True):
                p.copy_(value)
