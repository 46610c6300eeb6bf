"""How the plan uses the hardware: the weights' format, what is recomputed or offloaded, what is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from entrypoint.fetch import flash_attention
from entrypoint.settings.checks import Notes, show
from entrypoint.settings.read import Settings
from entrypoint.system.hardware import Hardware, select
from trainer.spec import memory_model
from trainer.spec.errors import SettingsError
from trainer.spec.family import BaseModel, Facts, Footprint
from trainer.spec.plan import Dataset, EnginePlan, Prompt
from trainer.spec.weight_formats import PRECISIONS

RECOMPUTE = {True: "all", False: "none"}
HOST_SHARE = 0.5  # of the host's memory that may be pinned


def engine_plan(
    settings: Settings,
    found: Hardware,
    *,
    facts: Facts,
    model: BaseModel,
    datasets: tuple[Dataset, ...],
    rank: int,
    prompts: tuple[Prompt, ...],
    notes: Notes,
) -> tuple[EnginePlan, tuple[Dataset, ...]]:
    """Whatever the settings leave to be chosen, chosen for the hardware and the largest batch, with reasons.

    The datasets come back with their batch size, where that was left to be chosen too.
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
        replay=hardware.can_capture and not any(settings.training.text_encoder_lr),
        attention=_attention(settings, hardware, facts, model, notes),
        memory_limit_gib=settings.engine.memory_limit_gib,
        step_timeout_s=settings.engine.step_timeout,
    )
    if model.footprint is None or hardware.device == "cpu":
        plan = _as_it_is(settings, hardware, plan, notes=notes)
    else:
        sizes = [(p.width, p.height) for p in prompts] if settings.output.sample_every_n_steps else []
        sizes += [d.resolution for d in datasets for s in d.subsets if s.source.kind == "generated"]
        drawn = max((width * height for width, height in sizes), default=0)
        given = (settings, hardware, plan, model.footprint, datasets)
        never = plan.replay and facts.compiles == "never"
        compiles = not never if settings.engine.compile is None else settings.engine.compile
        plan, datasets = _fitted(*given, rank=rank, drawn=drawn, compiles=compiles, notes=notes)
    return dataclasses.replace(plan, compile=_compiled(settings, plan, facts.compiles, notes)), datasets


def _compiled(settings: Settings, plan: EnginePlan, compiles: str, notes: Notes) -> bool:
    """Whether the blocks are compiled. Where steps are recorded, that may take longer than it saves."""
    if settings.engine.compile is not None:
        return settings.engine.compile
    fused = PRECISIONS[plan.precision].weight_format == "fp8" and settings.adapter.lora_type != "dora"
    recorded = plan.replay and plan.offload != "weights"
    if plan.device == "cpu":
        chosen, why = False, "takes longer than it saves here"
    elif recorded and compiles == "never":
        chosen, why = False, "the model has so many kinds of blocks that it takes minutes; steps are recorded instead"
    elif recorded and compiles == "recomputed" and fused and plan.recompute in ("none", "products"):
        chosen, why = False, "steps are recorded, and what they keep is fused already"
    else:
        chosen, why = True, "pays on accelerators"
    notes.chose("PARAMS_COMPILE", chosen, why)
    return chosen


def _attention(settings: Settings, hardware: Hardware, facts: Facts, model: BaseModel, notes: Notes) -> str:
    """Whose attention runs: the fastest that is there, but for what is asked for."""
    asked = settings.engine.attention
    if asked == "auto":
        chosen, why = "native", "torch picks the kernel"
        if hardware.fastest_attention == "flash_4" and not model.is_miniature:  # a miniature's heads are narrower
            if flash_attention.is_installed(settings.data.cache_path):
                chosen, why = "flash_4", "the fastest here"
            else:
                why += "; flash_4 is faster here and is brought when it is asked for"
        notes.chose("PARAMS_ATTENTION", chosen, why)
        return chosen
    if asked == "flash_4":
        if not hardware.runs_flash_4:
            what = f"PARAMS_ATTENTION=flash_4 needs compute capability 9.0 or more, which {hardware} has not."
            notes.add(f"{what} Fix: set PARAMS_ATTENTION=auto.")
    elif asked != "native" and not facts.attention_backends:
        notes.add(
            f"PARAMS_ATTENTION={asked}: {settings.model.base_model} has torch's own attention and no other. "
            "Allowed: auto, native, flash_4."
        )
    return asked


