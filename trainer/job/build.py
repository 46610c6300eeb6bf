"""From a plan and prepared data to everything that trains: adapters, optimiser, start weights, session."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.engine import adapters, flat_parameters
from trainer.engine.device import torch_dtype
from trainer.engine.execution import Engine
from trainer.engine.load import load_denoiser
from trainer.job import prepare
from trainer.job.session import Session
from trainer.job.watchdog import Watchdog
from trainer.lora_files import convert, peft_bridge, weights
from trainer.spec.errors import SettingsError
from trainer.spec.family import Facts, Family, get_family
from trainer.spec.optimizers import OPTIMIZERS
from trainer.spec.plan import Plan
from trainer.training import optimizers, text_encoders
from trainer.training.distributed import Workers
from trainer.training.ema import Ema
from trainer.training.state import TrainingState
from trainer.training.step_guard import LOSS_SCALE, StepGuard
from trainer.training.stop_flag import StopFlag
from trainer.training.text_encoders import TextEncoders

log = logging.getLogger(__name__)


def session_of(
    ready: prepare.PreparedData,
    training_state: TrainingState,
    out: Path,
    stop: StopFlag,
    *,
    watchdog: Watchdog,
    workers: Workers,
) -> Session:
    """The session that trains what `ready` and `trainee` hold, into `out`."""
    plan, kind = ready.plan, get_family(ready.plan.model.family)
    return Session(
        plan,
        kind,
        out,
        stop,
        engine=Engine(
            training_state.denoiser, kind.regions(training_state.denoiser), plan.engine, training_state.stream
        ),
        objective=ready.objective,
        training_state=training_state,
        order=ready.order,
        cache=ready.cache,
        found=ready.found,
        total=ready.total,
        steps_per_epoch=ready.steps_per_epoch,
        watchdog=watchdog,
        workers=workers,
    )


def adapter_summary(training_state: TrainingState) -> str:
    states = [adapters.state(model) for model in (training_state.denoiser, *training_state.texts.models.values())]
    count = sum(name.endswith(".lora_A.weight") for state in states for name in state)
    return f"{count} adapters ({sum(p.numel() for p in training_state.optimizer_params) / 1e6:.2f} M parameters)"


def build_training_state(plan: Plan, kind: Family, *, model: Path, total: int) -> TrainingState:
    """The denoiser with adapters, and their optimiser, as new; or with the weights of PARAMS_RESUME_FROM."""
    engine, facts = plan.engine, kind.FACTS
    start = None
    if plan.lora.resume_from and Path(plan.lora.resume_from).is_file():
        start = _lora_file(Path(plan.lora.resume_from), facts.name)
    fused = {} if plan.lora.split_qkv else facts.fused_targets
    settings = plan.lora
    rank = 0 if settings.kind == "dora" else settings.rank  # whose adapters are no part of a product
    denoiser, stream = load_denoiser(kind, model, engine, fused=fused, targets=settings.targets, rank=rank)
    put = partial(
        adapters.add_adapters, rank=settings.rank, alpha=settings.alpha, seed=plan.train.seed, kind=settings.kind
    )
    targets, blocks = plan.lora.targets, kind.blocks(denoiser)
    trained: list[tuple[list[torch.nn.Parameter], dict[str, float]]]
    trained = [(put(denoiser, blocks, targets=targets, fused=fused), {})]
    texts = text_encoders.load(
        model, plan.optim.text_encoders, family=kind, device=engine.device, dtype=torch_dtype(engine)
    )
    for component, encoder in texts.models.items():
        blocks, targets = text_encoders.blocks(encoder), text_encoders.TARGETS
        own = put(encoder, blocks, targets=targets, fused={})
        trained.append((own, {"lr": plan.optim.text_encoders[component]}))
    parts = [p for own, _ in trained for p in own]
    groups: list[dict[str, Any]]
    groups = [{"params": flat_parameters.flatten_parameters(plan.optim.name, own), **rate} for own, rate in trained]
    if start is not None:
        _start_from(denoiser, texts, start, plan=plan, facts=facts)
    new_optimizer = partial(
        optimizers.make_optimizer,
        plan.optim.name,
        groups,
        learning_rate=plan.optim.learning_rate,
        weight_decay=plan.optim.weight_decay,
        args=plan.optim.args,
        warmup_steps=plan.optim.warmup_steps,
    )
    params, optimizer = [p for group in groups for p in group["params"]], new_optimizer()
    schedule = optimizers.make_schedule(
        "constant" if OPTIMIZERS[plan.optim.name].own_warmup else plan.optim.scheduler,
        optimizer,
        warmup_steps=plan.optim.warmup_steps,
        total_steps=total,
        num_cycles=plan.optim.num_cycles,
    )
    ema = Ema(params, plan.train.ema_decay) if plan.train.ema_decay else None
    scale = LOSS_SCALE.get(plan.engine.dtype, 1.0)
    guard = StepGuard(plan.train.max_skipped_steps, plan.train.max_loss_spike, scale)
    return TrainingState(denoiser, texts, parts, params, optimizer, new_optimizer, schedule, ema, guard, stream)


def _lora_file(path: Path, family_name: str) -> weights.LoraModules:
    try:
        return convert.load(path, family_name)
    except ValueError as problem:
        raise SettingsError(f"PARAMS_RESUME_FROM {path} cannot be gone on from: {problem}.") from problem


def _start_from(denoiser: Any, texts: TextEncoders, modules: weights.LoraModules, *, plan: Plan, facts: Facts) -> None:
    """Begin with the weights of a LoRA file. Raises SettingsError where they are not of this plan's shape."""
    path, scale, state = plan.lora.resume_from, plan.lora.scale, adapters.state(denoiser)
    own = {name: adapter for name, adapter in modules.items() if name.partition(".")[0] not in texts.models}
    try:
        adapters.load(
            denoiser,
            peft_bridge.to_peft_state(own, state, prefix=facts.lora_prefix, fused=facts.fused_targets, scale=scale),
        )
        for component, model in texts.models.items():
            text_encoders.start(model, component, modules, family_name=facts.name, scale=scale)
    except ValueError as problem:
        raise SettingsError(
            f"PARAMS_RESUME_FROM {path} does not fit this plan (PARAMS_NETWORK_DIM={plan.lora.rank}, "
            f"PARAMS_SPLIT_QKV={str(plan.lora.split_qkv).lower()}, PARAMS_TARGET_MODULES="
            f"{','.join(plan.lora.targets)}): {problem}."
        ) from problem
    log.info("Began with the weights of %s: %d modules.", path, len(modules))
