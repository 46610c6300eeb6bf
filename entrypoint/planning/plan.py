"""Settings, manifest and hardware → the plan. Pure but for looking whether a named folder or file is there.

Every `auto` is resolved here, with its reason; what cannot be done is refused, all at once, before any download.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any

from entrypoint.dataset_config.complete import Overrides, complete_datasets
from entrypoint.dataset_config.manifest import HUB_ID, Manifest
from entrypoint.planning import single_files, starting_point, text_encoders
from entrypoint.planning.engine_choice import engine_plan
from entrypoint.settings import Settings
from entrypoint.settings.checks import Notes, absolute, instead, is_file, is_folder, show
from entrypoint.system.hardware import Hardware
from trainer.spec.errors import SettingsError
from trainer.spec.family import BaseModel, Facts, base_models, get_family
from trainer.spec.optimizers import OPTIMIZERS
from trainer.spec.plan import DataPlan, Dataset, LoraPlan, ModelPlan, OptimPlan, OutputPlan, Plan, TrainPlan
from trainer.spec.prompts import complete_prompts

CONSTANT = ("constant", "constant_with_warmup")  # the schedules that schedule-free optimisers go with
CYCLIC = "cosine_with_restarts"
# What only models of one objective have (`Facts.objective`): a field of Settings, and its value that asks for nothing.
OF_OBJECTIVE: dict[str, dict[str, Any]] = {
    "flow": {"discrete_flow_shift": None, "loss_weighting": "none"},
    "denoising": {"prediction_type": "auto", "zero_terminal_snr": None, "min_snr_gamma": 0.0},
}
ELSEWHERE = {"lr": "PARAMS_LEARNING_RATE", "weight_decay": "PARAMS_WEIGHT_DECAY", "warmup_steps": "PARAMS_WARMUP_STEPS"}


def make_plan(settings: Settings, manifest: Manifest, hardware: Hardware, *, now: datetime) -> Plan:
    """What will be done, complete. Raises SettingsError with a line for each thing that cannot be done."""
    notes = Notes()
    base = base_models()
    if settings.model.base_model not in base:
        raise SettingsError(
            f"BASE_MODEL={show(settings.model.base_model)} is not known; {instead(settings.model.base_model, base)}"
        )
    name, model = base[settings.model.base_model]
    facts = get_family(name).FACTS
    model_plan = _model(settings, name, model, notes)
    datasets = complete_datasets(
        manifest, _overrides(settings), model_resolution=model.resolution, multiple=facts.multiple, notes=notes
    )
    own_prompts = settings.data.trigger_word if manifest.prompts_packaged else None
    prompts = complete_prompts(
        manifest.prompts,
        facts=facts,
        model=model,
        resolution=datasets[0].resolution,
        seed=settings.training.seed,
        prefix=f"{own_prompts}, " if own_prompts else "",
        problems=notes,
    )
    optim = _optim(settings, name, notes)
    lora = _lora(settings, facts, trained=optim.text_encoders, notes=notes)
    engine, datasets = engine_plan(
        settings, hardware, facts=facts, model=model, datasets=datasets, rank=lora.rank, prompts=prompts, notes=notes
    )
    plan = Plan(
        model=model_plan,
        data=DataPlan(datasets, strict=settings.data.strict_dataset),
        lora=lora,
        optim=optim,
        train=_train(settings, facts, notes),
        engine=engine,
        output=_output(settings, datasets, now=now, notes=notes),
        prompts=prompts,
    )
    notes.raise_if_any("This cannot be done")
    if not plan.output.name:
        plan = _named(plan, now=now)
    return dataclasses.replace(plan, reasons=tuple(notes.reasons))


def _model(settings: Settings, name: str, model: BaseModel, notes: Notes) -> ModelPlan:
    source, here = model.source, Path(model.source).is_absolute()
    asked, variable = settings.model.model_path, "MODEL_PATH"
    if single_files.is_single(asked):
        if wrong := single_files.problem(asked or ""):
            notes.add(f"MODEL_PATH={show(asked)} {wrong}.")
        asked, variable = settings.model.model_config_path, "MODEL_CONFIG_PATH"
    elif settings.model.model_config_path:
        notes.add(
            f"MODEL_CONFIG_PATH={show(settings.model.model_config_path)} goes with a .safetensors file in MODEL_PATH "
            "only. Fix: remove it."
        )
    if asked:
        source, here = asked, is_folder(asked)
        problem = _model_path_problem(source) if not here else None
        if problem:
            file = "a .safetensors file, " if variable == "MODEL_PATH" else ""
            accepted = f"{file}a folder in diffusers layout (with model_index.json), or a Hub repository like org/name"
            notes.add(f"{variable}={show(source)} {problem}. Allowed: {accepted}.")
        source = absolute(source) if here else source
    if settings.model.model_revision and here:
        fix = f"Fix: remove it, or name a repository in {variable}."
        notes.add(
            f"MODEL_REVISION={show(settings.model.model_revision)}: {source} is a folder and has no revisions. {fix}"
        )
    parts = single_files.choose(settings, get_family(name).FACTS, notes)
    return ModelPlan(settings.model.base_model, name, source, revision=settings.model.model_revision, parts=parts)


def _model_path_problem(source: str) -> str | None:
    if problem := single_files.problem(source):
        return problem
    if source.startswith(("/", ".", "~")):
        return "is no folder that is there"
    return None if HUB_ID.fullmatch(source) and "/" in source else "is neither a folder nor the name of a repository"


def _overrides(settings: Settings) -> Overrides:
    return Overrides(
        dataset_name=settings.data.dataset_name,
        revision=settings.data.dataset_revision,
        split=settings.data.dataset_split,
        image_column=settings.data.image_column,
        caption_column=settings.data.caption_column,
        resolution=settings.data.resolution,
        batch_size=settings.data.batch_size,
        num_repeats=settings.data.num_repeats,
        caption_dropout_rate=settings.data.caption_dropout_rate,
        trigger_word=settings.data.trigger_word,
    )


# ---- adapter, optimiser, training


def _lora(settings: Settings, facts: Facts, *, trained: Collection[str], notes: Notes) -> LoraPlan:
    start = settings.adapter.resume_from
    if start and (wrong := starting_point.unusable(start)):
        notes.add(wrong)
        start = None
    rank, split_qkv, targets = starting_point.adapter(
        absolute(start) if start and is_file(start) else None,
        facts,
        rank=settings.adapter.network_dim,
        split_qkv=settings.adapter.split_qkv,
        targets=settings.adapter.target_modules,
        encoders=trained,
        dora=settings.adapter.lora_type == "dora",
        notes=notes,
    )
    if settings.adapter.lora_type == "dora":
        text_encoders.check_dora(facts.name, targets, notes)
    return LoraPlan(
        kind=settings.adapter.lora_type,
        rank=rank,
        alpha=settings.adapter.network_alpha,
        split_qkv=split_qkv,
        targets=targets,
        resume_from=absolute(start) if start else None,
    )


def _optim(settings: Settings, family_name: str, notes: Notes) -> OptimPlan:
    name, scheduler = settings.training.optimizer_type, settings.training.learning_scheduler
    spec = OPTIMIZERS[name]
    rate = settings.training.learning_rate
    if rate is None:
        rate = spec.learning_rate
        notes.chose("PARAMS_LEARNING_RATE", f"{rate:g}", f"the default with {name}")
    if spec.schedule_free and scheduler not in CONSTANT:
        notes.add(
            f"PARAMS_LEARNING_SCHEDULER={scheduler}: {name} needs no schedule and takes none. "
            f"Allowed: {', '.join(CONSTANT)}."
        )
    if settings.training.warmup_steps and scheduler == "constant" and not spec.own_warmup:
        notes.add(
            f"PARAMS_WARMUP_STEPS={settings.training.warmup_steps}: PARAMS_LEARNING_SCHEDULER=constant has no warm-up. "
            f"Fix: PARAMS_LEARNING_SCHEDULER=constant_with_warmup."
        )
    cycles = settings.training.num_cycles or max(1, settings.training.max_epochs // 3)
    if settings.training.num_cycles and scheduler != CYCLIC:
        notes.chose("PARAMS_NUM_CYCLES", "not used", f"{scheduler} has no cycles")
    return OptimPlan(
        name=name,
        learning_rate=rate,
        weight_decay=settings.training.weight_decay,
        args=_optimizer_args(settings, notes),
        scheduler=scheduler,
        warmup_steps=settings.training.warmup_steps,
        num_cycles=cycles if scheduler == CYCLIC else 1,
        text_encoders=text_encoders.rates(
            settings.training.text_encoder_lr,
            family_name=family_name,
            base=settings.model.base_model,
            optimizer=name,
            learning_rate=rate,
            notes=notes,
        ),
    )


def _optimizer_args(settings: Settings, notes: Notes) -> dict[str, Any]:
    """All keyword arguments besides learning rate and weight decay; tuples as lists, as JSON has them."""
    spec = OPTIMIZERS[settings.training.optimizer_type]
    args = json.loads(json.dumps(spec.defaults))
    if settings.training.d_coef is not None and spec.prodigy:
        args["d_coef"] = settings.training.d_coef
    elif settings.training.d_coef is not None:
        notes.chose("PARAMS_D_COEF", "not used", f"{settings.training.optimizer_type} has none")
    for name, value in settings.training.optimizer_args.items():
        where = f"PARAMS_OPTIMIZER_ARGS: {name}={value}"
        if name in ELSEWHERE and name not in spec.arguments:
            notes.add(f"{where}. Fix: remove it and set {ELSEWHERE[name]}.")
        elif name not in spec.arguments:
            notes.add(
                f"{where}: {settings.training.optimizer_type} has no such argument; {instead(name, spec.arguments)}"
            )
        elif name == "d_coef" and settings.training.d_coef is not None:
            notes.add(f"{where}: PARAMS_D_COEF says it too. Fix: remove one of them.")
        elif problem := _argument_problem(name, value, spec.defaults.get(name)):
            notes.add(f"{where} {problem}.")
        args[name] = value
    return dict(args)


def _argument_problem(name: str, value: Any, default: Any) -> str | None:
    """What is wrong with the value of an optimiser's argument, as far as it shows before the optimiser is made."""
    numbers = [v for v in value if isinstance(v, (int, float))] if isinstance(value, list) else []
    if name == "betas":
        good = len(numbers) == len(value) == 2 if isinstance(value, list) else False
        return None if good and all(0 <= n < 1 for n in numbers) else "is not two numbers from 0 to 1 like 0.9,0.999"
    if isinstance(value, str):
        return "is a word, where a number, true, false or none is needed"
    if isinstance(value, list) and name != "eps":
        return "is a list, where one value is needed"
    if isinstance(default, bool) and not isinstance(value, bool):
        return "is neither true nor false"
    return "is no number" if isinstance(default, float) and isinstance(value, bool) else None


