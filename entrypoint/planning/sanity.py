"""Settings that can be carried out, but that probably nobody wants, and settings without any effect: a warning each.

One row for each: what it looks at, and the sentence with the usual value. A row gives None where there is nothing to
say. What depends on the number of steps is in `trainer.spec.rules.sanity`, which the trainer looks at too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from entrypoint.settings import Settings
from entrypoint.settings.checks import Notes
from trainer.base_model import configs
from trainer.spec.family import BaseModel, Facts
from trainer.spec.optimizers import OPTIMIZERS
from trainer.spec.plan import AUTO, Plan
from trainer.spec.prompts import has_embedded_guidance
from trainer.spec.rules import sanity

CYCLIC_SCHEDULE = "cosine_with_restarts"
USUAL_AREAS = (0.2, 2.6)  # times the model's own; below and above, a base model draws badly itself


@dataclass(frozen=True)
class Request:
    """What a row looks at: what was asked for, and what the plan has made of it."""

    settings: Settings
    plan: Plan
    facts: Facts
    model: BaseModel

    def is_given(self, variable: str) -> bool:
        return variable in self.settings.given


# ---- values that are far from the usual ones


def _learning_rate(request: Request) -> str | None:
    rate = request.plan.optim.learning_rate
    name = request.plan.optim.name
    spec = OPTIMIZERS[name]
    low, high = spec.usual_rates
    if not request.is_given("PARAMS_LEARNING_RATE") or low <= rate <= high:
        return None
    shown = f"PARAMS_LEARNING_RATE={rate:g} with PARAMS_OPTIMIZER_TYPE={name}"
    usual = f"Usual: {spec.learning_rate:g}, from {low:g} to {high:g}."
    if spec.prodigy:
        pace = f"{1 / rate:,.0f} times more slowly" if rate < 1 else f"{rate:g} times faster"
        return f"{shown}: it multiplies the step size that this optimiser finds, and so trains {pace}. {usual}"
    outcome = "training is likely to diverge" if rate > high else "it learns very slowly"
    return f"{shown}: {outcome}. {usual}"


def _text_encoder_rate(request: Request) -> str | None:
    spec = OPTIMIZERS[request.plan.optim.name]
    low = spec.usual_rates[0] / 10
    high = spec.usual_rates[1]
    odd = [rate for rate in request.plan.optim.text_encoders.values() if not low <= rate <= high]
    if not odd:
        return None
    usual = spec.learning_rate if spec.prodigy else spec.learning_rate / 2
    return (
        f"PARAMS_TEXT_ENCODER_LR={odd[0]:g} is unusual with PARAMS_OPTIMIZER_TYPE={request.plan.optim.name}. "
        f"Usual: {usual:g}, from {low:g} to {high:g}; 0 trains none."
    )


def _d_coef(request: Request) -> str | None:
    factor = request.plan.optim.args.get("d_coef")
    if not isinstance(factor, (int, float)) or 0.1 <= factor <= 10:
        return None
    return f"PARAMS_D_COEF={factor:g} multiplies the step size that Prodigy finds. Usual: 2, from 0.5 to 4."


def _weight_decay(request: Request) -> str | None:
    decay = request.plan.optim.weight_decay
    return None if decay <= 1 else f"PARAMS_WEIGHT_DECAY={decay:g} pulls the LoRA to zero. Usual: 0 to 0.1."


def _prodigy_warmup(request: Request) -> str | None:
    optim = request.plan.optim
    if not optim.warmup_steps or optim.args.get("safeguard_warmup") is not False:
        return None
    return (
        f"PARAMS_WARMUP_STEPS={optim.warmup_steps} with PARAMS_OPTIMIZER_TYPE={optim.name}: a rising learning rate "
        "makes its step size too large. Usual: 0, or PARAMS_OPTIMIZER_ARGS=safeguard_warmup=true."
    )


def _scale(request: Request) -> str | None:
    lora = request.plan.lora
    if lora.scale <= 4:
        return None
    return (
        f"PARAMS_NETWORK_ALPHA={lora.alpha:g} with PARAMS_NETWORK_DIM={lora.rank} makes the LoRA count "
        f"{lora.scale:.3g} times, which may diverge. Usual: alpha from 1 to the rank."
    )


def _rank(request: Request) -> str | None:
    rank = request.plan.lora.rank
    if rank <= 256:
        return None
    return f"PARAMS_NETWORK_DIM={rank} makes a very large LoRA, which memorises the images. Usual: 8 to 64."


def _caption_dropout(request: Request) -> str | None:
    rates = [request.plan.train.caption_dropout_rate]
    for dataset in request.plan.data.datasets:
        rates += [subset.caption_dropout_rate for subset in dataset.subsets]
    highest = max(rates)
    if highest <= 0.5:
        return None
    what = "no caption is ever trained" if highest == 1 else f"{highest:.0%} of the captions are left out"
    return f"caption_dropout_rate={highest:g} (PARAMS_CAPTION_DROPOUT_RATE): {what}. Usual: 0 to 0.2."


def _tag_dropout(request: Request) -> str | None:
    rates = []
    for dataset in request.plan.data.datasets:
        rates += [subset.caption_tag_dropout_rate for subset in dataset.subsets]
    if max(rates) < 1:
        return None
    return "caption_tag_dropout_rate=1 in dataset.json leaves out every tag. Usual: 0 to 0.2."


def _unfit_weights(request: Request) -> str | None:
    if not request.model.caution or request.is_given("MODEL_PATH") or request.plan.model.training_adapter:
        return None
    return f"BASE_MODEL={request.plan.model.base} {request.model.caution}."


def _unfit_file(request: Request) -> str | None:
    """By what the file or the repository is called, or by what the folder's index says: its tensors have no mark."""
    path = request.settings.model.model_path
    if path is None or not request.facts.name_cautions:
        return None
    found = _said_by_index(Path(path) / "model_index.json")
    if found is None:
        found = _said_by_name(PurePath(path).name.lower(), request.facts.name_cautions)
    if not found:
        return None
    if request.model.caution and found.startswith("distilled"):  # as the model's own weights are
        if request.plan.model.training_adapter:
            return None
        return f"MODEL_PATH={path} {request.model.caution}."
    return f"MODEL_PATH={path} is {found}. Fix: the weights of {request.model.source}."


