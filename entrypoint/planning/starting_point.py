"""What a run begins with: a LoRA file, by whose header the plan goes, or the state of a run that was interrupted."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from entrypoint.settings.checks import Notes, is_file, is_folder, show
from trainer.lora_files import inspect, key_names
from trainer.lora_files.inspect import LoraSummary
from trainer.spec.family import Facts
from trainer.spec.plan import Plan
from trainer.spec.resume_rules import resumes_state
from trainer.storage import safetensors_header
from trainer.storage.safetensors_header import Header

Adapter = tuple[int, bool, tuple[str, ...]]  # rank, whether q, k and v have an adapter each, targets
RANK = 32  # where neither the user nor a file says one
ALLOWED = "Allowed: a LoRA file (.safetensors), or a state folder (OUTPUT_PATH/state/step-…)."


def unusable(start: str) -> str | None:
    """Why nothing can begin with what PARAMS_RESUME_FROM names, as far as its name says."""
    where = f"PARAMS_RESUME_FROM={show(start)}"
    if is_folder(start):
        if is_file(f"{start}/state.json"):
            return None
        states = sorted([*Path(start).glob("step-*/state.json"), *Path(start).glob("state/step-*/state.json")])
        fix = f"Fix: name the one to go on from: {states[-1].parent}." if states else ALLOWED
        return f"{where} is a folder without the state.json of a state. {fix}"
    if not is_file(start):
        return f"{where} is not there. {ALLOWED}"
    return None if start.lower().endswith(".safetensors") else f"{where} is not a .safetensors file. {ALLOWED}"


def check_state(plan: Plan) -> None:
    """Raises SettingsError where the trainer would refuse to go on from the state that is there, but at once."""
    asked = plan.lora.resume_from
    own = max(Path(plan.output.path).glob("state/step-????????"), default=None)
    folder = own or (Path(asked) if asked and is_folder(asked) else None)
    begun = _begun(folder) if folder else None
    if begun is not None:
        resumes_state(plan, begun[1], step=begun[0], own=own is not None)


def _begun(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The step and the essence in a state; None if it is damaged, which the trainer sees to."""
    try:
        record = json.loads(json.loads((folder / "state.json").read_text(encoding="utf-8"))["text"])
        return int(record["step"]), _plain(dict(record["tree"]["dict"])["essence"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _plain(value: Any) -> Any:
    """A value without tensors as it was before `trainer.checkpoints.state_files` wrote it."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value["dict"]}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def adapter(
    path: str | None,
    facts: Facts,
    *,
    rank: int | None,
    split_qkv: bool | None,
    targets: tuple[str, ...] | None,
    encoders: Collection[str],
    dora: bool,
    notes: Notes,
) -> Adapter:
    """What is asked for, and for the rest what the file `path` has, if there is one, or the defaults.

    `encoders`: the text encoders that train. `dora`: whether the job trains DoRA.
    """
    plain: Adapter = (rank or RANK, bool(split_qkv), targets or facts.targets)
    if path is None:
        return plain
    where = f"PARAMS_RESUME_FROM={path}"
    try:
        header = safetensors_header.read_header(Path(path))
        found = inspect.summarize(header, facts.name)
    except ValueError as problem:
        notes.add(f"{where}: {problem}. {ALLOWED}")
        return plain
    refused = _foreign(header, found, facts) or _other_kind(found, dora) or _untrained(found, facts, targets, encoders)
    if refused:
        notes.add(f"{where}: {refused}")
        return plain
    notes.chose("PARAMS_RESUME_FROM", path, str(found))
    if targets is None:
        targets = _targets(found, facts)
        if targets != facts.targets:
            notes.chose("PARAMS_TARGET_MODULES", ",".join(targets), "what the LoRA file has")
    joined = [parts for parts in facts.fused_targets.values() if all(p in targets for p in parts)]
    together, apart = found.rank(joined), found.rank(())
    if split_qkv is None:
        split_qkv = together > apart
        if split_qkv:
            notes.chose("PARAMS_SPLIT_QKV", True, "q, k and v have an adapter each in the LoRA file")
    file_rank = apart if split_qkv else together
    if rank not in (None, file_rank):
        notes.add(f"PARAMS_NETWORK_DIM={rank}: {path} has rank {file_rank}. Fix: PARAMS_NETWORK_DIM={file_rank}.")
    elif rank is None:
        notes.chose("PARAMS_NETWORK_DIM", file_rank, "the rank of the LoRA file")
    return file_rank, split_qkv, targets


def _foreign(header: Header, found: LoraSummary, facts: Facts) -> str | None:
    """Why a file is not of this family, or not of a kind that is read."""
    stems = [r[0] for key in header.entries if (r := key_names.split_key(key))]
    likely = inspect.likely_family(stems, header.metadata)
    said = inspect.declared_family(header.metadata)
    if likely not in (None, facts.name) and (found.unmatched or said == likely):
        return (
            f"it looks like a LoRA for {likely}, and this job is for {facts.name}. Fix: name a file for {facts.name}."
        )
    if found.unmatched or not found.modules:
        some = ", ".join(found.unmatched[:5]) or "the file is empty"
        return (
            f"{len(found.unmatched)} of its {len(header.entries)} tensors are nothing that a LoRA for {facts.name} "
            f"has: {some}."
        )
    return None


def _other_kind(found: LoraSummary, dora: bool) -> str | None:
    """Why a LoRA cannot go on as a DoRA, or the reverse: the one has lengths of rows that the other lacks."""
    if found.dora == dora:
        return None
    if found.dora:
        return "it is a DoRA, and this job trains none. Fix: PARAMS_LORA_TYPE=dora."
    return "it is no DoRA, and PARAMS_LORA_TYPE=dora cannot begin with it. Fix: PARAMS_LORA_TYPE=lora, or name a DoRA."


def _untrained(
    found: LoraSummary, facts: Facts, targets: tuple[str, ...] | None, encoders: Collection[str]
) -> str | None:
    """Why some of the file's modules would be left out."""
    own = [m for m in found.modules if m.startswith(f"{facts.lora_prefix}.")]
    others = [m for m in found.modules if m.partition(".")[0] not in (facts.lora_prefix, *encoders)]
    if others:
        return (
            f"{len(others)} of its modules belong to text encoders, which this job does not train: {others[0]} first. "
            f"Fix: train them as well (PARAMS_TEXT_ENCODER_LR), or make a file without them (python -m trainer.export "
            f"FILE --without-text-encoders ...)."
        )
    ends = targets or facts.targets
    left = [m for m in own if not _is_covered(m, ends) and (targets or _end(m, facts) is None)]
    if left:
        fix = f"PARAMS_TARGET_MODULES={','.join(_targets(found, facts))}" if targets else "name another file"
        return f"{len(left)} of its modules get no adapter in this job: {', '.join(left[:3])} first. Fix: {fix}."
    return None


def _is_covered(module: str, targets: tuple[str, ...]) -> bool:
    """Whether one of the targets means it; what is in no numbered block gets no adapter, whatever its name."""
    in_block = any(part.isdigit() for part in module.split("."))
    return in_block and any(module.endswith(f".{target}") for target in targets)


def _end(module: str, facts: Facts) -> str | None:
    """The end of a module's name inside its block; None if it is in no block."""
    there = key_names.find_layer(module, facts.name)
    if there is None or there.original is None or not there.number:
        return None
    return there.original.diffusers_names[there.part or 0].rpartition("{}.")[2]


def _targets(found: LoraSummary, facts: Facts) -> tuple[str, ...]:
    """The family's targets that the file has, and the ends of its other modules."""
    usual = [target for target in facts.targets if any(_is_covered(m, (target,)) for m in found.modules)]
    others = (_end(m, facts) for m in found.modules if not _is_covered(m, facts.targets))
    return (*usual, *dict.fromkeys(end for end in others if end))
