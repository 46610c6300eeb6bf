"""From a plan and prepared data to everything that trains.

`build_training_state` makes, in this order: the denoiser and the text encoders with adapters; flat parameters for the
optimiser; the weights to start from; the optimiser and its schedule. Adapters are drawn from the seed in the order in
which they are created, and the optimiser numbers its parameters in that order, so it must not change: states and
LoRA files depend on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.base_model import loading
from trainer.checkpoints.open_run import OpenRun
from trainer.checkpoints.snapshots import Snapshots
from trainer.engine import adapters, flat_parameters, training_adapter
from trainer.engine.cuda_graphs import EagerStep, GraphStep
from trainer.engine.device import torch_dtype
from trainer.engine.execution import Engine
from trainer.engine.load import load_denoiser
from trainer.engine.memory import sharding
from trainer.engine.memory.sharding import Peers
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.engine.quantization.cast_adapters import AdapterCast
from trainer.engine.training_adapter import TrainingAdapter
from trainer.job import saving, sizes
from trainer.job.prepare import PreparedData
from trainer.job.rolling.rolling_cache import RollingCache
from trainer.job.session import Session
from trainer.job.watchdog import Watchdog
from trainer.lora_files import convert, key_names, peft_bridge
from trainer.lora_files.weights import LoraModules
from trainer.spec import memory_model
from trainer.spec.errors import SettingsError
from trainer.spec.family import Facts, Family, base_models, get_family
from trainer.spec.optimizers import OPTIMIZERS
from trainer.spec.plan import EnginePlan, LoraPlan, OptimPlan, Plan
from trainer.spec.values import similar
from trainer.training import optimizers, text_encoders
from trainer.training.distributed import Workers
from trainer.training.ema import Ema
from trainer.training.state import TrainingState
from trainer.training.step_guard import LOSS_SCALE, StepGuard
from trainer.training.stop_flag import StopFlag
from trainer.training.text_encoders import TextEncoders

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptedModels:
    """The models with adapters. `groups`: each model's adapter parameters, and the optimiser's arguments for them."""

    denoiser: Any
    weight_streamer: WeightStreamer | None
    texts: TextEncoders
    groups: list[tuple[list[torch.nn.Parameter], dict[str, float]]]
    training_adapter: TrainingAdapter | None = None


def make_session(
    opened: OpenRun,
    data: PreparedData,
    training_state: TrainingState,
    stop: StopFlag,
    *,
    watchdog: Watchdog,
    workers: Workers,
    rolling: RollingCache | None = None,
) -> Session:
    """The session that trains `training_state` on `data`, as the run `opened`."""
    plan = data.plan
    family = get_family(plan.model.family)
    regions = family.regions(training_state.denoiser)
    engine_plan = sizes.engine_plan_for(plan, data.sampler.epoch(0).outline(), workers)
    engine = Engine(training_state.denoiser, regions, engine_plan, training_state.weight_streamer)
    objective = data.objective
    snapshots = Snapshots(training_state.optimizer, plan.engine.device)
    describe_run = partial(saving.describe_run, plan, family, objective, sampler=data.sampler, scan=data.scan)
    return Session(
        plan,
        family,
        opened.home,
        stop,
        engine=engine,
        runner=make_runner(plan.engine, engine, training_state),
        objective=objective,
        training_state=training_state,
        snapshots=snapshots,
        saver=saving.Saver(
            plan,
            family,
            opened.out,
            opened.home,
            opened.record,
            stop,
            training_state,
            snapshots,
            data.scan,
            describe_run,
            data.total,
            opened.plan.essence(),
        ),
        sampler=data.sampler,
        cache=data.cache,
        total=data.total,
        steps_per_epoch=data.steps_per_epoch,
        watchdog=watchdog,
        workers=workers,
        rolling=rolling,
    )


def make_runner(plan: EnginePlan, engine: Engine, training_state: TrainingState) -> EagerStep:
    """What computes the gradients of a step: from CUDA graphs where the plan and the engine's memory mode allow it."""
    # Compiled blocks cast their adapters in passing; otherwise all are cast at once, before each forward pass.
    cast: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    if not engine.compiled:
        cast = AdapterCast(training_state.denoiser, torch_dtype(plan))
    # Text encoders that train tokenize in each step, which no graph can hold.
    captures = plan.replay and engine.can_capture() and not training_state.texts.models
    params, optimizer_params = training_state.adapter_params, training_state.optimizer_params
    pass_context = partial(engine.forward_backward, cast)
    if not captures:
        return EagerStep(params, optimizer_params, pass_context)
    return GraphStep(params, optimizer_params, pass_context, warms_up_each=engine.learns_from_first_pass)


