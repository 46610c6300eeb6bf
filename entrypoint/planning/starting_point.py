"""Where training starts: a LoRA file, whose header decides the plan, or the state of a run that was interrupted.

Headers are read here and weights are not: rank, targets and the model's family all show in names and shapes, so that a
file that does not fit is refused before the base model is downloaded.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from entrypoint.settings.checks import Notes, is_file, is_folder
from entrypoint.settings.variables.adapter import AdapterSettings
from trainer.lora_files import blocks, inspect, key_names
from trainer.lora_files.inspect import LoraSummary, Training
from trainer.spec.family import Facts, get_family
from trainer.spec.plan import LoraPlan, ModelPlan, Plan
from trainer.spec.rules.resume_rules import check_named_state
from trainer.spec.targets import NUMBER, is_target, layer_names
from trainer.spec.values import show
from trainer.storage import run_records, safetensors_header

ALLOWED = "Allowed: a LoRA file (.safetensors), or a state folder (OUTPUT_PATH/state/step-…)."
ANOTHER_BASE = "It is for another base. Fix: name a LoRA for this one, or set BASE_MODEL or MODEL_PATH to its base."
SHOWN_MODULES = 3  # names in a message
MOST_BLOCKS = 200  # more than any model has


@dataclass(frozen=True)
class AdapterShape:
    """What the adapters of a job have in common with the LoRA file that it starts from."""

    rank: int
    split_qkv: bool  # q, k and v have an adapter each
    targets: tuple[str, ...]  # ends of the names of modules


def path_problem(start: str) -> str | None:
    """Why training cannot start from PARAMS_RESUME_FROM=`start`, as far as its name shows."""
    where = f"PARAMS_RESUME_FROM={show(start)}"
    if is_folder(start):
        if is_file(f"{start}/state.json"):
            return None
        states = sorted([*Path(start).glob("step-*/state.json"), *Path(start).glob("state/step-*/state.json")])
        fix = f"Fix: name the state to resume from: {states[-1].parent}." if states else ALLOWED
        return f"{where} is a folder without a state.json. {fix}"
    if not is_file(start):
        return f"{where} is not there. {ALLOWED}"
    if not start.lower().endswith(".safetensors"):
        return f"{where} is not a .safetensors file. {ALLOWED}"
    return None


# ---- a state


def check_state(plan: Plan) -> None:
    """Raises SettingsError where the trainer would refuse the state that PARAMS_RESUME_FROM names, before the base
    model is downloaded.

    A state of the run itself comes first: it is the newer one of a job that was once started from that state.
    """
    resume_from = plan.lora.resume_from
    home = Path(plan.output.path) / plan.output.folder
    if not resume_from or not is_folder(resume_from) or run_records.state_steps(home):
        return
    state = run_records.read_state_header(Path(resume_from))
    if state is not None:
        check_named_state(plan, state.tree["essence"], step=state.step)


# ---- a LoRA file


def adapter_shape(
    settings: AdapterSettings,
    file: str | None,
    facts: Facts,
    *,
    model: ModelPlan,
    trained_encoders: Collection[str],
    notes: Notes,
) -> AdapterShape:
    """The values that the user has set; for the rest those of `file`, if the job starts from one, or the defaults.

    `trained_encoders`: the text encoders that the job trains, by diffusers' names.
    """
    rank = settings.network_dim
    split_qkv = settings.split_qkv
    targets = settings.target_modules
    without_file = AdapterShape(rank or LoraPlan.rank, bool(split_qkv), targets or facts.targets)
    if file is None:
        return without_file
    where = f"PARAMS_RESUME_FROM={file}"
    try:
        header = safetensors_header.read_header(Path(file))
        lora = inspect.summarize(header, facts.name)
    except ValueError as problem:
        allowed = "" if "Fix:" in str(problem) else f" {ALLOWED}"
        notes.add(f"{where}: {problem}.{allowed}")
        return without_file
    others = blocks.models_with_these_blocks(header, facts, width=_width(lora))
    refusal = (
        _wrong_shape(lora, facts, model)
        or _wrong_blocks(lora, facts, model, others)
        or _wrong_type(lora, settings.lora_type)
        or _untrained_modules(lora, facts, targets, trained_encoders)
    )
    if refusal:
        notes.add(f"{where}: {refusal}")
        return without_file
    notes.chose("PARAMS_RESUME_FROM", file, str(lora))
    if another := _maybe_of_another_model(lora, facts, model, others):
        notes.warn(f"{where}: {another}")
    trained = _own_training(lora, facts)
    if targets is None:
        targets = _targets_to_go_on_with(lora, trained, facts, model, notes)
    # If q, k and v had an adapter each in the file, one adapter for all three must hold the terms of all: its rank is
    # the larger one. If they shared one, both ranks are the same.
    fused = [parts for parts in facts.fused_targets.values() if _is_fused(parts, lora, targets)]
    rank_together = lora.rank(fused)
    rank_apart = lora.rank(())
    if trained is not None and (trained.split_qkv or not fused):
        rank_apart = trained.rank
    elif trained is not None:
        rank_apart = rank_together = trained.rank
    if split_qkv is None:
        split_qkv = rank_together > rank_apart
        if trained is not None:
            split_qkv = trained.split_qkv
        if split_qkv:
            notes.chose("PARAMS_SPLIT_QKV", True, "q, k and v have an adapter each in the LoRA file")
    file_rank = rank_apart if split_qkv or not fused else rank_together
    if rank is None:
        notes.chose("PARAMS_NETWORK_DIM", file_rank, "the rank of the LoRA file")
    elif rank != file_rank:
        notes.add(f"PARAMS_NETWORK_DIM={rank}: {file} has rank {file_rank}. Fix: PARAMS_NETWORK_DIM={file_rank}.")
    return AdapterShape(file_rank, split_qkv, targets)


def _targets_to_go_on_with(
    lora: LoraSummary, trained: Training | None, facts: Facts, model: ModelPlan, notes: Notes
) -> tuple[str, ...]:
    """The targets of a job that names none: the layers of the file, in as few names as mean exactly these."""
    targets = trained.targets if trained else _targets_of(lora, facts)
    left_out = None if trained else _blocks_left_out(lora, facts, targets, model)
    if left_out:
        in_all_blocks = ",".join(targets)
        targets = tuple(name.partition(".")[2] for name in lora.modules if _is_covered(name, targets))
        reason = f"what the LoRA file has, without {left_out}; {in_all_blocks} would train all blocks"
        notes.chose("PARAMS_TARGET_MODULES", _shortened(targets), reason)
    elif targets != facts.targets:
        notes.chose("PARAMS_TARGET_MODULES", ",".join(targets), "what the LoRA file has")
    return targets


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_MODULES} more" if len(names) > SHOWN_MODULES else ""
    return ", ".join(names[:SHOWN_MODULES]) + more


def _blocks_left_out(lora: LoraSummary, facts: Facts, targets: Sequence[str], model: ModelPlan) -> str | None:
    """The first layer that `targets` mean and the file has no adapter for; None if it covers every block.

    By the layers of the base model, if it is a folder here; else by the numbers of the blocks in the file, and by the
    last blocks that a published model is known to have.
    """
    in_file = {name.partition(".")[2] for name in lora.modules}
    layers = [name for name in _weights_of(model, facts) if _is_covered(name, tuple(targets))]
    for layer in sorted(layers, key=_by_number):
        if layer not in in_file:
            return layer
    if layers:
        return None
    known = blocks.last_blocks(facts.models[model.base], facts.name)
    of_file = blocks.last_blocks_of_layers(lora.modules, facts.name) or {}
    for template in layer_names(facts.name):
        example = template.replace(NUMBER, "0")
        if not is_target(example, targets):
            continue
        numbers = [n for n in range(MOST_BLOCKS) if template.replace(NUMBER, str(n)) in in_file]
        if NUMBER not in template:
            numbers = [0] if template in in_file else []
        last = max(numbers, default=0)
        if not is_target(template, get_family(facts.name).LORA_KEYS.not_in_every_block):
            list_name = blocks.list_of(template)
            last = known.get(list_name, of_file.get(list_name, 0))
        for number in range(last + 1):
            if number not in numbers:
                return template.replace(NUMBER, str(number))
    return None


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _is_fused(parts: Sequence[str], lora: LoraSummary, targets: Sequence[str]) -> bool:
    """Whether some block of this job has one adapter for all of `parts`: all of them are targets there."""
    for module in lora.modules or lora.unclear:
        if module.endswith(f".{parts[0]}"):
            block = module.removesuffix(parts[0])
            if all(is_target(f"{block}{part}", targets) for part in parts):
                return True
    return False


def _own_training(lora: LoraSummary, facts: Facts) -> Training | None:
    """What a file of ours says about its adapters; None where its tensors say otherwise.

    The tensors cannot tell all: of a layer that files keep as one, a part whose rows are zero may have had an adapter.
    Other tools that change a file keep such lines of its header.
    """
    trained = lora.training
    if trained is None or not trained.targets:
        return None
    prefix = f"{facts.lora_prefix}."
    names = [name for name in lora.modules if name.startswith(prefix)]
    if not all(_is_covered(name, trained.targets) for name in names):
        return None
    covered = [name for name in lora.unclear if name.startswith(prefix) and _is_covered(name, trained.targets)]
    fused = [parts for parts in facts.fused_targets.values() if _is_fused(parts, lora, trained.targets)]
    needed = lora.rank(() if trained.split_qkv else fused)
    if names and needed != trained.rank:
        return None
    return trained if names or covered else None


def _wrong_shape(lora: LoraSummary, facts: Facts, model: ModelPlan) -> str | None:
    """Why the matrices do not fit the layers of the base model, as far as its sizes are known before the download."""
    weights = _weights_of(model, facts)
    width = None
    base = facts.models[model.base]
    if get_family(facts.name).LORA_KEYS.one_width and base.footprint is not None:
        width = base.footprint.hidden_size
    for module, sides in lora.sides.items():
        component, _, path = module.partition(".")
        if component != facts.lora_prefix:
            continue
        in_model = weights.get(path)
        if in_model and _without_kernel(in_model) != _without_kernel(sides):
            return f"{module} is {list(in_model)} in the base model and {list(sides)} in the file. {ANOTHER_BASE}"
        if weights and in_model is None and _is_in_block(module):
            return f"the base model has no layer {module}. {ANOTHER_BASE}"
        if not weights and width and _is_in_block(module) and min(sides) != width:
            return f"{module} is {list(sides)} in the file, and layers of {model.base} are {width} wide. {ANOTHER_BASE}"
    return None


def _width(lora: LoraSummary) -> int:
    """The shorter side of most layers in blocks."""
    shorter = [min(sides) for module, sides in lora.sides.items() if _is_in_block(module)]
    return max(set(shorter), key=shorter.count, default=0)


def _wrong_blocks(lora: LoraSummary, facts: Facts, model: ModelPlan, others: Sequence[str]) -> str | None:
    """Why its blocks are not those of the base model, as far as these are known before the download.

    `others`: the models that end with the file's blocks.
    """
    if _weights_of(model, facts):
        return None  # by its layers: `_wrong_shape`
    known = blocks.last_blocks(facts.models[model.base], facts.name)
    of_file = blocks.last_blocks_of_layers(lora.sides, facts.name) or {}
    for list_name, last in of_file.items():
        if last > known.get(list_name, last):
            whose = f" {_ends_like(others)}" if others else ""
            return (
                f"it has {list_name}.{last}, and the last of {model.base} is {list_name}.{known[list_name]}.{whose} "
                f"{ANOTHER_BASE}"
            )
    return None


def _maybe_of_another_model(lora: LoraSummary, facts: Facts, model: ModelPlan, others: Sequence[str]) -> str | None:
    """What speaks for another base model in a file that fits; None where its header or its last blocks are ours."""
    if not others or lora.training is not None:
        return None
    known = blocks.last_blocks(facts.models[model.base], facts.name)
    of_file = blocks.last_blocks_of_layers(lora.sides, facts.name) or {}
    if all(known.get(list_name) == last for list_name, last in of_file.items()):
        return None
    return (
        f"{_ends_like(others)} Layers of {model.base} have the same names and sides, so that nothing else tells them "
        f"apart. If it is a LoRA for {others[0]}, set BASE_MODEL={others[0]}."
    )


def _ends_like(others: Sequence[str]) -> str:
    return f"Its last block is that of {' and of '.join(others)}."


def _without_kernel(sides: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer may be stored as a convolution of 1 x 1, and the reverse."""
    return sides[:2] if all(side == 1 for side in sides[2:]) else sides