def _train(settings: Settings, facts: Facts, notes: Notes) -> TrainPlan:
    sampling = settings.training.timestep_sampling
    if sampling is None:
        sampling = facts.timestep_samplings[0]
        notes.chose("PARAMS_TIMESTEP_SAMPLING", sampling, f"the default of {settings.model.base_model}")
    elif sampling not in facts.timestep_samplings:
        known = facts.timestep_samplings
        notes.add(
            f"PARAMS_TIMESTEP_SAMPLING={show(sampling)} is not one of {settings.model.base_model}; "
            f"{instead(sampling, known)}"
        )
    if sampling == "shift" and settings.training.discrete_flow_shift is None:
        notes.chose(
            "PARAMS_DISCRETE_FLOW_SHIFT", f"{facts.flow_shift:g}", f"the default of {settings.model.base_model}"
        )
    _check_objective(settings, facts, notes)
    return TrainPlan(
        seed=settings.training.seed,
        max_epochs=settings.training.max_epochs,
        max_steps=settings.training.max_steps,
        gradient_accumulation=settings.training.gradient_accumulation,
        max_grad_norm=settings.training.max_grad_norm,
        timestep_sampling=sampling,
        discrete_flow_shift=settings.training.discrete_flow_shift or facts.flow_shift,
        loss_weighting=settings.training.loss_weighting,
        prediction_type=settings.training.prediction_type,
        zero_terminal_snr=settings.training.zero_terminal_snr,
        min_snr_gamma=settings.training.min_snr_gamma,
        guidance_scale=settings.training.guidance_scale,
        noise_offset=settings.training.noise_offset,
        caption_dropout_rate=settings.data.caption_dropout_rate or 0.0,
        prior_loss_weight=settings.training.prior_loss_weight,
        ema_decay=settings.training.ema_decay,
        max_loss_spike=settings.training.max_loss_spike,
        max_skipped_steps=settings.training.max_skipped_steps,
    )