def _num_gpus(settings: Settings, hardware: Hardware, notes: Notes) -> int:
    """Processes that train together. On a CPU as many as are asked for, which is to try it out."""
    asked, there = settings.engine.num_gpus, hardware.count
    if hardware.device == "cpu":
        return asked or 1
    if asked > there:
        notes.add(f"NUM_GPUS={asked}: there are not so many here, only {hardware}. Allowed: auto, 1 to {there}.")
        return 1
    if asked or there == 1:
        return asked or 1
    # With more than one the batch of a step grows and its steps are fewer: that is for whoever trains to decide.
    notes.chose("NUM_GPUS", 1, f"the batch of one; NUM_GPUS={there} trains on all with {there} times as many pictures")
    return 1


def _as_it_is(settings: Settings, hardware: Hardware, plan: EnginePlan, *, notes: Notes) -> EnginePlan:
    """Of a miniature, which fits anywhere, or on a CPU, where nobody is short of memory."""
    precision = settings.engine.precision
    if precision == "auto":
        precision = hardware.unquantized_precision
        notes.chose("PARAMS_PRECISION", precision, f"best for {hardware}")
    if settings.engine.offload not in ("auto", "none") and hardware.device == "cpu":
        notes.add(
            f"PARAMS_OFFLOAD={settings.engine.offload} is for accelerators: here the host's memory is all there is. "
            "Allowed: auto, none."
        )
    elif settings.engine.offload == "weights" and settings.adapter.lora_type == "dora":
        notes.add("PARAMS_OFFLOAD=weights does not go with PARAMS_LORA_TYPE=dora. Fix: change one of them.")
    if settings.data.batch_size == 0:
        notes.chose("PARAMS_BATCH_SIZE", "dataset.json's", "no speed is known of this model here")
    return dataclasses.replace(
        plan,
        precision=precision,
        dtype=hardware.activation_dtype(precision),
        recompute=RECOMPUTE[bool(settings.engine.gradient_checkpointing)],
        offload="none" if settings.engine.offload == "auto" else settings.engine.offload,
    )


def _fitted(
    settings: Settings,
    hardware: Hardware,
    plan: EnginePlan,
    footprint: Footprint,
    datasets: tuple[Dataset, ...],
    *,
    rank: int,
    drawn: int,
    compiles: bool,
    notes: Notes,
) -> tuple[EnginePlan, tuple[Dataset, ...]]:
    """The fastest that `trainer.spec.memory_model` predicts to fit, in each phase of the job. `drawn`: pixels of a
    sample."""
    work = _largest(settings, datasets, rank, footprint)
    precisions = hardware.auto_precisions if settings.engine.precision == "auto" else (settings.engine.precision,)
    have = min(hardware.memory_gib, settings.engine.memory_limit_gib or hardware.memory_gib)
    room, host = have * memory_model.SPARE, hardware.host_memory_gib * HOST_SHARE / plan.num_gpus

    def ways(work: memory_model.Workload) -> list[memory_model.Strategy]:
        return _allowed(settings, memory_model.ways(footprint, work, precisions), compiles=compiles)

    def best(work: memory_model.Workload) -> tuple[memory_model.Workload, memory_model.Strategy]:
        return work, memory_model.best(footprint, work, ways(work), have_gib=have, host_gib=host, recorded=plan.replay)

    if not ways(work):
        notes.add(
            f"PARAMS_OFFLOAD={settings.engine.offload} goes with PARAMS_GRADIENT_CHECKPOINTING=auto or true, and weights "
            "not with PARAMS_LORA_TYPE=dora."
        )
        return plan, datasets
    if settings.data.batch_size == 0:
        tried = [best(dataclasses.replace(work, batch=batch)) for batch in memory_model.BATCHES]
        same = [t for t in tried if t[1].precision == tried[0][1].precision and t[1].gib <= room]
        work, way = memory_model.fastest(footprint, same or tried[:1])
        datasets = tuple(dataclasses.replace(d, batch_size=work.batch) for d in datasets)
        notes.chose("PARAMS_BATCH_SIZE", work.batch, "most images per second in the memory there is")
    else:
        work, way = best(work)
    _chosen(settings, hardware, way, have=have, notes=notes)
    streamed, tiled = _told(footprint, work, way, ways(work), have=have, drawn=drawn, datasets=datasets, notes=notes)
    plan = dataclasses.replace(
        plan,
        precision=way.precision,
        dtype=hardware.activation_dtype(way.precision),
        recompute=way.recompute,
        kept_blocks=way.kept_blocks,
        offload=way.offload,
        turned_weights=way.turned,
        stream_encoders=streamed,
        host_gib=host,
        tile_vae=tiled,
    )
    return plan, datasets


