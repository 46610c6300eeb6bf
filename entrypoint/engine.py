"""How the plan uses the hardware: the weights' format, what is recomputed or offloaded, what is compiled."""

from __future__ import annotations

from entrypoint.checks import Notes, show
from entrypoint.hardware import Hardware, select
from entrypoint.settings import Settings
from trainer import memory
from trainer.errors import SettingsError
from trainer.families import BaseModel, Facts
from trainer.plan import Dataset, EnginePlan

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
    notes: Notes,
) -> EnginePlan:
    """Whatever the settings leave to be chosen, chosen for the hardware and the largest batch, with reasons."""
    try:
        hardware = select(found, settings.backend)
    except SettingsError as problem:
        notes.add(str(problem))
        hardware = found
    if settings.backend == "auto":
        notes.chose("BACKEND", hardware.backend, str(hardware))
    if settings.precision not in ("auto", *hardware.formats):
        allowed = ", ".join(("auto", *hardware.formats))
        notes.add(f"PARAMS_PRECISION={show(settings.precision)} is not what {hardware} can do. Allowed: {allowed}.")
    compiled = settings.compile
    if compiled is None:
        compiled = hardware.device != "cpu"
        notes.chose(
            "PARAMS_COMPILE", compiled, "pays on accelerators" if compiled else "takes longer than it saves here"
        )
    if settings.attention == "auto":
        notes.chose("PARAMS_ATTENTION", "native", "torch picks the kernel")
    elif settings.attention != "native" and not facts.attention_backends:
        notes.add(
            f"PARAMS_ATTENTION={settings.attention}: {settings.base_model} has torch's own attention and no other. "
            "Allowed: auto, native."
        )
    way = _way(settings, hardware, model=model, datasets=datasets, rank=rank, notes=notes)
    return EnginePlan(
        device=hardware.device,
        precision=way.precision,
        recompute=way.recompute,
        kept_blocks=way.kept_blocks,
        offload=way.offload,
        compile=compiled,
        attention="native" if settings.attention == "auto" else settings.attention,
        memory_limit_gib=settings.memory_limit_gib,
    )


def _way(
    settings: Settings, hardware: Hardware, *, model: BaseModel, datasets: tuple[Dataset, ...], rank: int, notes: Notes
) -> memory.Way:
    """The fastest that `trainer.memory` predicts to fit. Miniatures fit anywhere, as they are."""
    if model.footprint is None or hardware.device == "cpu":
        precision = settings.precision
        if precision == "auto":
            precision = hardware.plain
            notes.chose("PARAMS_PRECISION", precision, f"best for {hardware}")
        recompute = RECOMPUTE[bool(settings.gradient_checkpointing)]
        offload = settings.offload if settings.offload != "auto" else "none"
        return memory.Way(precision, recompute, 0, offload, 0.0)
    largest = max(datasets, key=lambda d: d.batch_size * d.resolution[0] * d.resolution[1])
    work = memory.Work(
        pixels=largest.resolution[0] * largest.resolution[1],
        batch=largest.batch_size,
        rank=rank,
        optimizer=settings.optimizer_type,
    )
    precisions = hardware.formats[:2] if settings.precision == "auto" else (settings.precision,)
    have = min(hardware.memory_gib, settings.memory_limit_gib or hardware.memory_gib)
    allowed = [
        way
        for way in memory.ways(model.footprint, work, precisions)
        if settings.gradient_checkpointing is None or (way.recompute != "none") is settings.gradient_checkpointing
        if settings.offload in ("auto", way.offload)
    ]
    if not allowed:
        notes.add("PARAMS_OFFLOAD=activations goes with PARAMS_GRADIENT_CHECKPOINTING=auto or true.")
        return memory.Way(precisions[0], "none", 0, "none", 0.0)
    host = hardware.host_memory_gib * HOST_SHARE
    way = memory.best(model.footprint, work, allowed, have_gib=have, host_gib=host)
    reason = f"{way.gib:.1f} GiB of {have:.0f} GiB are predicted for a step"
    if settings.precision == "auto":
        notes.chose("PARAMS_PRECISION", way.precision, f"fastest for {hardware}")
    if settings.gradient_checkpointing is None:
        notes.chose("PARAMS_GRADIENT_CHECKPOINTING", str(way), reason)
    if settings.offload == "auto":
        notes.chose("PARAMS_OFFLOAD", way.offload, reason)
    return way
