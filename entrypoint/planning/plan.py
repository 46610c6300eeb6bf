"""Settings, manifest and hardware → the plan. Pure, but for looking whether a named folder or file exists.

Every `auto` is resolved here or in a module that is called from here, with its reason; what cannot be done is refused,
all problems at once, before any download.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from entrypoint.dataset_config.complete import complete_datasets, fill_trigger, trigger_of
from entrypoint.dataset_config.manifest import Manifest
from entrypoint.dataset_config.sources import HUB_ID
from entrypoint.fetch import training_adapter
from entrypoint.planning import sanity, single_files, starting_point, text_encoders
from entrypoint.planning.captions.captioner import captioner_plan
from entrypoint.planning.engine_choice import engine_plan
from entrypoint.planning.step_time import quote_plan, refuse_too_short
from entrypoint.planning.targets import check_targets
from entrypoint.settings import Settings
from entrypoint.settings.checks import Notes, absolute, is_file, is_folder
from entrypoint.settings.variables.adapter import AdapterSettings
from entrypoint.settings.variables.model import ModelSettings
from entrypoint.settings.variables.output import OutputSettings
from entrypoint.settings.variables.training import TrainingSettings
from entrypoint.system.hardware import Hardware
from trainer.spec.errors import SettingsError
from trainer.spec.family import BaseModel, Facts, base_models, facts_of, trainable_encoders
from trainer.spec.messages.secrets import without_secrets
from trainer.spec.optimizers import NOT_OFFERED, OPTIMIZERS, OptimizerSpec
from trainer.spec.plan import DataPlan, Dataset, LoraPlan, ModelPlan, OptimPlan, OutputPlan, Plan, Prompt, TrainPlan
from trainer.spec.prompts import complete_prompts, idle_guidance
from trainer.spec.values import shorten, show, suggestion

# A schedule-free optimiser averages its iterates instead of following a schedule (Defazio et al. 2024,
# arXiv:2405.15682), so that a falling learning rate would work against it.
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
EPOCHS_PER_CYCLE = 3  # where PARAMS_NUM_CYCLES is not set
# What only models of one objective have (`Facts.objective`): a field of TrainingSettings, and its neutral value.
ONLY_FOR_OBJECTIVE: dict[str, dict[str, Any]] = {
    "flow": {"discrete_flow_shift": None, "loss_weighting": "none"},
    "denoising": {"prediction_type": "auto", "zero_terminal_snr": None, "min_snr_gamma": 0.0},
}
# Arguments of optimisers that PARAMS_OPTIMIZER_ARGS may not set, since they have a variable of their own.
ARGUMENT_VARIABLES = {
    "lr": "PARAMS_LEARNING_RATE",
    "learning_rate": "PARAMS_LEARNING_RATE",
    "weight_decay": "PARAMS_WEIGHT_DECAY",
    "warmup_steps": "PARAMS_WARMUP_STEPS",
}


def make_plan(settings: Settings, manifest: Manifest, hardware: Hardware, *, now: datetime) -> Plan:
    """The complete plan. Raises SettingsError with a line for each thing that cannot be done.

    `now` is the start time: it names the output where OUTPUT_NAME is not set.
    """
    notes = Notes(reasons=[*settings.reasons], warnings=[*settings.warnings])
    family_name, base_model = _base_model(settings.model.base_model)
    facts = facts_of(family_name, settings.model.base_model)
    model_plan = _model_plan(settings.model, family_name, base_model, facts, notes)
    datasets = complete_datasets(
        manifest, settings.data, model_resolution=base_model.resolution, multiple=facts.multiple, notes=notes
    )
    prompts = _prompts(manifest, datasets, facts=facts, model=base_model, seed=settings.training.seed, notes=notes)
    optim = _optimizer_plan(settings.training, family_name, settings.model.base_model, notes)
    single_files.note_prediction(model_plan.parts.get("denoiser"), settings.training, facts, notes)
    adapter = check_targets(settings.adapter, model=model_plan, facts=facts, notes=notes)
    lora = _adapter_plan(adapter, facts, model=model_plan, trained_encoders=optim.text_encoders, notes=notes)
    engine, datasets = engine_plan(
        settings,
        hardware,
        facts=facts,
        model=base_model,
        datasets=datasets,
        rank=lora.rank,
        trains_text=bool(optim.text_encoders),
        prompts=prompts,
        notes=notes,
    )
    plan = Plan(
        model=_with_training_adapter(model_plan, settings.adapter, notes),
        data=_data_plan(settings, datasets, facts, notes),
        lora=lora,
        optim=optim,
        train=_training_plan(settings, facts, notes),
        engine=engine,
        output=_output_plan(
            settings.output,
            datasets,
            cache=settings.data.cache_path,
            max_cache_bytes=_bytes(settings.data.max_cache_gib),
            resume_with_changes=settings.adapter.resume_with_changes,
            now=now,
            notes=notes,
        ),
        prompts=prompts,
    )
    plan = dataclasses.replace(plan, quote=quote_plan(plan, base_model.footprint, hardware, settings.finish))
    refuse_too_short(plan.quote, notes)
    notes.raise_if_any("This cannot be done")
    if not plan.output.name:
        plan = _with_default_name(plan, now=now)
    plan = dataclasses.replace(plan, given=tuple(sorted(settings.given)), automatic=_left_to_hardware(settings))
    sanity.warn(sanity.Request(settings, plan, facts, base_model), notes)
    # They are kept in plan.json, and quote what the user has written.
    reasons = tuple(without_secrets(reason) for reason in notes.reasons)
    warnings = tuple(without_secrets(warning) for warning in notes.warnings)
    return dataclasses.replace(plan, reasons=reasons, details=tuple(notes.details), warnings=warnings)


def _data_plan(settings: Settings, datasets: tuple[Dataset, ...], facts: Facts, notes: Notes) -> DataPlan:
    """The datasets, and the model that captions their images."""
    longest = settings.training.max_token_length
    captioner = captioner_plan(settings.data, datasets, facts, max_tokens=longest, notes=notes)
    return DataPlan(datasets, strict=settings.data.strict_dataset, captioner=captioner)


def _left_to_hardware(settings: Settings) -> tuple[str, ...]:
    """The variables that are `auto` and decided by the hardware: on another card a run goes on all the same."""
    choices = {
        "BACKEND": settings.engine.backend == "auto",
        "PARAMS_PRECISION": settings.engine.precision == "auto",
        "PARAMS_BATCH_SIZE": settings.data.batch_size == 0,
        "PARAMS_OFFLOAD": settings.engine.offload == "auto",
    }
    return tuple(name for name, is_auto in choices.items() if is_auto)


# ---- model


def _base_model(name: str) -> tuple[str, BaseModel]:
    """The family and the facts of BASE_MODEL."""
    known = base_models()
    if name not in known:
        raise SettingsError(f"BASE_MODEL={show(name)} is not known; {suggestion(name, known)}")
    return known[name]


def _model_plan(
    settings: ModelSettings, family_name: str, base_model: BaseModel, facts: Facts, notes: Notes
) -> ModelPlan:
    """Where the base model comes from: its own repository, or what MODEL_PATH or MODEL_CONFIG_PATH name.

    A single file in MODEL_PATH has weights only, so that configs and missing parts come from MODEL_CONFIG_PATH.
    """
    requested = settings.model_path
    variable = "MODEL_PATH"
    if single_files.is_single_file(requested):
        if problem := single_files.path_problem(requested or ""):
            notes.add(f"MODEL_PATH={show(requested)} {problem}.")
        requested = settings.model_config_path
        variable = "MODEL_CONFIG_PATH"
    elif settings.model_config_path:
        notes.add(
            f"MODEL_CONFIG_PATH={show(settings.model_config_path)} goes with a .safetensors file in MODEL_PATH only. "
            "Fix: remove it."
        )
    source = base_model.source
    is_local = Path(source).is_absolute()
    if requested:
        source = requested
        is_local = is_folder(requested)
        if is_local:
            source = absolute(source)
        elif problem := _model_source_problem(source):
            file = "a .safetensors file, " if variable == "MODEL_PATH" else ""
            accepted = f"{file}a folder in diffusers layout (with model_index.json), or a Hub repository like org/name"
            notes.add(f"{variable}={show(source)} {problem}. Allowed: {accepted}.")
    if settings.model_revision and is_local:
        fix = f"Fix: remove it, or name a repository in {variable}."
        notes.add(f"MODEL_REVISION={show(settings.model_revision)}: {source} is a folder and has no revisions. {fix}")
    parts = single_files.choose_parts(settings, facts, notes)
    if settings.model_revision and not is_local and set(parts) == set(facts.parts):
        notes.add(
            f"MODEL_REVISION={show(settings.model_revision)}: all weights are local files, and nothing is taken from "
            f"{source}. Fix: remove it."
        )
    return ModelPlan(settings.base_model, family_name, source, revision=settings.model_revision, parts=parts)


def _with_training_adapter(model: ModelPlan, settings: AdapterSettings, notes: Notes) -> ModelPlan:
    """The model, with the LoRA that is merged into it while it trains, if one is named."""
    name = settings.training_adapter
    if name is None:
        return model
    if settings.lora_type == "dora":
        notes.add(
            f"{training_adapter.VARIABLE} does not go with PARAMS_LORA_TYPE=dora: its magnitudes would be those of the "
            "merged weights, which nobody has who uses the LoRA. Fix: PARAMS_LORA_TYPE=lora."
        )
    if is_file(name):
        name = absolute(name)
        if problem := training_adapter.problem_of(Path(name), model.family):
            notes.add(f"{training_adapter.VARIABLE}={name} {problem}")
    elif problem := training_adapter.named(name):
        notes.add(problem)
    return dataclasses.replace(model, training_adapter=name)


def _model_source_problem(source: str) -> str | None:
    """Why `source`, which is no folder, cannot be the name of a repository either."""
    if problem := single_files.path_problem(source):
        return problem
    if source.startswith(("/", ".", "~")):
        return "is not an existing folder"
    if not HUB_ID.fullmatch(source) or "/" not in source:
        return "is neither a folder nor the name of a repository"
    return None


def _prompts(
    manifest: Manifest, datasets: tuple[Dataset, ...], *, facts: Facts, model: BaseModel, seed: int, notes: Notes
) -> tuple[Prompt, ...]:
    """The prompts of the samples, complete; notes what they set without effect."""
    prompts = complete_prompts(
        manifest.prompts,
        facts=facts,
        model=model,
        resolution=datasets[0].resolution,
        seed=seed,
        prefix=_prompt_prefix(datasets, manifest),
        problems=notes,
        notes=notes.reasons,
    )
    notes.warnings += idle_guidance(manifest.prompts, facts, model)
    return fill_trigger(prompts, trigger_of(datasets), notes)


def _prompt_prefix(datasets: tuple[Dataset, ...], manifest: Manifest) -> str:
    """The trigger word goes before this program's own prompts; prompts of the user stay as they are."""
    trigger = trigger_of(datasets)
    if trigger and manifest.prompts_packaged:
        return f"{trigger}, "
    return ""


