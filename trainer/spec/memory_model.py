"""Predicts the device memory that a plan takes, without torch, and chooses the fastest strategy that fits.

The peak of a training step, in GiB, is the sum of

- the frozen weights on the device, with the adapter columns appended to them (`weights_gib`);
- the adapters with their gradients, the optimiser's state and the average, if one is kept (`trained_gib`);
- for each kilotoken (1,024 tokens of the batch): what the forward pass saves for the backward pass, which depends on
  the recompute policy and the offload mode, and the working memory of the region that is computed.

A strategy is a precision, a memory mode (`trainer.spec.strategies`), a number of blocks exempt from recompute, and the
predicted peak. `candidates` lists them in order of preference, `choose` takes the first that fits, `fastest_batch`
compares batch sizes, and `phase_peaks_gib` predicts the phases before and after training.

`trainer.spec.family.Footprint` has the sizes of each model; `python -m bench memory` prints predictions beside measured
peaks, and tests/trainer/spec/test_memory_model.py holds them to 5 % or 0.5 GiB.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainer.spec.adapter_columns import fits_adapter_columns, padding_for
from trainer.spec.family import Footprint, base_models, lora_formats
from trainer.spec.plan import EnginePlan, Plan
from trainer.spec.strategies import (
    AWAY,
    MEMORY_MODES,
    OFFLOADS,
    OFFLOADS_ACTIVATIONS,
    RECOMPUTE_POLICIES,
    MemoryMode,
    RunningMode,
    described,
    fallbacks,
)
from trainer.spec.weight_formats import PRECISIONS, SAVE_PRECISIONS

GIB = 2**30

FLOAT32_BYTES = 4
# Bytes of an optimiser's state for each trained number, without what `optimizer_bytes` adds.
STATE_BYTES: dict[str, float] = {
    "prodigy": 16,  # two moments, a sum of gradients, and the weights that it began with
    "adamw": 8,
    "adamw8bit": 2,
    "lion": 4,
    "lion8bit": 1,
    "adafactor": 0,
    "adamw-schedulefree": 8,  # the second moment, and the weights that are not averaged
    "prodigy-schedulefree": 4 + 4 / 11,  # those weights; in bf16, of each 11th number, the sum and the first weights
}
# Their second moment of a matrix is a number for each row and one for each column.
FACTORED = ("adafactor", "prodigy-schedulefree")

# Share of the device's memory that a predicted peak may fill. The driver takes the rest, or it is lost in gaps between
# tensors. Activation offload may fill more, because the next strategy, weight streaming, is much slower: the rehearsal
# step finds out whether it really fits.
USABLE_SHARE = 0.93
MAX_USABLE_SHARE = 0.97

# Share of the offloaded activations that may be on their way to the host at once, and again as much on its way back
# (`trainer.engine.memory.activation_offload`; docs/lab-notes.md, "Bounded copies").
IN_FLIGHT_SHARE = 1 / 16
# Regions whose weights are on the device where they come from the host or from other GPUs: the one that runs, and the
# next (`trainer.engine.memory.weight_streaming`).
RESIDENT_REGIONS = 2
# GiB that a step takes besides with weight streaming (`python -m bench step --family flux fp8+all+weights:1`). Sharded
# weights come in the same way.
STREAMING_OVERHEAD_GIB = 1.0
# The share of output features in the input and output features of all layers that have adapters. Without transposed
# copies, only the rows of the weights, which are the outputs, are padded for adapter columns.
OUTPUT_SHARE = 0.54

# The fixed cost of a step, in the time of this many kilotokens. Only the ratio of batch sizes depends on it.
STEP_OVERHEAD_KILOTOKENS = 1.0
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # tried for PARAMS_BATCH_SIZE=auto
# A larger batch is chosen only if it brings this many times the images per second.
MIN_BATCH_SPEEDUP = 1.02

# The VAE, which is alike in all families and runs in fp32 (`python -m bench prepare`): its weights in GiB, and GiB for
# each 2^20 pixels of an image that it encodes or decodes.
VAE_GIB = 0.31
ENCODE_GIB_PER_MEGAPIXEL = 2.6
DECODE_GIB_PER_MEGAPIXEL = 3.2
TILED_DECODE_GIB = 1.0  # decoding in tiles of 512 pixels
ENCODE_BATCH_MEGAPIXELS = 2.0  # millions of pixels that the VAE encodes at once, if memory allows
TEXT_OVERHEAD_GIB = 0.5  # activations of the text encoders where they are whole on the device
CAPTIONS_AT_ONCE = 16  # that are encoded together: of T5, 16 × 512 tokens, which is enough to keep a GPU busy
STREAMED_ENCODER_DIVISOR = 12  # two of T5-XXL's 24 layers are on the device at once


@dataclass(frozen=True)
class Strategy:
    """One way to run a step, and its predicted peak."""

    precision: str  # a key of PRECISIONS
    recompute: str
    kept_blocks: int  # blocks exempt from recompute
    offload: str
    gib: float  # predicted peak of a training step
    transposed: bool = False  # keeps transposed copies of the weights for the backward pass

    @property
    def weights_on_device(self) -> bool:
        """Whether all frozen weights stay on the device; otherwise they come from other GPUs, or from the host."""
        return self.offload not in AWAY

    @property
    def mode(self) -> tuple[str, str]:
        """The recompute policy and the offload mode."""
        return self.recompute, self.offload

    def __str__(self) -> str:
        mode = described(self.recompute, self.kept_blocks, self.offload)
        copies = ", transposed weight copies" if self.transposed else ""
        return f"{self.precision}, {mode}{copies}: {self.gib:.1f} GiB"


@dataclass(frozen=True)
class Workload:
    """The size of a step."""

    pixels: int  # of one image
    batch: int  # images
    rank: int  # of the adapters
    optimizer: str
    optimizer_args: Mapping[str, Any] = field(default_factory=dict, hash=False)  # PARAMS_OPTIMIZER_ARGS
    ema: bool = False  # an average of the trained numbers is kept (`trainer.training.ema`)
    shards: int = 1  # GPUs over which the frozen weights may be sharded; 1: over none

    def kilotokens(self, footprint: Footprint) -> float:
        """Thousands (1,024) of tokens in a batch: one for each 16 x 16 pixels, and those of the captions."""
        return self.batch * (self.pixels / 256 + footprint.text_tokens) / 1024


def _is_fp8(precision: str) -> bool:
    """Whether frozen weights are multiplied in FP8, by our own fused blocks."""
    return PRECISIONS[precision].weight_format == "fp8"


def _activation_bytes(precision: str) -> int:
    """Bytes of one number of an activation."""
    return 4 if PRECISIONS[precision].dtype == "float32" else 2


def weights_gib(
    footprint: Footprint,
    rank: int,
    precision: str,
    offload: str = "none",
    *,
    transposed: bool = False,
    shards: int = 1,
) -> float:
    """The denoiser's frozen weights on the device, with padding for adapter columns, in GiB.

    `transposed`: with transposed copies, which are padded too. `shards`: see `Workload`.
    """
    bytes_per_weight = PRECISIONS[precision].bytes or _activation_bytes(precision)
    on_device = footprint.block_weights
    if offload in AWAY:
        on_device = RESIDENT_REGIONS * footprint.largest_region_weights
    if offload == "shards":
        on_device += footprint.block_weights / shards
    copies = footprint.fp8_weights if transposed else 0.0  # one byte each
    padding = 0.0
    if _is_fp8(precision) and fits_adapter_columns(rank, footprint.hidden_size):
        padded_share = 1.0 if transposed else OUTPUT_SHARE
        columns = padding_for(rank, footprint.hidden_size)
        # A weight has as many rows (or, transposed, columns) as its adapter has numbers for each rank.
        padding = padded_share * footprint.adapter_weights_per_rank * columns * on_device / footprint.block_weights
    others = footprint.other_weights * _activation_bytes(precision)
    return (on_device * bytes_per_weight + copies + others + padding) / GIB


def optimizer_bytes(optimizer: str, args: Mapping[str, Any], rank: int) -> float:
    """What an optimiser keeps for each number that it trains, in bytes, averaged over an adapter's matrices.

    `args`: PARAMS_OPTIMIZER_ARGS. Of those that make a state smaller, only `factored` is counted.
    """
    kept = STATE_BYTES[optimizer]
    if optimizer in FACTORED:
        is_whole = args.get("factored") is False or args.get("use_focus") is True
        # An adapter's matrix has `rank` rows or columns. The other side is so much longer that only it counts.
        kept += FLOAT32_BYTES if is_whole else FLOAT32_BYTES / rank
    if args.get("amsgrad") is True:  # of adamw: the largest second moment
        kept += FLOAT32_BYTES
    if args.get("beta1") is not None:  # of adafactor: a first moment
        kept += FLOAT32_BYTES
    return kept


def trained_gib(footprint: Footprint, workload: Workload) -> float:
    """The adapters with their gradients, the optimiser's state and the average, in GiB."""
    kept = 2 * FLOAT32_BYTES + optimizer_bytes(workload.optimizer, workload.optimizer_args, workload.rank)
    if workload.ema:
        kept += FLOAT32_BYTES
    return footprint.adapter_weights_per_rank * workload.rank * kept / GIB


