"""A denoiser made ready to train fast in the memory there is: its weights' format, what is kept and compiled."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer import attention, flash, kernel_check, keys, lora, recompute
from trainer.assemble import HALF
from trainer.errors import SettingsError
from trainer.families import Family
from trainer.frozen import FORMS, FrozenLinear, freeze
from trainer.fused import install
from trainer.memory import OFFLOADS, described
from trainer.offload import Offload
from trainer.plan import EnginePlan
from trainer.precision import form_for
from trainer.replay import Around
from trainer.standin import NAMES
from trainer.stream import Stream

log = logging.getLogger(__name__)


def stored(folder: Path) -> torch.dtype:
    """The format that most of the weights in a part's folder are in: loaded so, they stay in the mapped files."""
    sizes: Counter[str] = Counter()
    for file in (f for f in folder.glob("*.safetensors") if HALF not in f.name):
        for entry in keys.read_header(file).entries.values():
            sizes[entry.dtype] += entry.end - entry.begin
    most = sizes.most_common(1)[0][0]
    return next((dtype for dtype, name in NAMES.items() if name == most), torch.bfloat16)  # which holds all of fp8


def limit_memory(device: str, gib: float | None) -> None:
    """Hold all that this process allocates from now on under a cap of the device's memory."""
    if gib and device == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / whole))


def reserve(device: str, *, launched: bool) -> int:
    """Bytes that a rehearsal does without, for later steps may find theirs in smaller pieces (docs/lab-notes.md)."""
    if device != "cuda":
        return 0
    if not launched:
        return 2**26
    share = torch.cuda.get_per_process_memory_fraction()
    return max(2**26, int(share * torch.cuda.get_device_properties(0).total_memory / 64))


def torch_dtype(plan: EnginePlan) -> torch.dtype:
    """What activations are computed in."""
    dtype: torch.dtype = getattr(torch, plan.dtype)
    return dtype


def place(
    denoiser: Any,
    blocks: lora.Blocks,
    *,
    precision: str,
    dtype: torch.dtype,
    device: str,
    fused: lora.Fused,
    targets: Sequence[str],
    rank: int = 0,
    streamed: Sequence[torch.nn.Module] = (),
    forwards: Mapping[type, type] | None = None,
) -> Stream | None:
    """Bring the denoiser to `device` block by block, in the format of `precision`, joining projections on the way.

    Neither the host nor the device ever holds more than one block besides the mapped file and the result. The weights
    of the regions `streamed` stay on the host; the stream that brings them is returned. `rank`: of the adapters that
    the layers will get; `forwards`: see `Family.forwards`.
    """
    form = form_for(precision, device)
    parts = [*(block for _, block in blocks), *streamed]
    outside = set(denoiser.modules()) - {m for part in parts for m in part.modules()}  # what is replaced must not stay
    stream = Stream(device) if streamed else None
    ends = lora.adapted(targets, fused)
    for module in outside:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.to(device, dtype if tensor.is_floating_point() else None)
    for name, block in blocks:
        block.to(device, dtype)
        lora.fuse([(name, block)], fused=fused, targets=targets)
        if form is not None:
            freeze(block, form, lambda name: rank if lora.targeted(name, ends) else 0)
            install(block, forwards or {})
        if stream:
            for region in (m for m in block.modules() if m in streamed):
                stream.take(region)
    if stream:
        for region in (r for r in streamed if r not in stream.regions):
            _channels_last(region.to(device, dtype), device)
            stream.take(region)
        stream.settle()
    denoiser.to(device)
    _channels_last(denoiser, device)
    return stream


def _channels_last(module: Any, device: str) -> None:
    """As convolutions on tensor cores want their weights."""
    if device == "cuda":
        module.to(memory_format=torch.channels_last)


def loaded(
    kind: Family, model: Path, plan: EnginePlan, *, fused: lora.Fused, targets: Sequence[str], rank: int = 0
) -> tuple[Any, Stream | None]:
    """The denoiser in `model` as `plan` wants it (see `place`), and the stream of its weights if there is one."""
    denoiser = kind.load_denoiser(model, device="cpu", dtype=stored(model / kind.FACTS.parts["denoiser"]))
    forwards = _forwards(kind, plan)
    if plan.attention not in ("native", "flash_4"):
        denoiser.set_attention_backend(plan.attention)
    stream = place(
        denoiser,
        kind.blocks(denoiser),
        precision=plan.precision,
        dtype=torch_dtype(plan),
        device=plan.device,
        fused=fused,
        targets=targets,
        rank=rank if forwards else 0,  # of that, too, the kernels are checked
        streamed=kind.regions(denoiser) if plan.offload == "weights" else (),
        forwards=forwards,
    )
    return denoiser, stream


def _forwards(kind: Family, plan: EnginePlan) -> Mapping[type, type]:
    """The family's own forward passes of blocks, if products are in FP8 and the kernels do what they should here."""
    form = form_for(plan.precision, plan.device)
    if form is None or form not in FORMS or not FORMS[form].turns:
        return {}
    return kind.forwards() if kernel_check.agree(plan.device, FORMS[form].dtype) else {}