def adapter_summary(training_state: TrainingState) -> str:
    """The number of adapters and of their parameters, for the log."""
    count = 0
    for model in (training_state.denoiser, *training_state.texts.models.values()):
        count += sum(name.endswith(".lora_A.weight") for name in adapters.state(model))
    return f"{count} adapters ({sum(p.numel() for p in training_state.optimizer_params) / 1e6:.2f} M parameters)"


def with_reachable_shards(plan: Plan, workers: Workers) -> tuple[Plan, Peers | None]:
    """The plan, and who has the parts of its weights, if these are sharded. All processes must call it.

    Where GPUs cannot read each other's memory, or read it far slower than the host's, the plan is to stream the weights
    from the host. Raises SettingsError where that was not left to `auto`, or takes more than the host has.
    """
    engine = plan.engine
    if engine.offload != "shards":
        return plan, None
    is_auto = "PARAMS_OFFLOAD" in plan.automatic
    footprint = base_models()[plan.model.base][1].footprint
    has_room = True
    needed_gib = 0.0
    if footprint is not None and engine.host_gib is not None:
        needed_gib = memory_model.weights_gib(footprint, plan.lora.rank, engine.precision)
        has_room = needed_gib <= engine.host_gib
    peers = workers.peers()
    problem = sharding.unreachable(peers, engine.device, against_host=is_auto and has_room)
    if not problem:
        return plan, peers
    if not is_auto:
        raise SettingsError(f"PARAMS_OFFLOAD=shards: {problem}. Fix: set PARAMS_OFFLOAD=auto or weights.")
    if not has_room:
        fewer_bits = ""
        if "PARAMS_PRECISION" in plan.automatic and engine.precision != "nf4":
            fewer_bits = "set PARAMS_PRECISION=nf4, "
        raise SettingsError(
            f"NUM_GPUS={engine.num_gpus}: {problem}, and of the host's memory each process may take "
            f"{engine.host_gib:.1f} GiB, where the weights need {needed_gib:.1f}. Fix: {fewer_bits}take larger "
            "cards, or cards with NVLink."
        )
    log.warning("PARAMS_OFFLOAD=weights instead of shards: %s.", problem)
    engine = dataclasses.replace(engine, recompute="all", kept_blocks=0, offload="weights")
    return dataclasses.replace(plan, engine=engine), None


def build_training_state(
    plan: Plan, family: Family, *, model: Path, total: int, peers: Peers | None = None
) -> TrainingState:
    """The models in the folder `model` with adapters, and their optimiser; new, or from the LoRA of PARAMS_RESUME_FROM.

    `total`: optimiser steps of the whole run, for the schedule. `peers`: see `with_reachable_shards`. Raises
    SettingsError for targets that match no layer, and for a LoRA file that does not fit.
    """
    start = load_start_weights(plan.lora, family.FACTS.name)  # before the model loads, since it may be refused
    adapted = load_adapted_models(plan, family, model, peers)
    # Copies the adapters into longer parameters, of which they are views from now on.
    groups: list[dict[str, Any]] = []
    for params, arguments in adapted.groups:
        groups.append({"params": flat_parameters.flatten_parameters(plan.optim.name, params), **arguments})
    if start is not None:
        apply_start_weights(adapted, start, lora=plan.lora, facts=family.FACTS)
    optimizer_params = [p for group in groups for p in group["params"]]
    new_optimizer = partial(make_optimizer, plan.optim, groups)
    optimizer = new_optimizer()
    schedule = make_schedule(plan.optim, optimizer, total=total)
    return TrainingState(
        adapted.denoiser,
        adapted.texts,
        adapter_params=[p for params, _ in adapted.groups for p in params],
        optimizer_params=optimizer_params,
        optimizer=optimizer,
        new_optimizer=new_optimizer,
        schedule=schedule,
        ema=Ema(optimizer_params, plan.train.ema_decay) if plan.train.ema_decay else None,
        guard=StepGuard(
            limit=plan.train.max_skipped_steps,
            spike=plan.train.max_loss_spike,
            scale=LOSS_SCALE.get(plan.engine.dtype, 1.0),
        ),
        weight_streamer=adapted.weight_streamer,
        training_adapter=adapted.training_adapter,
        untrained_norms=untrained_norms(adapted.denoiser, family) if plan.lora.kind == "dora" else {},
    )