def _chosen(settings: Settings, hardware: Hardware, way: memory_model.Strategy, *, have: float, notes: Notes) -> None:
    """What was left to be chosen, for the log."""
    reason = f"{way.gib:.1f} GiB of {have:.0f} GiB are predicted for a step"
    if settings.engine.precision == "auto":
        notes.chose("PARAMS_PRECISION", way.precision, f"fastest for {hardware}")
    if settings.engine.gradient_checkpointing is None:
        notes.chose("PARAMS_GRADIENT_CHECKPOINTING", str(way), reason)
    if settings.engine.offload == "auto":
        notes.chose("PARAMS_OFFLOAD", way.offload, reason)


def _largest(settings: Settings, datasets: Sequence[Dataset], rank: int, footprint: Footprint) -> memory_model.Workload:
    """The batch with the most tokens, of which each picture's text has some."""
    given = settings.data.batch_size != 0  # else all get the same
    works = [
        memory_model.Workload(
            d.resolution[0] * d.resolution[1], d.batch_size if given else 1, rank, settings.training.optimizer_type
        )
        for d in datasets
    ]
    return max(works, key=lambda work: work.kilotokens(footprint))


def _told(
    footprint: Footprint,
    work: memory_model.Workload,
    way: memory_model.Strategy,
    ways: Sequence[memory_model.Strategy],
    *,
    have: float,
    drawn: int,
    datasets: Sequence[Dataset],
    notes: Notes,
) -> tuple[bool, bool]:
    """Whether the text encoders are streamed, and samples decoded in pieces; the log tells the ways there are."""
    encoded = max(d.resolution[0] * d.resolution[1] for d in datasets)
    phases = partial(memory_model.phases, footprint, work, way, drawn_pixels=drawn, encoded_pixels=encoded)
    peaks, room = phases(streamed=False, tiled=False), have * memory_model.SPARE
    streamed, tiled = peaks["texts"] > room, max(peaks["samples"], peaks["latents"]) > room
    peaks = phases(streamed=streamed, tiled=tiled)
    notes.reasons += [
        f"Peaks predicted, in GiB of {have:.0f}: "
        + ", ".join(f"{name} {gib:.1f}" for name, gib in peaks.items())
        + ".",
        *(["The text encoders come to the device layer by layer."] if streamed else []),
        *(["Samples are decoded piece by piece, and pictures encoded one by one."] if tiled else []),
        f"Ways to train with batches of {work.batch}, first the one that is taken:",
        *(f"  {one}" for one in dict.fromkeys(map(str, (way, *ways)))),
    ]
    return streamed, tiled


def _allowed(
    settings: Settings, ways: Sequence[memory_model.Strategy], *, compiles: bool
) -> list[memory_model.Strategy]:
    """Those that the settings do not rule out."""
    return [
        way
        for way in ways
        if settings.engine.gradient_checkpointing is None
        or (way.recompute != "none") is settings.engine.gradient_checkpointing
        if settings.engine.offload in ("auto", way.offload)
        # peft measures a layer's rows when it makes a DoRA adapter, and then the weights must be there.
        if settings.adapter.lora_type != "dora" or way.offload != "weights"
        # Without the compiler, the host gets what all recompute, and no more (`trainer.spec.strategies.rungs`).
        if compiles or way.recompute == "all" or way.offload == "none"
    ]
