"""Arguments, errors and output that `python -m trainer.export` and `python -m trainer.sample` have in common.

No torch at the top: `--help` and a wrong command line answer at once.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.lora_files import contents, other_kinds
from trainer.spec import library_noise
from trainer.spec.commands.ending import exit_code_of
from trainer.spec.errors import SettingsError, StorageError
from trainer.spec.family import family_names
from trainer.spec.log_lines import log_to
from trainer.spec.values import as_number, show
from trainer.storage import safetensors_header
from trainer.storage.read import special_kind

if TYPE_CHECKING:
    from trainer.lora_files.weights import LoraModules

log = logging.getLogger(__name__)
MAX_STRENGTH = 100.0  # of a LoRA; more is a slip


def run_command(command: Callable[[], None]) -> int:
    """Run a command with its log on stderr; returns the exit code."""
    log_to(logging.StreamHandler(), "%(message)s")
    with warnings.catch_warnings():
        library_noise.silence()
        return exit_code_of(command, log)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


# ---- LoRA files


def split_weights(texts: Sequence[str], option: str) -> list[tuple[Path, float]]:
    """Read each `FILE` or `FILE:STRENGTH`; the strength is 1 by default. Raises SettingsError for a wrong one."""
    return [_split_weight(text, option) for text in texts]


def _split_weight(text: str, option: str) -> tuple[Path, float]:
    name, colon, number = text.rpartition(":")
    # A colon may belong to a name, also to that of a drive.
    if not colon or Path(text).exists() or not (name.lower().endswith(".safetensors") or Path(name).exists()):
        return _checked_file(text, option), 1.0
    strength = as_number(number.strip())
    if strength is None or abs(strength) > MAX_STRENGTH:
        raise SettingsError(
            f"{option} {text}: the strength {show(number)} is not a number, -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}. "
            f"Fix: {option} {name}:0.8, or {option} {name}."
        )
    return _checked_file(name, option), strength


def _checked_file(name: str, option: str) -> Path:
    """The path of a LoRA file. Raises SettingsError where there is none."""
    path = Path(name)
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.safetensors"))
        found = f"it has {', '.join(inside[:3])}" if inside else "it has no .safetensors files"
        raise SettingsError(f"{option} {name} is a folder; {found}. Fix: name a file.")
    if not path.exists():
        raise SettingsError(f"{option} {name} is not there. Fix: name a LoRA file (.safetensors).")
    if not path.is_file():
        raise SettingsError(f"{option} {name} is not a file. Fix: name a LoRA file (.safetensors).")
    return path


def read_family(path: Path, family_name: str | None) -> tuple[str, dict[str, str]]:
    """The family of a LoRA file, and the metadata in its header. `family_name`: if it is known already.

    Raises SettingsError if the file cannot be read, or its keys belong to no family.
    """
    try:
        header = safetensors_header.read_header(path)
    except ValueError as problem:
        raise SettingsError(f"{path}: {problem}.") from problem
    shapes = {key: entry.shape for key, entry in header.entries.items()}
    name = family_name or contents.likely_family(shapes, header.metadata)
    if name is None:
        what = other_kinds.describe(shapes) or "no key names a layer of them"
        if model := other_kinds.other_model(shapes):
            what = f"it is one for {model}"
        raise SettingsError(f"{path} is no LoRA for {', '.join(family_names())}: {what}.")
    return name, header.metadata


def load_lora(
    path: Path, family_name: str, *, without_embeddings: bool = False, with_untrained: bool = False
) -> LoraModules:
    """All modules of a LoRA file, see `convert.load`. Raises SettingsError if it is none for this family."""
    from trainer.lora_files import convert

    try:
        return convert.load(path, family_name, without_embeddings=without_embeddings, with_untrained=with_untrained)
    except ValueError as problem:
        raise SettingsError(f"{path} cannot be read as a LoRA for {family_name}: {problem}.") from problem


# ---- output


def check_folder(folder: Path, option: str) -> None:
    """Make the folder and see that it can be written. Raises SettingsError for a file, StorageError for the rest."""
    if os.path.exists(folder) and not os.path.isdir(folder):  # noqa: PTH110, PTH112 (these never raise)
        raise SettingsError(f"{option} {folder} is {_kind(folder)}. Fix: name a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".kiln-", dir=folder):  # a name that nobody has, and gone at once
            pass
    except OSError as problem:
        raise StorageError(f"{option} {folder} cannot be written: {problem.strerror or problem}.") from problem


def check_file(path: Path, option: str, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """See that the file can be written. `inputs`: files that are read, which it must not replace.

    Raises SettingsError for a wrong name and for what is there already, StorageError for the rest.
    """
    if os.path.isdir(path):  # noqa: PTH112 (never raises)
        raise SettingsError(f"{option} {path} is a folder. Fix: name a file, such as {path / 'lora.safetensors'}.")
    if path.suffix.lower() != ".safetensors":
        raise SettingsError(f"{option} {path}: tools find LoRA files by their ending. Fix: {path}.safetensors.")
    if os.path.lexists(path):
        _check_replaceable(path, option, overwrite=overwrite, inputs=inputs)
    check_folder(path.parent, option)


def _check_replaceable(path: Path, option: str, *, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Only a file may be replaced, no link, which may lead to a device or to a file of somebody else."""
    kind = _kind(path, follow=False)
    if kind != "a file":
        raise SettingsError(f"{option} {path} is {kind}, and only files are replaced. Fix: name another file.")
    if any(path.samefile(source) for source in inputs):
        raise SettingsError(f"{option} {path} is the file that is read. Fix: name another file.")
    if not overwrite:
        raise SettingsError(f"{option} {path} exists. Fix: name another file, or add --overwrite.")


def _kind(path: Path, *, follow: bool = True) -> str:
    """What lies at a path: "a file", "a link", "a device" and so on."""
    mode = path.stat(follow_symlinks=follow).st_mode
    if stat.S_ISLNK(mode):
        return "a link"
    return special_kind(mode) or "a file"
