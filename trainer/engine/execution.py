"""How the regions of a denoiser run: what is recomputed, offloaded and compiled, and what to fall back to."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from trainer.engine.attention import cudnn_fix, flash_attention_4
from trainer.engine.cuda_graphs import PassContext
from trainer.engine.device import torch_dtype
from trainer.engine.memory import checkpointing
from trainer.engine.memory.activation_offload import ActivationOffload, without_graph
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.engine.quantization.frozen_linear import FrozenLinear
from trainer.spec.errors import SettingsError
from trainer.spec.plan import EnginePlan
from trainer.spec.strategies import OFFLOADS_ACTIVATIONS, described, fallbacks

log = logging.getLogger(__name__)


class Engine:
    """Runs the regions of a denoiser in the first of `fallbacks`; `step_down` drops it for the next.

    `regions`: the modules that are compiled and recomputed one by one. `weight_streamer`: of a denoiser whose weights
    are streamed already, from the host or from other GPUs.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        regions: Sequence[torch.nn.Module],
        plan: EnginePlan,
        weight_streamer: WeightStreamer | None = None,
    ) -> None:
        cudnn_fix.apply_fix()
        flash_attention_4.set_enabled(
            plan.attention == "flash_4" and flash_attention_4.supports_model(denoiser, torch_dtype(plan), plan.device)
        )
        self.denoiser = denoiser
        self.regions = list(regions)
        self.weight_streamer = weight_streamer
        self.device = plan.device
        self.offload: ActivationOffload | None = None
        self.compiled = plan.compile
        self.host_gib = plan.host_gib
        self.fallbacks = fallbacks(plan.recompute, plan.kept_blocks, plan.offload, compiled=plan.compile)
        if plan.host_gib is not None and _frozen_bytes(regions) > plan.host_gib * 2**30 and len(self.fallbacks) > 1:
            self.fallbacks.pop()  # the last one streams the weights, for which the host has no memory
        self.keep_transposed(keep=plan.turned_weights)
        self._apply()

    def keep_transposed(self, *, keep: bool) -> None:
        """Create the transposed copies of 8-bit weights for the backward pass, or free them."""
        for layer in self._frozen_layers():
            layer.keep_transposed(keep)

    def _frozen_layers(self) -> list[FrozenLinear]:
        layers: list[FrozenLinear] = []
        for region in self.regions:
            layers += [module for module in region.modules() if isinstance(module, FrozenLinear)]
        return layers

    def drop_adapter_columns(self) -> bool:
        """Free memory that serves speed alone; returns whether there was any.

        First the transposed copies of the weights; in a second call the adapter columns, without which the LoRA term is
        added after each product.
        """
        if self.weight_streamer:
            return False
        layers = self._frozen_layers()
        if any(layer.weight_t_KN is not None for layer in layers):
            self.keep_transposed(keep=False)
            log.info("Dropped the transposed weight copies: less memory, slightly slower.")
            return True
        if not any(layer.rank for layer in layers):
            return False
        for layer in layers:
            layer.drop_adapter_columns()
        if self.offload:
            self.offload.find_weights()
        log.info("Dropped the adapter columns of FP8 weights: less memory, 5 to 10 % slower.")
        return True

    def _apply(self) -> None:
        """Install the first of `fallbacks` on the regions."""
        policy, kept_blocks, offload = self.fallbacks[0]
        kept_blocks = min(kept_blocks, len(self.regions))  # the footprint's variant may have more regions than this one
        policies = ["none"] * kept_blocks + [policy] * (len(self.regions) - kept_blocks)
        checkpointing.apply(self.regions, policies, compiled=self.compiled)
        self.offload = None  # frees its host memory before the weights take some
        assert offload != "shards" or self.is_sharded, "weights are sharded when they are loaded"
        if offload == "weights" and self.weight_streamer is None:
            self.weight_streamer = WeightStreamer(self.device)
            for region in self.regions:
                self.weight_streamer.add_region(region)
            self.weight_streamer.allocate_slots()
        elif offload == "weights" and self.weight_streamer is not None and self.is_sharded:
            self.weight_streamer.move_to_host()
        if self.weight_streamer:
            self.weight_streamer.attach()
        if offload in OFFLOADS_ACTIVATIONS:
            streamed_gib = sum(map(len, self.weight_streamer.buffers)) / 2**30 if self.weight_streamer else 0.0
            limit_gib = None if self.host_gib is None else self.host_gib - streamed_gib
            self.offload = ActivationOffload(self.denoiser, weight_streamer=self.weight_streamer, limit_gib=limit_gib)

    @property
    def is_sharded(self) -> bool:
        """Whether other GPUs have parts of the frozen weights."""
        return self.weight_streamer is not None and self.weight_streamer.shards is not None

    @property
    def compiled_graph_count(self) -> int | None:
        """How many graphs Dynamo has compiled in this process, of all regions and sizes; None: nothing is compiled."""
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) if self.compiled else None

    def can_capture(self, index: int = 0) -> bool:
        """Whether steps can be captured as CUDA graphs in the fallback of this index (0: the one that runs).

        Copies of weights from the host to the device were not tried in a graph.
        """
        return len(self.fallbacks) > index and self.fallbacks[index].offload != "weights"

    def learns_from_first_pass(self) -> bool:
        """Whether the first pass of each size does what later ones build on: compile, or count what is offloaded."""
        return self.compiled or self.offload is not None

    @property
    def next_offloads_more(self) -> bool:
        """Whether the next fallback offloads more, and is slower by that much; also if there is none."""
        return len(self.fallbacks) == 1 or self.fallbacks[1].offload != self.fallbacks[0].offload

    def step_down(self, problem: str) -> None:
        """Drop what runs for the next fallback, which needs less memory. `problem`: a sentence for the log.

        Raises SettingsError if there is none left.
        """
        if len(self.fallbacks) == 1:
            raise SettingsError(
                f"{problem} Fix: lower PARAMS_BATCH_SIZE or PARAMS_RESOLUTION, or use a device with more memory."
            )
        before = self.fallbacks.pop(0)
        now = self.fallbacks[0]
        log.warning("%s Instead of %s: %s.", problem, described(*before), described(*now))
        self.keep_transposed(keep=False)
        try:
            self._apply()
        except torch.OutOfMemoryError:
            self.step_down(problem)

    @contextlib.contextmanager
    def forward_backward(self, inner: PassContext = contextlib.nullcontext) -> Iterator[None]:
        """Around a forward and a backward pass. On leaving, no copy to the device or from it is in flight."""
        self._forget_slots()
        try:
            with inner():
                yield
        finally:
            if self.offload:
                self.offload.join()
            self._forget_slots()

    def saved_tensors(self) -> contextlib.AbstractContextManager[None]:
        """Around a forward pass: offloads the tensors that autograd saves, if there is a backward pass to come."""
        if self.is_sharded:
            return self._saved_from_slots()
        return self.offload if self.offload and torch.is_grad_enabled() else contextlib.nullcontext()

    @contextlib.contextmanager
    def _saved_from_slots(self) -> Iterator[None]:
        """Around a forward pass with sharded weights: those that autograd would save are fetched again."""
        streamer = self.weight_streamer
        assert streamer is not None
        if torch.is_grad_enabled():  # inside `forward_backward`
            with torch.autograd.graph.saved_tensors_hooks(partial(_pack, streamer), streamer.unpack):
                yield
            return
        self._forget_slots()
        try:
            yield
        finally:
            self._forget_slots()

    def _forget_slots(self) -> None:
        """Between passes, some of which are captured as CUDA graphs while others run."""
        if self.is_sharded and self.weight_streamer is not None:
            self.weight_streamer.forget()


def _pack(streamer: WeightStreamer, tensor: torch.Tensor) -> object:
    """For `saved_tensors_hooks`: the description of a streamed weight; any other tensor as it is."""
    packed = streamer.pack(tensor)
    return without_graph(packed) if isinstance(packed, torch.Tensor) else packed


def _frozen_bytes(modules: Sequence[torch.nn.Module]) -> int:
    """Bytes of all frozen parameters and buffers."""
    total = 0
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.requires_grad:
                total += tensor.nbytes
    return total


@contextlib.contextmanager
def without_new_compilation() -> Iterator[None]:
    """Inside, shapes that were not compiled yet run eagerly: samples have other shapes, and too few steps to pay."""
    with torch.compiler.set_stance("eager_on_recompile"):
        yield