def _said_by_index(index: Path) -> str | None:
    """What a folder's index says that its model is: "" for a base model; None where it says nothing."""
    if not index.is_file():
        return None
    try:
        is_distilled = configs.read_object(index).get("is_distilled")
    except ValueError:  # reported where the folder is checked
        return ""
    if is_distilled is None:
        return None
    return "distilled to few steps, which training undoes, by its model_index.json" if is_distilled else ""


def _said_by_name(name: str, cautions: Mapping[str, str]) -> str:
    for pattern, what in cautions.items():
        if re.search(pattern, name):
            return f"{what}, by its name"
    return ""


def _resolution(request: Request) -> str | None:
    native = request.model.resolution
    for dataset in request.plan.data.datasets:
        width, height = dataset.resolution
        area = width * height / native**2
        if not USUAL_AREAS[0] <= area <= USUAL_AREAS[1]:
            return (
                f"A resolution of {width} × {height} is far from the {native} × {native} that "
                f"{request.plan.model.base} was trained at. Usual: {native} (PARAMS_RESOLUTION), or half of it to "
                "save memory."
            )
    return None


def _noise_offset(request: Request) -> str | None:
    offset = request.plan.train.noise_offset
    return None if offset <= 0.3 else f"PARAMS_NOISE_OFFSET={offset:g} washes out the colours. Usual: 0 to 0.1."


def _ema_decay(request: Request) -> str | None:
    decay = request.plan.train.ema_decay
    if not 0 < decay < 0.9:
        return None
    return f"PARAMS_EMA_DECAY={decay:g} averages over {1 / (1 - decay):.2g} steps only. Usual: 0.99 to 0.9999, or 0."


def _repeats(request: Request) -> str | None:
    repeats = max(subset.num_repeats for subset in request.plan.data.subsets)
    if repeats <= 1000:
        return None
    return (
        f"num_repeats={repeats} (PARAMS_NUM_REPEATS): an epoch has every image {repeats:,} times. Usual: 1. Set "
        "the length of the job with PARAMS_MAX_STEPS."
    )


def _epochs(request: Request) -> str | None:
    epochs = request.plan.train.max_epochs
    if epochs <= 10_000 or request.plan.train.max_steps or not request.is_given("PARAMS_MAX_EPOCHS"):
        return None
    return (
        f"PARAMS_MAX_EPOCHS={epochs} sees every image {epochs:,} times. Usual: {sanity.USUAL_STEPS}; PARAMS_MAX_STEPS "
        "sets them."
    )