# ---- adapter, optimiser, training


def _adapter_plan(
    settings: AdapterSettings, facts: Facts, *, model: ModelPlan, trained_encoders: Collection[str], notes: Notes
) -> LoraPlan:
    """Rank, targets and type of the adapters; those of a LoRA file where the job starts from one."""
    start = settings.resume_from
    if start and (problem := starting_point.path_problem(start)):
        notes.add(problem)
        start = None
    path = absolute(start) if start else None
    # A folder holds a state, whose adapters the trainer checks; only a file has a header to plan by.
    file = path if path and is_file(path) else None
    shape = starting_point.adapter_shape(
        settings, file, facts, model=model, trained_encoders=trained_encoders, notes=notes
    )
    if settings.lora_type == "dora":
        text = (
            "ComfyUI and Forge read <name>.safetensors, diffusers reads <name>-diffusers.safetensors; sd-scripts and "
        )
        notes.chose("PARAMS_LORA_TYPE", "dora", f"{text}older tools read neither")
    return LoraPlan(
        kind=settings.lora_type,
        rank=shape.rank,
        alpha=settings.network_alpha,
        split_qkv=shape.split_qkv,
        targets=shape.targets,
        resume_from=path,
    )


def _optimizer_plan(settings: TrainingSettings, family_name: str, base_model: str, notes: Notes) -> OptimPlan:
    """The optimiser with all its arguments, its schedule, and the learning rates of the text encoders."""
    name = settings.optimizer_type
    scheduler = settings.learning_scheduler
    spec = OPTIMIZERS[name]
    learning_rate = settings.learning_rate
    if learning_rate is None:
        learning_rate = spec.learning_rate
        notes.chose("PARAMS_LEARNING_RATE", f"{learning_rate:g}", f"the default with {name}")
    _check_schedule(settings, spec, notes)
    cycles = settings.num_cycles or max(1, settings.max_epochs // EPOCHS_PER_CYCLE)
    return OptimPlan(
        name=name,
        learning_rate=learning_rate,
        weight_decay=settings.weight_decay,
        args=_optimizer_arguments(settings, spec, notes),
        scheduler=scheduler,
        warmup_steps=settings.warmup_steps,
        num_cycles=cycles if scheduler == sanity.CYCLIC_SCHEDULE else 1,
        text_encoders=text_encoders.learning_rates(
            settings.text_encoder_lr,
            family_name=family_name,
            base_model=base_model,
            optimizer=name,
            learning_rate=learning_rate,
            notes=notes,
        ),
    )


def _check_schedule(settings: TrainingSettings, spec: OptimizerSpec, notes: Notes) -> None:
    """Refuse a schedule that the optimiser does not follow, and warm-up steps that no schedule takes."""
    scheduler = settings.learning_scheduler
    if spec.schedule_free and scheduler not in CONSTANT_SCHEDULES:
        notes.add(
            f"PARAMS_LEARNING_SCHEDULER={scheduler}: {settings.optimizer_type} needs no schedule and takes none. "
            f"Allowed: {', '.join(CONSTANT_SCHEDULES)}."
        )
    if settings.warmup_steps and scheduler == "constant" and not spec.own_warmup:
        notes.add(
            f"PARAMS_WARMUP_STEPS={settings.warmup_steps}: PARAMS_LEARNING_SCHEDULER=constant has no warm-up. "
            f"Fix: PARAMS_LEARNING_SCHEDULER=constant_with_warmup."
        )


def _optimizer_arguments(settings: TrainingSettings, spec: OptimizerSpec, notes: Notes) -> dict[str, Any]:
    """All keyword arguments of the optimiser besides learning rate and weight decay.

    Tuples become lists, as they are when plan.json is read again: otherwise a resumed job would seem to differ.
    """
    arguments: dict[str, Any] = json.loads(json.dumps(spec.defaults))
    if settings.d_coef is not None and spec.prodigy:
        arguments["d_coef"] = settings.d_coef
    for name, value in settings.optimizer_args.items():
        if problem := _argument_problem(name, value, settings, spec):
            notes.add(f"PARAMS_OPTIMIZER_ARGS: {name}={_in_words(value)} {problem}.")
        arguments[name] = value
    return arguments


def _argument_problem(name: str, value: Any, settings: TrainingSettings, spec: OptimizerSpec) -> str | None:
    """Why the optimiser cannot have this argument, as the rest of a sentence that names it."""
    if name in spec.rules:
        if name == "d_coef" and settings.d_coef is not None:
            return "is set by PARAMS_D_COEF too. Fix: remove one of them"
        return spec.rules[name].problem(value)
    if name in ARGUMENT_VARIABLES:
        return f"has a variable of its own. Fix: remove it and set {ARGUMENT_VARIABLES[name]}={_in_words(value)}"
    if name in NOT_OFFERED:
        return NOT_OFFERED[name]
    optimizer = settings.optimizer_type
    others = [other for other, its in OPTIMIZERS.items() if name in its.rules]
    if others:
        return f"is an argument of {', '.join(others)}, and not of PARAMS_OPTIMIZER_TYPE={optimizer}. Fix: remove it"
    advice = suggestion(name, spec.arguments).removesuffix(".")
    return f"is unknown: {optimizer} has no such argument; {advice}"


def _in_words(value: Any) -> str:
    """A value as a user writes it in PARAMS_OPTIMIZER_ARGS; at most 80 characters."""
    if isinstance(value, list):
        words = ",".join(_in_words(item) for item in value)
    elif value is None or isinstance(value, bool):
        words = str(value).lower()
    else:
        words = str(value)
    return shorten(words)


def _training_plan(settings: Settings, facts: Facts, notes: Notes) -> TrainPlan:
    """Steps, noise levels, losses and guards."""
    training = settings.training
    base_model = settings.model.base_model
    sampling = training.timestep_sampling
    if sampling is None:
        sampling = facts.timestep_samplings[0]
        notes.chose("PARAMS_TIMESTEP_SAMPLING", sampling, f"the default of {base_model}")
    elif sampling not in facts.timestep_samplings:
        advice = suggestion(sampling, facts.timestep_samplings)
        notes.add(f"PARAMS_TIMESTEP_SAMPLING={show(sampling)} is not one of {base_model}; {advice}")
    if sampling == "shift" and training.discrete_flow_shift is None:
        notes.chose("PARAMS_DISCRETE_FLOW_SHIFT", f"{facts.flow_shift:g}", f"the default of {base_model}")
    _check_objective(training, facts, base_model, notes)
    return TrainPlan(
        seed=training.seed,
        max_epochs=training.max_epochs,
        max_steps=training.max_steps,
        gradient_accumulation=training.gradient_accumulation,
        max_grad_norm=training.max_grad_norm,
        timestep_sampling=sampling,
        discrete_flow_shift=training.discrete_flow_shift or facts.flow_shift,
        loss_weighting=training.loss_weighting,
        prediction_type=training.prediction_type,
        zero_terminal_snr=training.zero_terminal_snr,
        min_snr_gamma=training.min_snr_gamma,
        guidance_scale=training.guidance_scale,
        noise_offset=training.noise_offset,
        caption_dropout_rate=settings.data.caption_dropout_rate or 0.0,
        prior_loss_weight=training.prior_loss_weight,
        ema_decay=training.ema_decay,
        max_loss_spike=training.max_loss_spike,
        max_skipped_steps=training.max_skipped_steps,
        max_token_length=_max_token_length(training, facts, base_model, notes),
    )


def _max_token_length(training: TrainingSettings, facts: Facts, base_model: str, notes: Notes) -> int:
    """How many tokens of a caption CLIP reads."""
    length = int(training.max_token_length)
    if length not in facts.max_token_lengths:
        reader, tokens = next(iter(facts.text_readers.values()))
        reads = f"{reader} reads {tokens} tokens of a caption"
        if trainable_encoders(facts.name):  # the CLIPs
            reads += ", and CLIP gives a summary of its beginning"
        notes.add(f"PARAMS_MAX_TOKEN_LENGTH={length}: in {base_model}, {reads}. Fix: remove it.")
    return length


def _check_objective(settings: TrainingSettings, facts: Facts, base_model: str, notes: Notes) -> None:
    """Refuse what belongs to another objective than the model's, and what contradicts itself."""
    for objective, neutral_values in ONLY_FOR_OBJECTIVE.items():
        if objective == facts.objective:
            continue
        for field, neutral in neutral_values.items():
            value = getattr(settings, field)
            if value != neutral:
                shown = str(value).lower() if isinstance(value, bool) else value
                notes.add(
                    f"PARAMS_{field.upper()}={shown}: {base_model} is trained by {facts.objective} and not by "
                    f"{objective}, which alone has this. Fix: remove it."
                )
    # Without signal in the last noise level, the noise to predict is the input itself, and the loss there is always 0
    # (Lin et al. 2023, arXiv:2305.08891).
    if settings.zero_terminal_snr and settings.prediction_type == "epsilon":
        notes.add(
            "PARAMS_ZERO_TERMINAL_SNR=true: with PARAMS_PREDICTION_TYPE=epsilon the last noise level teaches nothing. "
            "Fix: PARAMS_PREDICTION_TYPE=v_prediction, if that is what the model predicts; or remove it."
        )


# ---- output


def _output_plan(
    settings: OutputSettings,
    datasets: tuple[Dataset, ...],
    *,
    cache: Path,
    max_cache_bytes: int | None,
    resume_with_changes: bool,
    now: datetime,
    notes: Notes,
) -> OutputPlan:
    """Folders, and how often the job saves, samples and validates."""
    if settings.validate_every_n_steps and not any(dataset.validation_split for dataset in datasets):
        notes.add(
            f"PARAMS_VALIDATE_EVERY_N_STEPS={settings.validate_every_n_steps}: no images are held out. "
            f"Fix: set validation_split in dataset.json, 0.1 for example."
        )
    return OutputPlan(
        path=str(settings.output_path),
        name=settings.output_name or "",
        cache=str(cache),
        started=int(now.timestamp()),
        save_every=settings.save_every_n_steps,
        sample_every=settings.sample_every_n_steps,
        validate_every=settings.validate_every_n_steps,
        keep_checkpoints=settings.keep_checkpoints,
        save_precision=settings.save_precision,
        requested=settings.output_name or "",
        resume_with_changes=resume_with_changes,
        max_cache_bytes=max_cache_bytes,
        sample_strengths=_other_strengths(settings.sample_strengths),
    )


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)


def _other_strengths(asked: Sequence[float]) -> tuple[float, ...]:
    """Each once, in order, with as many digits as a file's name has; 1 is drawn anyway."""
    return tuple(sorted({round(strength, 3) for strength in asked} - {1.0}))


def _with_default_name(plan: Plan, *, now: datetime) -> Plan:
    """The plan with an output name made of a hash of what decides the weights, and the start time."""
    essence = json.dumps(plan.essence(), sort_keys=True).encode()
    name = f"{hashlib.sha256(essence).hexdigest()[:8]}-{now:%Y%m%d-%H%M%S}"
    return dataclasses.replace(plan, output=dataclasses.replace(plan.output, name=name))
