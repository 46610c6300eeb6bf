"""A denoiser made ready to train fast in the memory there is: its weights' format, what is kept and compiled."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch

from trainer.engine.attention import cudnn_fix, flash_attention_4
from trainer.engine.cuda_graphs import PassContext
from trainer.engine.device import torch_dtype
from trainer.engine.memory import checkpointing
from trainer.engine.memory.activation_offload import ActivationOffload
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.engine.quantization.frozen_linear import FrozenLinear
from trainer.spec.errors import SettingsError
from trainer.spec.plan import EnginePlan
from trainer.spec.strategies import described, fallbacks

log = logging.getLogger(__name__)


class Engine:
    """How the regions of a denoiser run (see `trainer.engine.memory.checkpointing`). `lower` trades speed for
    memory."""

    def __init__(
        self,
        denoiser: torch.nn.Module,
        regions: Sequence[torch.nn.Module],
        plan: EnginePlan,
        stream: WeightStreamer | None = None,
    ) -> None:
        cudnn_fix.apply_fix()
        flash_attention_4.set_enabled(
            plan.attention == "flash_4" and flash_attention_4.supports_model(denoiser, torch_dtype(plan), plan.device)
        )
        self.denoiser, self.regions, self.stream, self.device = denoiser, list(regions), stream, plan.device
        self.offload: ActivationOffload | None = None
        self.compiled, self.host_gib = plan.compile, plan.host_gib
        self.fallbacks = fallbacks(plan.recompute, plan.kept_blocks, plan.offload, compiled=plan.compile)
        frozen = sum(t.nbytes for r in regions for t in (*r.parameters(), *r.buffers()) if not t.requires_grad)
        if plan.host_gib is not None and frozen > plan.host_gib * 2**30 and len(self.fallbacks) > 1:
            self.fallbacks.pop()  # the last, which sends the weights to the host
        self.keep_transposed(keep=plan.turned_weights)
        self._apply()

    def keep_transposed(self, *, keep: bool) -> None:
        """Keep the weights turned round as well, or do not."""
        for layer in self._layers():
            layer.keep_transposed(keep)

    def _layers(self) -> list[FrozenLinear]:
        return [m for region in self.regions for m in region.modules() if isinstance(m, FrozenLinear)]

    def drop_adapter_columns(self) -> bool:
        """Give up what is there for speed alone: copies turned round; then columns beside the weights. Whether it did.

        Without those, adapters are added after the products.
        """
        if self.stream:
            return False
        layers = self._layers()
        if any(layer.weight_t_KN is not None for layer in layers):
            self.keep_transposed(keep=False)
            log.info("The weights are not kept turned round any more, which takes less memory and a little more time.")
            return True
        if not any(layer.rank for layer in layers):
            return False
        for layer in layers:
            layer.drop_adapter_columns()
        if self.offload:
            self.offload.find_weights()
        log.info("Adapters are no part of products any more, which takes less memory and 5 to 10 % more time.")
        return True

    def _apply(self) -> None:
        policy, kept, offload = self.fallbacks[0]
        kept = min(kept, len(self.regions))  # of a variant that may have fewer than its family's footprint says
        policies = ["none"] * kept + [policy] * (len(self.regions) - kept)
        checkpointing.apply(self.regions, policies, compiled=self.compiled)
        self.offload = None  # with what it holds
        if offload == "weights" and self.stream is None:
            self.stream = WeightStreamer(self.device)
            for region in self.regions:
                self.stream.add_region(region)
            self.stream.allocate_slots()
        if self.stream:
            self.stream.attach()
        if offload != "none":
            taken = sum(map(len, self.stream.buffers)) / 2**30 if self.stream else 0.0
            limit = None if self.host_gib is None else self.host_gib - taken
            self.offload = ActivationOffload(self.denoiser, stream=self.stream, limit_gib=limit)

    @property
    def compiled_graph_count(self) -> int | None:
        """How many graphs were compiled so far, of all kinds of regions and sizes; None: nothing is compiled."""
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) if self.compiled else None

    def can_capture(self, rung: int = 0) -> bool:
        """Whether steps may be recorded: this way, or one further down. What streams weights decides as it goes."""
        return len(self.fallbacks) > rung and self.fallbacks[rung][2] != "weights"

    @property
    def next_offloads_more(self) -> bool:
        """Whether the next way down sends more to the host, and is that much slower; or there is none."""
        return len(self.fallbacks) == 1 or self.fallbacks[1][2] != self.fallbacks[0][2]

    def step_down(self, problem: str) -> None:
        """The next way, with less memory. Raises SettingsError where there is none."""
        if len(self.fallbacks) == 1:
            raise SettingsError(f"{problem} Fix: lower PARAMS_BATCH_SIZE or PARAMS_RESOLUTION, or give it more memory.")
        before, now = self.fallbacks.pop(0), self.fallbacks[0]
        log.warning("%s Instead of %s: %s.", problem, described(*before), described(*now))
        self.keep_transposed(keep=False)
        try:
            self._apply()
        except torch.OutOfMemoryError:
            self.step_down(problem)

    @contextlib.contextmanager
    def forward_backward(self, inside: PassContext = contextlib.nullcontext) -> Iterator[None]:
        """PassContext a forward pass and its backward pass: at the end, nothing is on its way to the host or back."""
        try:
            with inside():
                yield
        finally:
            if self.offload:
                self.offload.join()

    def saved_tensors(self) -> contextlib.AbstractContextManager[None]:
        """PassContext a forward pass: where the tensors go that the backward pass needs."""
        return self.offload if self.offload and torch.is_grad_enabled() else contextlib.nullcontext()


@contextlib.contextmanager
def without_new_compilation() -> Iterator[None]:
    """Inside, nothing new is compiled: samples have shapes of their own, and few steps."""
    with torch.compiler.set_stance("eager_on_recompile"):
        yield