def _accumulation(request: Request) -> str | None:
    pieces = request.plan.train.gradient_accumulation
    if pieces <= 64:
        return None
    return f"PARAMS_GRADIENT_ACCUMULATION={pieces} makes steps {pieces} times longer. Usual: 1 to 8."


def _min_snr_gamma(request: Request) -> str | None:
    gamma = request.plan.train.min_snr_gamma
    if gamma == 0 or 1 <= gamma <= 20:
        return None
    return f"PARAMS_MIN_SNR_GAMMA={gamma:g} is unusual. Usual: 5, from 1 to 20; 0 is off."


def _step_timeout(request: Request) -> str | None:
    seconds = request.plan.engine.step_timeout_s
    if not seconds or seconds >= 30:
        return None
    return f"PARAMS_STEP_TIMEOUT={seconds:g} is in seconds: a slow step or save would end the job. Usual: 300 and more."


def _runtime(request: Request) -> str | None:
    hours = request.settings.finish.max_runtime
    if hours is None or hours >= 0.1:
        return None
    return f"MAX_RUNTIME={hours:g} is in hours: the job ends after {hours * 60:.2g} minutes. Usual: 1 and more."


# ---- settings without any effect


def _no_effect(variable: str, value: object, because: str) -> str:
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"{variable}={shown} has no effect: {because}."


def _d_coef_of_others(request: Request) -> str | None:
    name = request.plan.optim.name
    factor = request.settings.training.d_coef
    if factor is None or OPTIMIZERS[name].prodigy:
        return None
    return _no_effect("PARAMS_D_COEF", f"{factor:g}", f"PARAMS_OPTIMIZER_TYPE={name} has none, prodigy has")


def _cycles(request: Request) -> str | None:
    cycles = request.settings.training.num_cycles
    scheduler = request.plan.optim.scheduler
    if not cycles or scheduler == CYCLIC_SCHEDULE:
        return None
    because = f"PARAMS_LEARNING_SCHEDULER={scheduler} has no cycles, {CYCLIC_SCHEDULE} has"
    return _no_effect("PARAMS_NUM_CYCLES", cycles, because)


def _warmup_of_zero(request: Request) -> str | None:
    optim = request.plan.optim
    if optim.scheduler != "constant_with_warmup" or optim.warmup_steps:
        return None
    because = "PARAMS_WARMUP_STEPS is 0. Usual: a tenth of the steps"
    return _no_effect("PARAMS_LEARNING_SCHEDULER", optim.scheduler, because)


def _flow_shift(request: Request) -> str | None:
    training = request.settings.training
    sampling = request.plan.train.timestep_sampling
    if training.discrete_flow_shift is None or sampling == "shift" or request.facts.objective != "flow":
        return None
    because = f"PARAMS_TIMESTEP_SAMPLING={sampling} has no shift, shift has"
    return _no_effect("PARAMS_DISCRETE_FLOW_SHIFT", f"{training.discrete_flow_shift:g}", because)


def _guidance(request: Request) -> str | None:
    guidance = request.plan.train.guidance_scale
    if has_embedded_guidance(request.facts, request.model) or not request.is_given("PARAMS_GUIDANCE_SCALE"):
        return None
    return _no_effect("PARAMS_GUIDANCE_SCALE", f"{guidance:g}", f"{request.plan.model.base} has no embedded guidance")


def _split_qkv(request: Request) -> str | None:
    if not request.settings.adapter.split_qkv or request.facts.fused_targets:
        return None
    because = f"q, k and v of {request.plan.model.base} have an adapter each anyway"
    return _no_effect("PARAMS_SPLIT_QKV", True, because)


def _epochs_beside_steps(request: Request) -> str | None:
    if not request.is_given("PARAMS_MAX_EPOCHS") or not request.plan.train.max_steps:
        return None
    if request.plan.train.max_epochs == AUTO:
        return None
    because = f"PARAMS_MAX_STEPS={request.plan.train.max_steps} decides"
    return _no_effect("PARAMS_MAX_EPOCHS", request.plan.train.max_epochs, because)