def _check_objective(settings: Settings, facts: Facts, notes: Notes) -> None:
    """Refuse what belongs to another kind of training, and what contradicts itself."""
    for objective, fields in OF_OBJECTIVE.items():
        for field, nothing in fields.items():
            value = getattr(settings.training, field)
            if objective != facts.objective and value != nothing:
                shown = str(value).lower() if isinstance(value, bool) else value
                notes.add(
                    f"PARAMS_{field.upper()}={shown}: {settings.model.base_model} is trained by {facts.objective} and "
                    f"not by {objective}, which alone has this. Fix: remove it."
                )
    if settings.training.zero_terminal_snr and settings.training.prediction_type == "epsilon":
        notes.add(
            "PARAMS_ZERO_TERMINAL_SNR=true: with PARAMS_PREDICTION_TYPE=epsilon the last noise level teaches nothing. "
            "Fix: PARAMS_PREDICTION_TYPE=v_prediction, if that is what the model predicts; or remove it."
        )


# ---- output


def _output(settings: Settings, datasets: tuple[Dataset, ...], *, now: datetime, notes: Notes) -> OutputPlan:
    if settings.output.validate_every_n_steps and not any(d.validation_split for d in datasets):
        notes.add(
            f"PARAMS_VALIDATE_EVERY_N_STEPS={settings.output.validate_every_n_steps}: no pictures are held out. "
            f"Fix: validation_split in dataset.json, 0.1 for example."
        )
    return OutputPlan(
        path=str(settings.output.output_path),
        name=settings.output.output_name or "",
        cache=str(settings.data.cache_path),
        started=int(now.timestamp()),
        save_every=settings.output.save_every_n_steps,
        sample_every=settings.output.sample_every_n_steps,
        validate_every=settings.output.validate_every_n_steps,
        keep_checkpoints=settings.output.keep_checkpoints,
    )


def _named(plan: Plan, *, now: datetime) -> Plan:
    """With a name of what decides the weights, and the start time."""
    essence = json.dumps(plan.essence(), sort_keys=True).encode()
    name = f"{hashlib.sha256(essence).hexdigest()[:8]}-{now:%Y%m%d-%H%M%S}"
    return dataclasses.replace(plan, output=dataclasses.replace(plan.output, name=name))