def untrained_norms(denoiser: Any, family: Family) -> dict[str, torch.Tensor]:
    """The norms of the rows of each layer that has no adapter, but that LoRA files keep as one with a layer that has.

    DoRA's files have one list of magnitudes for both (`TrainingState.untrained_norms`).
    """
    facts = family.FACTS
    trained: set[str] = set()
    for key in adapters.state(denoiser):
        if key.endswith(peft_bridge.DOWN):
            trained.update(peft_bridge.unfused_names(key.removesuffix(peft_bridge.DOWN), facts.fused_targets))
    norms: dict[str, torch.Tensor] = {}
    for name in sorted(trained):
        layer = key_names.find_layer(f"{facts.lora_prefix}.{name}", facts.name)
        if layer is None or layer.original is None:
            continue
        for template in layer.original.diffusers_names:
            sibling = template.replace("{}", layer.number)
            if sibling not in trained and sibling not in norms:
                norms[sibling] = denoiser.get_submodule(sibling).weight.detach().float().norm(dim=1).cpu()
    return norms


def check_targets(plan: Plan) -> None:
    """Raises SettingsError for a target that means no layer of the model, before anything is encoded for it.

    The plan has checked the names; only the model's own files tell how many blocks of which kind it has. `plan` has
    the path of its folder. A family's own targets are not all in each of its models.
    """
    family = get_family(plan.model.family)
    if set(plan.lora.targets) == set(family.FACTS.targets):
        return
    folder = Path(plan.model.path)
    part = family.FACTS.parts["denoiser"]
    denoiser = loading.empty_model(family.FACTS.kinds[part], folder / part)
    unmatched = adapters.unmatched_targets(family.blocks(denoiser), plan.lora.targets)
    if unmatched:
        names = []
        for prefix, block in family.blocks(denoiser):
            names += [f"{prefix}.{name}" for name, _ in block.named_modules()]
        near = similar(unmatched[0], names, most=3)
        raise SettingsError(
            f"PARAMS_TARGET_MODULES: {', '.join(unmatched)} matches no layer of BASE_MODEL={plan.model.base}"
            f"{'; similar are ' if near else ''}{', '.join(near)}. Fix: correct it, or leave it out."
        )


def load_adapted_models(plan: Plan, family: Family, model: Path, peers: Peers | None = None) -> AdaptedModels:
    """Load the denoiser and the text encoders that train, and put adapters on them."""
    lora = plan.lora
    fused = {} if lora.split_qkv else family.FACTS.fused_targets
    add_adapters = partial(
        adapters.add_adapters, rank=lora.rank, alpha=lora.alpha, seed=plan.train.seed, kind=lora.kind
    )
    # Room for adapter columns next to the frozen weights. DoRA scales the weights' rows, so its adapters cannot be
    # part of the product.
    column_rank = 0 if lora.kind == "dora" else lora.rank
    adapter = None
    if plan.model.training_adapter_path:
        adapter = training_adapter.load(Path(plan.model.training_adapter_path), family.FACTS)
    denoiser, weight_streamer = load_denoiser(
        family,
        model,
        plan.engine,
        fused=fused,
        targets=lora.targets,
        rank=column_rank,
        training_adapter=adapter,
        peers=peers,
    )
    groups: list[tuple[list[torch.nn.Parameter], dict[str, float]]] = []
    groups.append((add_adapters(denoiser, family.blocks(denoiser), targets=lora.targets, fused=fused), {}))
    if adapter:
        adapter.place(denoiser, fused=fused, device=plan.engine.device, dtype=torch_dtype(plan.engine))
        log.info(
            "Merged %s into %d layers. The LoRA trains on top of it and does not have it; samples are drawn without.",
            plan.model.training_adapter, len(adapter.merged),
        )  # fmt: skip
    texts = text_encoders.load(
        model,
        plan.optim.text_encoders,
        family=family,
        device=plan.engine.device,
        dtype=torch_dtype(plan.engine),
        max_tokens=plan.train.max_token_length,
    )
    for component, encoder in texts.models.items():
        blocks = text_encoders.blocks(encoder)
        params = add_adapters(encoder, blocks, targets=text_encoders.TARGETS, fused={})
        groups.append((params, {"lr": plan.optim.text_encoders[component]}))
    return AdaptedModels(denoiser, weight_streamer, texts, groups, adapter)