def _weights_of(model: ModelPlan, facts: Facts) -> dict[str, tuple[int, ...]]:
    """The shapes of the denoiser's weights by their layers, if the base model is a folder here; else empty."""
    folder = Path(model.source) / facts.parts["denoiser"]
    if "denoiser" in model.parts or not Path(model.source).is_absolute() or not is_folder(str(folder)):
        return {}
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            header = safetensors_header.read_header(file)
        except ValueError:
            return {}  # whoever loads the model reports it
        for name, entry in header.entries.items():
            shapes[name.removesuffix(".weight")] = entry.shape
    return shapes


def _wrong_type(lora: LoraSummary, lora_type: str) -> str | None:
    """Why a LoRA cannot continue as a DoRA, or the reverse: a DoRA has a magnitude for each row, a LoRA none."""
    if lora.dora == (lora_type == "dora"):
        return None
    if lora.dora:
        return "it is a DoRA, and this job trains a LoRA. Fix: PARAMS_LORA_TYPE=dora."
    return "it is not a DoRA, and PARAMS_LORA_TYPE=dora needs one. Fix: PARAMS_LORA_TYPE=lora, or name a DoRA."


def _untrained_modules(
    lora: LoraSummary, facts: Facts, targets: tuple[str, ...] | None, trained_encoders: Collection[str]
) -> str | None:
    """Which of the file's modules this job would drop, since it has no adapter for them."""
    trained_components = (facts.lora_prefix, *trained_encoders)
    of_encoders = [module for module in lora.modules if module.partition(".")[0] not in trained_components]
    if of_encoders:
        return (
            f"{len(of_encoders)} of its modules belong to text encoders, which this job does not train: "
            f"{of_encoders[0]} first. "
            f"Fix: train them too (PARAMS_TEXT_ENCODER_LR), or make a file without them (python -m trainer.export "
            f"FILE --without-text-encoders ...)."
        )
    without_adapter = []
    for module in lora.modules:
        if not module.startswith(f"{facts.lora_prefix}.") or _is_covered(module, targets or facts.targets):
            continue
        # Where the user has set no targets, those of the file are added, if they are in a block.
        if targets or _target_of(module, facts) is None:
            without_adapter.append(module)
    if without_adapter:
        fix = f"PARAMS_TARGET_MODULES={','.join(_targets_of(lora, facts))}" if targets else "name another file"
        names = ", ".join(without_adapter[:SHOWN_MODULES])
        return f"{len(without_adapter)} of its modules get no adapter in this job: {names} first. Fix: {fix}."
    return None


def _is_covered(module: str, targets: tuple[str, ...]) -> bool:
    """Whether one of the targets covers it. A module outside the numbered blocks gets no adapter, whatever its name."""
    return _is_in_block(module) and is_target(module, targets)


def _is_in_block(module: str) -> bool:
    return any(part.isdigit() for part in module.split("."))


def _target_of(module: str, facts: Facts) -> str | None:
    """The end of a module's name inside its block, as PARAMS_TARGET_MODULES has it; None if it is in no block."""
    layer = key_names.find_layer(module, facts.name)
    if layer is None or layer.original is None or not layer.number:
        return None
    return layer.original.diffusers_names[layer.part or 0].rpartition("{}.")[2]


def _targets_of(lora: LoraSummary, facts: Facts) -> tuple[str, ...]:
    """The targets that cover a file's modules: the family's first, in their order, then those that it has besides."""
    targets = []
    for target in facts.targets:
        if any(_is_covered(module, (target,)) for module in lora.modules or lora.unclear):
            targets.append(target)
    others: dict[str, None] = {}  # an ordered set
    for module in lora.modules:
        if not _is_covered(module, facts.targets):
            target_of_module = _target_of(module, facts)
            if target_of_module:
                others[target_of_module] = None
    return (*targets, *others)