def _checkpoints_without_saves(request: Request) -> str | None:
    kept = request.plan.output.keep_checkpoints
    if not request.is_given("KEEP_CHECKPOINTS") or kept == AUTO or request.plan.output.save_every != 0:
        return None
    because = "PARAMS_SAVE_EVERY_N_STEPS=0 saves only the finished LoRA"
    return _no_effect("KEEP_CHECKPOINTS", kept, because)


def _prompts_without_samples(request: Request) -> str | None:
    if not request.is_given("SAMPLE_PROMPTS") or request.plan.output.sample_every != 0:
        return None
    return "SAMPLE_PROMPTS has no effect: PARAMS_SAMPLE_EVERY_N_STEPS=0 draws no samples."


def _strengths_without_samples(request: Request) -> str | None:
    if not request.is_given("SAMPLE_STRENGTHS"):
        return None
    if request.plan.output.sample_every == 0:
        return "SAMPLE_STRENGTHS has no effect: PARAMS_SAMPLE_EVERY_N_STEPS=0 draws no samples."
    if not request.plan.output.sample_strengths:
        return "SAMPLE_STRENGTHS has no effect: samples are drawn with strength 1 anyway."
    return None


def _samples_without_prompts(request: Request) -> str | None:
    every = request.plan.output.sample_every
    if not request.is_given("PARAMS_SAMPLE_EVERY_N_STEPS") or every in (0, AUTO) or request.plan.prompts:
        return None
    return _no_effect("PARAMS_SAMPLE_EVERY_N_STEPS", every, "SAMPLE_PROMPTS has no prompts")


def _held_out_for_nothing(request: Request) -> str | None:
    shares = [dataset.validation_split for dataset in request.plan.data.datasets if dataset.validation_split]
    if not shares or request.plan.output.validate_every:
        return None
    return (
        f"validation_split={shares[0]:g} in dataset.json holds images out of training, but nothing is measured on "
        "them. Usual: PARAMS_VALIDATE_EVERY_N_STEPS=100, or no validation_split."
    )


def _webhook_secret(request: Request) -> str | None:
    finish = request.settings.finish
    if finish.webhook_secret is None or finish.webhook_url:
        return None
    return _no_effect("WEBHOOK_SECRET", "***", "WEBHOOK_URL is not set")


def _write_token(request: Request) -> str | None:
    if not request.is_given("HF_WRITE_TOKEN") or request.settings.finish.push_to_hub:
        return None
    return "HF_WRITE_TOKEN has no effect: PUSH_TO_HUB is not set."


def _memory_limit(request: Request) -> str | None:
    limit = request.settings.engine.memory_limit_gib
    if limit is None or request.plan.engine.device != "cpu":
        return None
    return _no_effect("MEMORY_LIMIT_GIB", f"{limit:g}", "it is for the memory of a GPU, and this job runs on the CPU")


def _paged(request: Request) -> str | None:
    if request.plan.engine.device != "cpu" or request.plan.optim.args.get("is_paged") is not True:
        return None
    return "PARAMS_OPTIMIZER_ARGS: is_paged=true has no effect: it is for the memory of a GPU."


ROWS: tuple[Callable[[Request], str | None], ...] = (
    _learning_rate,
    _text_encoder_rate,
    _d_coef,
    _weight_decay,
    _prodigy_warmup,
    _scale,
    _rank,
    _caption_dropout,
    _tag_dropout,
    _unfit_weights,
    _unfit_file,
    _resolution,
    _noise_offset,
    _ema_decay,
    _repeats,
    _epochs,
    _accumulation,
    _min_snr_gamma,
    _step_timeout,
    _runtime,
    _d_coef_of_others,
    _cycles,
    _warmup_of_zero,
    _flow_shift,
    _guidance,
    _split_qkv,
    _epochs_beside_steps,
    _checkpoints_without_saves,
    _prompts_without_samples,
    _strengths_without_samples,
    _samples_without_prompts,
    _held_out_for_nothing,
    _webhook_secret,
    _write_token,
    _memory_limit,
    _paged,
)


def warn(request: Request, notes: Notes) -> None:
    """Add a warning for each row that applies; those of the steps too, where PARAMS_MAX_STEPS sets their number."""
    for sentence in _sentences(request):
        notes.warn(sentence)


def _sentences(request: Request) -> Iterator[str]:
    for row in ROWS:
        sentence = row(request)
        if sentence:
            yield sentence
    steps = request.plan.train.max_steps
    if steps:
        yield from sanity.warnings(request.plan, sanity.Length(steps))