def lora_bytes(plan: Plan) -> float | None:
    """The size of the LoRA files of one save, with all of the family's targets; None for a miniature."""
    footprint = base_models()[plan.model.base][1].footprint
    if footprint is None:
        return None
    kohya = footprint.split_kohya_weights_per_rank if plan.lora.split_qkv else footprint.kohya_weights_per_rank
    per_rank = {"kohya": kohya, "native": kohya, "peft": footprint.peft_weights_per_rank}
    numbers = sum(per_rank[key_format] for key_format in lora_formats(plan.model.base, plan.lora.kind))
    return numbers * plan.lora.rank * SAVE_PRECISIONS[plan.output.save_precision].bytes


def state_bytes(footprint: Footprint, plan: Plan) -> float:
    """The size of a state: the adapters, what the optimiser keeps of each number and the average, but no gradients."""
    rank = plan.lora.rank
    kept = FLOAT32_BYTES + optimizer_bytes(plan.optim.name, plan.optim.args, rank)
    if plan.train.ema_decay:
        kept += FLOAT32_BYTES
    return footprint.adapter_weights_per_rank * rank * kept


def _saved_gib_per_kilotoken(
    footprint: Footprint, *, precision: str, recompute: str, kept_blocks: int, offload: str
) -> float:
    """What the forward pass keeps on the device for the backward pass, for each kilotoken in 16 bits."""
    everything = footprint.saved_gib["none"] * (1.0 if _is_fp8(precision) else footprint.unfused_factor)
    saved = everything if recompute == "none" else footprint.saved_gib[recompute]
    if offload in OFFLOADS_ACTIVATIONS:
        # All but what is on its way, in both directions, is on the host.
        return footprint.saved_gib["host"] + 2 * IN_FLIGHT_SHARE * saved
    kept_share = kept_blocks / footprint.region_count
    return saved * (1 - kept_share) + everything * kept_share