def make_optimizer(plan: OptimPlan, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return optimizers.make_optimizer(
        plan.name,
        groups,
        learning_rate=plan.learning_rate,
        weight_decay=plan.weight_decay,
        args=plan.args,
        warmup_steps=plan.warmup_steps,
    )


def make_schedule(
    plan: OptimPlan, optimizer: torch.optim.Optimizer, *, total: int
) -> torch.optim.lr_scheduler.LRScheduler:
    # An optimiser with a warm-up of its own gets a constant rate: it has the steps of the warm-up already.
    name = "constant" if OPTIMIZERS[plan.name].own_warmup else plan.scheduler
    return optimizers.make_schedule(
        name, optimizer, warmup_steps=plan.warmup_steps, total_steps=total, num_cycles=plan.num_cycles
    )


def load_start_weights(lora: LoraPlan, family_name: str) -> LoraModules | None:
    """The modules of the LoRA file that PARAMS_RESUME_FROM names; None where it names none, or a state."""
    if not lora.resume_from or not Path(lora.resume_from).is_file():
        return None
    try:
        return convert.load(Path(lora.resume_from), family_name)
    except ValueError as problem:
        raise SettingsError(f"PARAMS_RESUME_FROM {lora.resume_from} cannot be read: {problem}.") from problem


def apply_start_weights(adapted: AdaptedModels, modules: LoraModules, *, lora: LoraPlan, facts: Facts) -> None:
    """Overwrite the adapters by those of a LoRA file. Raises SettingsError where their shapes are not this plan's."""
    texts = adapted.texts.models
    of_denoiser = {name: adapter for name, adapter in modules.items() if name.partition(".")[0] not in texts}
    state = adapters.state(adapted.denoiser)
    try:
        tensors = peft_bridge.to_peft_state(
            of_denoiser, state, prefix=facts.lora_prefix, fused=facts.fused_targets, scale=lora.scale
        )
        adapters.load(adapted.denoiser, tensors)
        for component, model in texts.items():
            text_encoders.start(model, component, modules, family_name=facts.name, scale=lora.scale)
    except ValueError as problem:
        raise SettingsError(
            f"PARAMS_RESUME_FROM {lora.resume_from} does not fit this plan (PARAMS_NETWORK_DIM={lora.rank}, "
            f"PARAMS_SPLIT_QKV={str(lora.split_qkv).lower()}, PARAMS_TARGET_MODULES="
            f"{','.join(lora.targets)}): {problem}."
        ) from problem
    log.info("Started from the weights of %s: %d modules.", lora.resume_from, len(modules))
    new = peft_bridge.new_adapters(of_denoiser, state, prefix=facts.lora_prefix, fused=facts.fused_targets)
    if new:
        count = len([key for key in state if key.endswith(peft_bridge.DOWN)])
        log.warning(
            "%s has nothing for %d of the %d layers that train: they begin as if new, %s first. "
            "PARAMS_TARGET_MODULES chooses the layers.",
            lora.resume_from, len(new), count, new[0],
        )  # fmt: skip