class Engine:
    """How the regions of a denoiser run (see `trainer.recompute`). `lower` trades speed for memory."""

    def __init__(
        self,
        denoiser: torch.nn.Module,
        regions: Sequence[torch.nn.Module],
        plan: EnginePlan,
        stream: Stream | None = None,
    ) -> None:
        attention.mend()
        flash.use(plan.attention == "flash_4" and flash.suits(denoiser, torch_dtype(plan), plan.device))
        self.denoiser, self.regions, self.stream, self.device = denoiser, list(regions), stream, plan.device
        self.offload: Offload | None = None
        self.compiled, self.host_gib = plan.compile, plan.host_gib
        self.rungs = rungs(plan.recompute, plan.kept_blocks, plan.offload, compiled=plan.compile)
        frozen = sum(t.nbytes for r in regions for t in (*r.parameters(), *r.buffers()) if not t.requires_grad)
        if plan.host_gib is not None and frozen > plan.host_gib * 2**30 and len(self.rungs) > 1:
            self.rungs.pop()  # the last, which sends the weights to the host
        self.turn(keep=plan.turned_weights)
        self._climb()

    def turn(self, *, keep: bool) -> None:
        """Keep the weights turned round as well, or do not."""
        for layer in self._layers():
            layer.turn(keep)

    def _layers(self) -> list[FrozenLinear]:
        return [m for region in self.regions for m in region.modules() if isinstance(m, FrozenLinear)]

    def narrow(self) -> bool:
        """Give up what is there for speed alone: copies turned round; then columns beside the weights. Whether it did.

        Without those, adapters are added after the products.
        """
        if self.stream:
            return False
        layers = self._layers()
        if any(layer.turned_KF is not None for layer in layers):
            self.turn(keep=False)
            log.info("The weights are not kept turned round any more, which takes less memory and a little more time.")
            return True
        if not any(layer.rank for layer in layers):
            return False
        for layer in layers:
            layer.narrow()
        if self.offload:
            self.offload.know()
        log.info("Adapters are no part of products any more, which takes less memory and 5 to 10 % more time.")
        return True

    def _climb(self) -> None:
        policy, kept, offload = self.rungs[0]
        kept = min(kept, len(self.regions))  # of a variant that may have fewer than its family's footprint says
        policies = ["none"] * kept + [policy] * (len(self.regions) - kept)
        recompute.apply(self.regions, policies, compiled=self.compiled)
        self.offload = None  # with what it holds
        if offload == "weights" and self.stream is None:
            self.stream = Stream(self.device)
            for region in self.regions:
                self.stream.take(region)
            self.stream.settle()
        if self.stream:
            self.stream.wrap()
        if offload != "none":
            taken = sum(map(len, self.stream.buffers)) / 2**30 if self.stream else 0.0
            limit = None if self.host_gib is None else self.host_gib - taken
            self.offload = Offload(self.denoiser, stream=self.stream, limit_gib=limit)

    @property
    def graphs(self) -> int | None:
        """How many graphs were compiled so far, of all kinds of regions and sizes; None: nothing is compiled."""
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) if self.compiled else None

    def records(self, rung: int = 0) -> bool:
        """Whether steps may be recorded: this way, or one further down. What streams weights decides as it goes."""
        return len(self.rungs) > rung and self.rungs[rung][2] != "weights"

    @property
    def steep(self) -> bool:
        """Whether the next way down sends more to the host, and is that much slower; or there is none."""
        return len(self.rungs) == 1 or self.rungs[1][2] != self.rungs[0][2]

    def lower(self, problem: str) -> None:
        """The next way, with less memory. Raises SettingsError where there is none."""
        if len(self.rungs) == 1:
            raise SettingsError(f"{problem} Fix: lower PARAMS_BATCH_SIZE or PARAMS_RESOLUTION, or give it more memory.")
        before, now = self.rungs.pop(0), self.rungs[0]
        log.warning("%s Instead of %s: %s.", problem, described(*before), described(*now))
        self.turn(keep=False)
        try:
            self._climb()
        except torch.OutOfMemoryError:
            self.lower(problem)

    @contextlib.contextmanager
    def passing(self, inside: Around = contextlib.nullcontext) -> Iterator[None]:
        """Around a forward pass and its backward pass: at the end, nothing is on its way to the host or back."""
        try:
            with inside():
                yield
        finally:
            if self.offload:
                self.offload.join()

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """Around a forward pass: where the tensors go that the backward pass needs."""
        return self.offload if self.offload and torch.is_grad_enabled() else contextlib.nullcontext()


def rungs(policy: str, kept: int, offload: str, *, compiled: bool) -> list[tuple[str, int, str]]:
    """This way to run and those below it, each with less memory: (policy, blocks that keep all, offload)."""
    # Without the compiler, what a policy keeps is held by the checkpoint itself, and does not go to the host.
    # It takes less of the device than all that is recomputed there, which is tried if the host has no such memory.
    waiting = [("attention", "activations")] if compiled else []
    ladder = [
        ("products", "none"),
        ("attention", "none"),
        *waiting,
        ("all", "none"),
        ("all", "activations"),
        ("all", "weights"),
    ]
    less, further = tuple(recompute.POLICIES), tuple(OFFLOADS)
    below = [
        (p, 0, o)
        for p, o in ladder
        if less.index(p) <= less.index(policy) and further.index(o) >= further.index(offload)
        if (p, 0, o) != (policy, kept, offload)
    ]
    return [(policy, kept, offload), *below]


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Inside, nothing new is compiled: samples have shapes of their own, and few steps."""
    with torch.compiler.set_stance("eager_on_recompile"):
        yield