def predict_peak_gib(
    footprint: Footprint,
    workload: Workload,
    *,
    precision: str,
    recompute: str,
    kept_blocks: int = 0,
    offload: str = "none",
    transposed: bool = False,
) -> float:
    """The peak of a training step, in GiB."""
    saved = _saved_gib_per_kilotoken(
        footprint, precision=precision, recompute=recompute, kept_blocks=kept_blocks, offload=offload
    )
    kilotokens = workload.kilotokens(footprint) * _activation_bytes(precision) / 2  # the footprint counts 16 bits
    frozen = weights_gib(footprint, workload.rank, precision, offload, transposed=transposed, shards=workload.shards)
    streaming = STREAMING_OVERHEAD_GIB if offload in AWAY else 0.0
    return frozen + streaming + trained_gib(footprint, workload) + kilotokens * (footprint.working_gib + saved)


def pinned_host_gib(footprint: Footprint, workload: Workload, strategy: Strategy) -> float:
    """The pinned host memory that a strategy takes, in GiB."""
    if strategy.offload not in OFFLOADS_ACTIVATIONS:
        return 0.0
    streamed = 0.0
    if strategy.offload == "weights":
        streamed = weights_gib(footprint, workload.rank, strategy.precision)
    saved = footprint.saved_gib[strategy.recompute] * workload.kilotokens(footprint)
    return saved * _activation_bytes(strategy.precision) / 2 + streamed


def candidates(footprint: Footprint, workload: Workload, precisions: Iterable[str]) -> list[Strategy]:
    """The strategies to try, in order of preference.

    First each precision in turn with its weights on the device; then, in the last of them, which has the fewest bytes
    to transfer, the weights sharded over the GPUs, if there are several, and streamed from the host. 4 bits lose more
    than rounding, so they come after all of that, in the same order.
    """
    of_8_bits_or_more: list[str] = []
    of_4_bits: list[str] = []
    for precision in precisions:
        bytes_per_weight = PRECISIONS[precision].bytes
        if bytes_per_weight is None or bytes_per_weight >= 1:
            of_8_bits_or_more.append(precision)
        else:
            of_4_bits.append(precision)

    strategies: list[Strategy] = []

    def add(precision: str, mode: MemoryMode) -> None:
        gib = predict_peak_gib(footprint, workload, precision=precision, recompute=mode.recompute, offload=mode.offload)
        strategies.append(Strategy(precision, mode.recompute, 0, mode.offload, gib))

    on_device = [mode for mode in MEMORY_MODES if mode.weights_on_device]
    streamed: list[MemoryMode] = []
    for mode in MEMORY_MODES:
        if mode.offload == "weights" or (mode.offload == "shards" and workload.shards > 1):
            streamed.append(mode)
    for group in (of_8_bits_or_more, of_4_bits):
        for precision in group:
            for mode in on_device:
                add(precision, mode)
        for precision in group[-1:]:
            for mode in streamed:
                add(precision, mode)
    return strategies


