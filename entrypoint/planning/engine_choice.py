"""How the plan uses the hardware: precision, recompute policy, offload, compilation, attention, number of GPUs.

`engine_plan` is the entry. A miniature, or a CPU, gets a plan that keeps everything (`_unlimited`); for a published
model on an accelerator, `_fit_memory` picks the fastest strategy that `trainer.spec.memory_model` predicts to fit. Each
choice that a setting left to `auto` is noted with its reason, for the log.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

from entrypoint.fetch import flash_attention
from entrypoint.planning import memory_refusal
from entrypoint.settings.checks import Notes
from entrypoint.settings.read import Settings
from entrypoint.settings.variables.engine import UNMASKED
from entrypoint.system.hardware import Hardware, select
from trainer.spec import memory_model
from trainer.spec.errors import SettingsError
from trainer.spec.family import BaseModel, Facts, Footprint
from trainer.spec.memory_model import Strategy, Workload
from trainer.spec.plan import Dataset, EnginePlan, Prompt
from trainer.spec.strategies import memory_mode
from trainer.spec.values import show
from trainer.spec.weight_formats import PRECISIONS

RECOMPUTE_POLICY = {True: "all", False: "none"}  # by PARAMS_GRADIENT_CHECKPOINTING, where memory does not matter
SHOWN_TOO_LARGE = 3  # memory modes that are faster than the chosen one: the nearest
# Share of the host's memory that may be pinned, which the kernel cannot swap out or give to its file cache.
PINNED_HOST_SHARE = 0.5


def engine_plan(
    settings: Settings,
    found: Hardware,
    *,
    facts: Facts,
    model: BaseModel,
    datasets: tuple[Dataset, ...],
    rank: int,
    trains_text: bool,
    prompts: tuple[Prompt, ...],
    notes: Notes,
) -> tuple[EnginePlan, tuple[Dataset, ...]]:
    """Choose for the hardware and the largest batch all that the settings leave to `auto`, and note the reasons.

    `trains_text`: whether a text encoder is trained. Returns the datasets as well: with their batch size, where that
    was left to `auto`.
    """
    try:
        hardware = select(found, settings.engine.backend)
    except SettingsError as problem:
        notes.add(str(problem))
        hardware = found
    if settings.engine.backend == "auto":
        notes.chose("BACKEND", hardware.backend, str(hardware))
    if settings.engine.precision not in ("auto", *hardware.formats):
        needs, allowed = PRECISIONS[settings.engine.precision].needs, ", ".join(("auto", *hardware.formats))
        what = f"PARAMS_PRECISION={show(settings.engine.precision)} is not what {hardware} can do"
        notes.add(f"{what}: it needs {needs}. Allowed: {allowed}.")
    plan = EnginePlan(
        device=hardware.device,
        num_gpus=_num_gpus(settings, hardware, notes),
        nodes=settings.engine.nodes or 1,  # auto: the entrypoint has asked the cluster before
        # Text encoders that train tokenise captions inside the step, which no CUDA graph can hold.
        replay=hardware.can_capture and not trains_text,
        attention=_attention(settings, hardware, facts, model, notes),
        deterministic=settings.engine.deterministic,
        memory_limit_gib=settings.engine.memory_limit_gib,
        step_timeout_s=settings.engine.step_timeout,
    )
    _check_shards(settings, hardware, plan, notes)
    if model.footprint is None or hardware.device == "cpu":
        plan = _unlimited(settings, hardware, plan, notes=notes)
    else:
        plan, datasets = _fit_memory(
            settings,
            hardware,
            plan,
            model.footprint,
            datasets,
            rank=rank,
            drawn_pixels=_largest_sample(settings, datasets, prompts),
            compiles=_may_compile(settings, plan, facts.compiles),
            notes=notes,
        )
    return dataclasses.replace(plan, compile=_compiled(settings, plan, facts.compiles, notes)), datasets


def _largest_sample(settings: Settings, datasets: Sequence[Dataset], prompts: Sequence[Prompt]) -> int:
    """Pixels of the largest image that the job draws: a sample, or a class image. 0: it draws none."""
    sizes: list[tuple[int, int]] = []
    if settings.output.sample_every_n_steps:
        sizes += [(prompt.width, prompt.height) for prompt in prompts]
    for dataset in datasets:
        if any(subset.source.kind == "generated" for subset in dataset.subsets):
            sizes.append(dataset.resolution)
    return max((width * height for width, height in sizes), default=0)


def _may_compile(settings: Settings, plan: EnginePlan, compiles: bool) -> bool:
    """Whether blocks may be compiled; `_compiled` decides, once it is known what is recomputed."""
    if settings.engine.compile is not None:
        return settings.engine.compile
    return compiles or not plan.replay


def _compiled(settings: Settings, plan: EnginePlan, compiles: bool, notes: Notes) -> bool:
    """Whether the blocks are compiled. Where steps are captured, compiling takes longer than it saves in most jobs.

    `compiles`: see `Facts.compiles`.
    """
    if settings.engine.compile is not None:
        return settings.engine.compile
    fused = PRECISIONS[plan.precision].weight_format == "fp8" and settings.adapter.lora_type != "dora"
    captured = plan.replay and plan.offload != "weights"
    if plan.device == "cpu":
        chosen, why = False, "compiling takes longer than it saves on a CPU"
    elif captured and not compiles:
        chosen, why = False, "compiling its many kinds of blocks takes minutes; steps are captured as CUDA graphs"
    elif captured and fused and not memory_mode(plan.recompute, plan.offload).needs_compiler:
        chosen, why = False, "steps are captured as CUDA graphs, and their kernels are fused already"
    else:
        chosen, why = True, "faster on accelerators"
    notes.chose("PARAMS_COMPILE", chosen, why)
    return chosen


def _attention(settings: Settings, hardware: Hardware, facts: Facts, model: BaseModel, notes: Notes) -> str:
    """The implementation of attention: the one that PARAMS_ATTENTION names, or the fastest that is installed."""
    asked = settings.engine.attention
    if asked == "auto":
        chosen, why = "native", "torch picks the kernel"
        # The heads of a miniature are narrower than FlashAttention 4 takes.
        if hardware.fastest_attention == "flash_4" and not model.is_miniature:
            if flash_attention.is_installed(settings.data.cache_path):
                chosen, why = "flash_4", "the fastest here"
            else:
                why += "; flash_4 is faster here, and PARAMS_ATTENTION=flash_4 installs it"
        notes.chose("PARAMS_ATTENTION", chosen, why)
        return chosen
    if asked == "flash_4":
        if not hardware.runs_flash_4:
            what = f"PARAMS_ATTENTION=flash_4 needs compute capability 9.0 or more, which {hardware} does not have."
            notes.add(f"{what} Fix: set PARAMS_ATTENTION=auto.")
    elif asked != "native" and not facts.attention_backends:
        notes.add(
            f"PARAMS_ATTENTION={asked}: {settings.model.base_model} supports only torch's own attention. "
            "Allowed: auto, native, flash_4."
        )
    elif asked in UNMASKED and facts.masks_captions:
        notes.add(
            f"PARAMS_ATTENTION={asked} takes no mask, and {settings.model.base_model} masks what fills up shorter "
            "captions. Fix: set PARAMS_ATTENTION=auto."
        )
    return asked


def _num_gpus(settings: Settings, hardware: Hardware, notes: Notes) -> int:
    """How many processes train together. A CPU takes any number, for trying it out."""
    asked = settings.engine.num_gpus
    available = hardware.count
    if hardware.device == "cpu":
        return asked or 1
    if asked > available:
        notes.add(f"NUM_GPUS={asked}: there are not so many here, only {hardware}. Allowed: auto, 1 to {available}.")
        return 1
    if asked or available == 1:
        return asked or 1
    # More GPUs mean larger batches and fewer steps, which changes the training: the user decides.
    several = f"NUM_GPUS={available} trains on all of them with {available} times as many images a step"
    notes.chose("NUM_GPUS", 1, f"keeps the batch size; {several}")
    return 1


def _check_shards(settings: Settings, hardware: Hardware, plan: EnginePlan, notes: Notes) -> None:
    """Note weights that are to be sharded over GPUs where they cannot be."""
    if settings.engine.offload != "shards":
        return
    if settings.adapter.lora_type == "dora":
        notes.add("PARAMS_OFFLOAD=shards does not work with PARAMS_LORA_TYPE=dora. Fix: change one of them.")
    if plan.num_gpus == 1:
        notes.add(
            "PARAMS_OFFLOAD=shards spreads the weights over the GPUs of a job, and this job has one. Fix: set "
            "NUM_GPUS=2 or more, or PARAMS_OFFLOAD=auto."
        )
    elif not hardware.reach_each_other(plan.num_gpus):
        which = str(hardware)
        if plan.num_gpus < hardware.count:
            which = f"the first {plan.num_gpus} of {hardware}"
        notes.add(
            f"PARAMS_OFFLOAD=shards: by their driver, {which}, cannot read each other's memory. Fix: set "
            "PARAMS_OFFLOAD=auto."
        )


def _shards(settings: Settings, hardware: Hardware, plan: EnginePlan) -> int:
    """Over how many GPUs the weights may be sharded; 1: they may not."""
    is_allowed = settings.engine.offload in ("auto", "shards") and settings.adapter.lora_type != "dora"
    return plan.num_gpus if is_allowed and hardware.reach_each_other(plan.num_gpus) else 1


def _unlimited(settings: Settings, hardware: Hardware, plan: EnginePlan, *, notes: Notes) -> EnginePlan:
    """The plan for a miniature, which fits anywhere, or for a CPU, where no device memory is short."""
    precision = settings.engine.precision
    if precision == "auto":
        precision = hardware.unquantized_precision
        notes.chose("PARAMS_PRECISION", precision, f"best for {hardware}")
    if settings.engine.offload not in ("auto", "none", "shards") and hardware.device == "cpu":
        notes.add(
            f"PARAMS_OFFLOAD={settings.engine.offload} needs an accelerator: on a CPU there is only host memory. "
            "Allowed: auto, none; shards with NUM_GPUS=2 or more."
        )
    elif settings.engine.offload == "weights" and settings.adapter.lora_type == "dora":
        notes.add("PARAMS_OFFLOAD=weights does not work with PARAMS_LORA_TYPE=dora. Fix: change one of them.")
    if settings.data.batch_size == 0:
        notes.chose("PARAMS_BATCH_SIZE", "dataset.json's", "the speed of this model is not known here")
    return dataclasses.replace(
        plan,
        precision=precision,
        dtype=hardware.activation_dtype(precision),
        recompute=RECOMPUTE_POLICY[bool(settings.engine.gradient_checkpointing)],
        offload="none" if settings.engine.offload == "auto" else settings.engine.offload,
    )


def _fit_memory(
    settings: Settings,
    hardware: Hardware,
    plan: EnginePlan,
    footprint: Footprint,
    datasets: tuple[Dataset, ...],
    *,
    rank: int,
    drawn_pixels: int,
    compiles: bool,
    notes: Notes,
) -> tuple[EnginePlan, tuple[Dataset, ...]]:
    """Choose the fastest strategy that is predicted to fit, and save memory in the other phases as far as needed.

    `drawn_pixels`: of the largest sample.
    """
    workload = _largest_workload(settings, datasets, rank, footprint)
    workload = dataclasses.replace(workload, shards=_shards(settings, hardware, plan))
    precisions = hardware.auto_precisions if settings.engine.precision == "auto" else (settings.engine.precision,)
    have_gib = min(hardware.memory_gib, settings.engine.memory_limit_gib or hardware.memory_gib)
    host_gib = hardware.host_memory_gib * PINNED_HOST_SHARE / plan.num_gpus

    def allowed(workload: Workload) -> list[Strategy]:
        strategies = memory_model.candidates(footprint, workload, precisions)
        return _allowed(settings, strategies, compiles=compiles)

    def choose(workload: Workload) -> Strategy:
        return memory_model.choose(
            footprint, workload, allowed(workload), have_gib=have_gib, host_gib=host_gib, captured=plan.replay
        )

    if not allowed(workload):
        if settings.engine.offload != "shards":  # why that cannot be is noted already
            notes.add(
                f"PARAMS_OFFLOAD={settings.engine.offload} needs PARAMS_GRADIENT_CHECKPOINTING=auto or true, and "
                "PARAMS_OFFLOAD=weights does not work with PARAMS_LORA_TYPE=dora."
            )
        return plan, datasets
    if settings.data.batch_size == 0:
        tried: list[tuple[Workload, Strategy]] = []
        for batch in memory_model.BATCHES:
            larger = dataclasses.replace(workload, batch=batch)
            tried.append((larger, choose(larger)))
        workload, strategy = memory_model.fastest_batch(footprint, _comparable(tried, have_gib=have_gib))
        datasets = tuple(dataclasses.replace(dataset, batch_size=workload.batch) for dataset in datasets)
        notes.chose("PARAMS_BATCH_SIZE", workload.batch, "most images per second that fit in memory")
    else:
        strategy = choose(workload)
    _refuse_too_large(
        settings, hardware, footprint, workload, datasets, have_gib=have_gib, host_gib=host_gib, compiles=compiles,
        notes=notes,
    )  # fmt: skip
    _note_choices(settings, hardware, strategy, have_gib=have_gib, notes=notes)
    streamed, tiled = _fit_other_phases(
        footprint,
        workload,
        strategy,
        have_gib=have_gib,
        host_memory_gib=hardware.host_memory_gib,
        drawn_pixels=drawn_pixels,
        datasets=datasets,
        notes=notes,
    )
    _note_strategies(workload, strategy, allowed(workload), notes)
    plan = dataclasses.replace(plan, stream_encoders=streamed, tile_vae=tiled, host_gib=host_gib)
    return _with_strategy(plan, strategy, hardware), datasets


def _refuse_too_large(
    settings: Settings,
    hardware: Hardware,
    footprint: Footprint,
    workload: Workload,
    datasets: Sequence[Dataset],
    *,
    have_gib: float,
    host_gib: float,
    compiles: bool,
    notes: Notes,
) -> None:
    """Note a batch that no memory mode can train, in the precision that is set or in any that `auto` may choose."""

    def problem(precisions: tuple[str, ...]) -> str | None:
        least = memory_refusal.least_peak(footprint, precisions, host_gib=host_gib, compiles=compiles)
        size = next(d.resolution for d in datasets if math.prod(d.resolution) == workload.pixels)
        variable = "PARAMS_BATCH_SIZE" if settings.data.batch_size else "batch_size of dataset.json"
        return memory_refusal.refusal(workload, least, have_gib=have_gib, size=size, variable=variable)

    if settings.engine.precision == "auto":
        refused = problem(hardware.auto_precisions)
    elif (refused := problem((settings.engine.precision,))) and not problem(hardware.auto_precisions):
        refused += f" With PARAMS_PRECISION=auto instead of {settings.engine.precision} it fits."
    if refused:
        notes.add(refused)


def _with_strategy(plan: EnginePlan, strategy: Strategy, hardware: Hardware) -> EnginePlan:
    """The plan that trains with `strategy`."""
    return dataclasses.replace(
        plan,
        precision=strategy.precision,
        dtype=hardware.activation_dtype(strategy.precision),
        recompute=strategy.recompute,
        kept_blocks=strategy.kept_blocks,
        offload=strategy.offload,
        turned_weights=strategy.transposed,
    )


def _comparable(tried: list[tuple[Workload, Strategy]], *, have_gib: float) -> list[tuple[Workload, Strategy]]:
    """Batches that fit in the precision of the smallest one; no batch is worth fewer bits. At least the smallest."""
    precision = tried[0][1].precision
    fitting: list[tuple[Workload, Strategy]] = []
    for workload, strategy in tried:
        if strategy.precision == precision and strategy.gib <= have_gib * memory_model.USABLE_SHARE:
            fitting.append((workload, strategy))
    return fitting or tried[:1]


def _note_choices(settings: Settings, hardware: Hardware, strategy: Strategy, *, have_gib: float, notes: Notes) -> None:
    """Note the strategy as the value of each setting that was left to `auto`."""
    reason = f"a step is predicted to take {strategy.gib:.1f} of {have_gib:.0f} GiB"
    if settings.engine.precision == "auto":
        notes.chose("PARAMS_PRECISION", strategy.precision, f"fastest for {hardware}")
    if settings.engine.gradient_checkpointing is None:
        notes.chose("PARAMS_GRADIENT_CHECKPOINTING", strategy.recompute != "none", reason)
    if settings.engine.offload == "auto":
        notes.chose("PARAMS_OFFLOAD", strategy.offload, reason)


def _largest_workload(settings: Settings, datasets: Sequence[Dataset], rank: int, footprint: Footprint) -> Workload:
    """The batch with the most tokens: those of its images, and those of each image's caption.

    With PARAMS_BATCH_SIZE=auto, all datasets get the same batch size, so one image of each is compared.
    """
    training = settings.training
    workloads: list[Workload] = []
    for dataset in datasets:
        width, height = dataset.resolution
        batch = dataset.batch_size if settings.data.batch_size != 0 else 1
        workload = Workload(
            width * height,
            batch,
            rank,
            training.optimizer_type,
            training.optimizer_args,
            ema=training.ema_decay > 0,
        )
        workloads.append(workload)
    return max(workloads, key=lambda workload: workload.kilotokens(footprint))


def _fit_other_phases(
    footprint: Footprint,
    workload: Workload,
    strategy: Strategy,
    *,
    have_gib: float,
    host_memory_gib: float,
    drawn_pixels: int,
    datasets: Sequence[Dataset],
    notes: Notes,
) -> tuple[bool, bool]:
    """Whether the text encoders are streamed, and whether the VAE works in tiles; notes the peaks of all phases."""
    phase_peaks = partial(
        memory_model.phase_peaks_gib,
        footprint,
        workload,
        strategy,
        drawn_pixels=drawn_pixels,
        encoded_pixels=max(dataset.resolution[0] * dataset.resolution[1] for dataset in datasets),
    )
    usable_gib = have_gib * memory_model.USABLE_SHARE
    peaks_gib = phase_peaks(streamed=False, tiled=False)
    streamed = peaks_gib["texts"] > usable_gib
    tiled = max(peaks_gib["samples"], peaks_gib["latents"]) > usable_gib
    peaks_gib = phase_peaks(streamed=streamed, tiled=tiled)
    in_words = ", ".join(f"{phase} {gib:.1f}" for phase, gib in peaks_gib.items())
    notes.reasons.append(f"Peaks predicted, in GiB of {have_gib:.0f}: {in_words}.")
    if streamed:
        notes.reasons.append("The text encoders come to the device layer by layer.")
        whole_gib = phase_peaks(streamed=False, tiled=False)["texts"]
        if whole_gib > host_memory_gib:
            least = math.ceil(whole_gib / memory_model.USABLE_SHARE)
            notes.add(
                f"The text encoders take {whole_gib:.1f} GiB. They do not fit on the card, and the machine, from which "
                f"their layers would come one by one, has {host_memory_gib:.0f} GiB. Fix: a machine with more memory, "
                f"or a card with {least} GiB."
            )
    if tiled:
        notes.reasons.append("Samples are decoded in tiles, and images encoded one by one.")
    return streamed, tiled


def _note_strategies(workload: Workload, chosen: Strategy, strategies: Sequence[Strategy], notes: Notes) -> None:
    """Note the chosen strategy, and those that come before it in order of preference but need more memory."""
    images = "image" if workload.batch == 1 else "images"
    notes.reasons.append(f"Memory mode for steps of {workload.batch} {images}: {chosen}.")
    too_large: list[str] = []
    for strategy in strategies:
        if (strategy.precision, *strategy.mode) == (chosen.precision, *chosen.mode):
            break
        too_large.append(str(strategy))
    nearest = list(dict.fromkeys(too_large))[-SHOWN_TOO_LARGE:]
    if nearest:
        notes.details.append(f"Faster, but too large: {'; '.join(nearest)}.")
    for strategy in strategies:
        chosen_mark = " (chosen)" if (strategy.precision, *strategy.mode) == (chosen.precision, *chosen.mode) else ""
        notes.details.append(f"Memory mode, by preference: {strategy}{chosen_mark}.")


def _allowed(settings: Settings, strategies: Sequence[Strategy], *, compiles: bool) -> list[Strategy]:
    """The strategies that the settings do not rule out and whose conditions are met."""
    allowed: list[Strategy] = []
    for strategy in strategies:
        recomputes = strategy.recompute != "none"
        if settings.engine.gradient_checkpointing not in (None, recomputes):
            continue
        if settings.engine.offload not in ("auto", strategy.offload):
            continue
        mode = memory_mode(strategy.recompute, strategy.offload)
        if mode.is_allowed(compiled=compiles, dora=settings.adapter.lora_type == "dora"):
            allowed.append(strategy)
    return allowed