def choose(
    footprint: Footprint,
    workload: Workload,
    strategies: Sequence[Strategy],
    *,
    have_gib: float,
    host_gib: float,
    captured: bool = False,
) -> Strategy:
    """The first strategy that fits, or the one with the lowest peak; what memory is left makes it faster.

    `have_gib`: memory of the device. `host_gib`: memory of the host that may be pinned. `captured`: whether steps are
    captured as CUDA graphs, which take memory of their own.
    """
    possible: list[Strategy] = []
    for strategy in strategies:
        if pinned_host_gib(footprint, workload, strategy) <= host_gib:
            possible.append(strategy)
    possible = possible or list(strategies)
    usable_gib = have_gib * USABLE_SHARE
    limits_gib = dict.fromkeys(OFFLOADS, usable_gib) | {"activations": have_gib * MAX_USABLE_SHARE}
    chosen = min(possible, key=lambda strategy: strategy.gib)
    for strategy in possible:
        if strategy.gib <= limits_gib[strategy.offload]:
            chosen = strategy
            break
    return _use_spare_memory(footprint, workload, chosen, usable_gib=usable_gib, captured=captured)


def _use_spare_memory(
    footprint: Footprint, workload: Workload, strategy: Strategy, *, usable_gib: float, captured: bool
) -> Strategy:
    """Spend the memory that is left on blocks exempt from recompute, or on transposed copies of the weights."""

    def changed(*, transposed: bool = False, kept_blocks: int = 0) -> Strategy:
        """`strategy`, which offloads no activations, with these."""
        gib = predict_peak_gib(
            footprint,
            workload,
            precision=strategy.precision,
            recompute=strategy.recompute,
            offload=strategy.offload,
            kept_blocks=kept_blocks,
            transposed=transposed,
        )
        return replace(strategy, kept_blocks=kept_blocks, transposed=transposed, gib=gib)

    mode = strategy.mode
    if mode == ("none", "none") and _is_fp8(strategy.precision):
        with_copies = changed(transposed=True)
        return with_copies if with_copies.gib <= usable_gib else strategy
    if strategy.recompute not in ("products", "attention") or strategy.offload in OFFLOADS_ACTIVATIONS:
        return strategy
    # A graph of a step that recomputes reserves more than it allocates (docs/lab-notes.md, "Memory of a captured
    # graph"); without that memory the step would be launched kernel by kernel.
    reserved_gib = footprint.capture_gib if captured else 0.0
    spare_gib = max(0.0, usable_gib - strategy.gib - reserved_gib)
    all_exempt_gib = changed(kept_blocks=footprint.region_count).gib
    affordable = int(spare_gib / (all_exempt_gib - strategy.gib) * footprint.region_count)
    return changed(kept_blocks=min(footprint.region_count, affordable))


def with_room_for_graphs(
    footprint: Footprint, workload: Workload, plan: EnginePlan, *, graphs: int, have_gib: float
) -> EnginePlan:
    """`plan`, changed as far as the driver's memory for so many CUDA graphs needs it.

    For a plan that was made before the number of sizes of steps was known. First the transposed copies go, and blocks
    that are exempt from recompute; then the next memory modes are taken (`strategies.fallbacks`), as long as they can
    be captured. A plan that nothing helps stays as it is: the rehearsal finds out.
    """
    graphs_gib = graphs * footprint.graph_gib

    def fits(mode: RunningMode, *, transposed: bool) -> bool:
        gib = predict_peak_gib(
            footprint,
            workload,
            precision=plan.precision,
            recompute=mode.recompute,
            kept_blocks=mode.kept_blocks,
            offload=mode.offload,
            transposed=transposed,
        )
        strategy = Strategy(plan.precision, mode.recompute, mode.kept_blocks, mode.offload, gib)
        if pinned_host_gib(footprint, workload, strategy) > (plan.host_gib or math.inf):
            return False
        reserved_gib = footprint.capture_gib if mode.kept_blocks else 0.0  # as in `_use_spare_memory`
        share = MAX_USABLE_SHARE if mode.offload == "activations" else USABLE_SHARE
        return gib + reserved_gib + graphs_gib <= have_gib * share

    first, *others = fallbacks(plan.recompute, plan.kept_blocks, plan.offload, compiled=plan.compile)
    tried = [(first, plan.turned_weights)]
    for count in range(first.kept_blocks, -1, -1):
        tried.append((first._replace(kept_blocks=count), False))
    for mode in others:
        if mode.offload != "weights":
            tried.append((mode, False))
    for mode, transposed in tried:
        if fits(mode, transposed=transposed):
            return replace(plan, **mode._asdict(), turned_weights=transposed)
    return plan


def relative_speed(footprint: Footprint, workload: Workload, strategy: Strategy) -> float:
    """Images per unit of time. Only for comparing batch sizes with the same images on the same hardware."""
    kept_share = strategy.kept_blocks / footprint.region_count
    policy = RECOMPUTE_POLICIES[strategy.recompute]
    cost = policy.step_cost * (1 - kept_share) + RECOMPUTE_POLICIES["none"].step_cost * kept_share
    slowdown = OFFLOADS[strategy.offload].slowdown
    return workload.batch / (STEP_OVERHEAD_KILOTOKENS + workload.kilotokens(footprint) * cost * slowdown)


def fastest_batch(footprint: Footprint, tried: Iterable[tuple[Workload, Strategy]]) -> tuple[Workload, Strategy]:
    """The batch with the most images per second. `tried`: smallest batch first; a larger one must be worth it."""
    fastest: tuple[Workload, Strategy] | None = None
    fastest_speed = 0.0
    for workload, strategy in tried:
        speed = relative_speed(footprint, workload, strategy)
        if speed > fastest_speed * MIN_BATCH_SPEEDUP:
            fastest = (workload, strategy)
            fastest_speed = speed
    assert fastest is not None
    return fastest


def captions_at_once(footprint: Footprint | None, precision: str, *, streamed: bool) -> int:
    """How many captions the text encoders encode together.

    Where they are whole on the device, as many as TEXT_OVERHEAD_GIB has room for, and one at least. Where they are
    streamed there is more room, and each batch brings all layers from the host.
    `footprint`: None for a miniature.
    """
    if footprint is None or streamed:
        return CAPTIONS_AT_ONCE
    fitting = TEXT_OVERHEAD_GIB / _caption_gib(footprint, precision)
    return max(1, min(CAPTIONS_AT_ONCE, int(fitting)))


def _caption_gib(footprint: Footprint, precision: str) -> float:
    return footprint.caption_gib * _activation_bytes(precision) / 2


def phase_peaks_gib(
    footprint: Footprint,
    workload: Workload,
    strategy: Strategy,
    *,
    streamed: bool,
    tiled: bool,
    drawn_pixels: int,
    encoded_pixels: int,
) -> dict[str, float]:
    """The predicted peak of each phase of a job, in GiB.

    `streamed`: the layers of the text encoders come to the device one by one. `tiled`: samples are decoded in tiles,
    and images encoded one by one. `drawn_pixels`: of the largest sample. `encoded_pixels`: of the largest image.
    """
    encoders_gib = footprint.encoder_weights * _activation_bytes(strategy.precision) / GIB
    captions = captions_at_once(footprint, strategy.precision, streamed=streamed)
    captions_gib = max(TEXT_OVERHEAD_GIB, captions * _caption_gib(footprint, strategy.precision))
    images_at_once = 1 if tiled else math.ceil(ENCODE_BATCH_MEGAPIXELS * 1e6 / encoded_pixels)
    decode_gib = TILED_DECODE_GIB if tiled else DECODE_GIB_PER_MEGAPIXEL * drawn_pixels / 2**20
    frozen_gib = weights_gib(
        footprint,
        workload.rank,
        strategy.precision,
        strategy.offload,
        transposed=strategy.transposed,
        shards=workload.shards,
    )
    return {
        "texts": captions_gib + (encoders_gib / STREAMED_ENCODER_DIVISOR if streamed else encoders_gib),
        "latents": VAE_GIB + ENCODE_GIB_PER_MEGAPIXEL * images_at_once * encoded_pixels / 2**20,
        "training": strategy.gib,
        "samples": frozen_gib + trained_gib(footprint, workload) + VAE_GIB + decode_gib,
    }
