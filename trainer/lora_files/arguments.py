"""Arguments and errors that `python -m trainer.export` and `python -m trainer.sample` have in common."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

from trainer.lora_files import contents, convert
from trainer.lora_files.weights import LoraModules
from trainer.spec.errors import KilnError, SettingsError
from trainer.spec.family import family_names
from trainer.storage import safetensors_header

log = logging.getLogger(__name__)


def run_command(command: Callable[[], None]) -> int:
    """Run a command with its log on stderr; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        command()
    except KilnError as problem:
        log.error("%s", problem)
        return problem.exit_code
    return 0


def split_weight(text: str) -> tuple[Path, float]:
    """Read `FILE` or `FILE:WEIGHT`; the weight is 1 by default."""
    match = re.fullmatch(r"(.+?)(?::([+-]?[0-9]*\.?[0-9]+))?", text)
    assert match is not None
    return Path(match[1]), float(match[2] or 1)


def read_family(path: Path, family_name: str | None) -> tuple[str, dict[str, str]]:
    """The family of a LoRA file, and the metadata in its header. `family_name`: if it is known already.

    Raises SettingsError if the file cannot be read, or its keys belong to no family.
    """
    try:
        header = safetensors_header.read_header(path)
    except ValueError as problem:
        raise SettingsError(f"{path}: {problem}.") from problem
    name = family_name or contents.likely_family(header.entries, header.metadata)
    if name is None:
        raise SettingsError(f"{path} is no LoRA for {', '.join(family_names())}: no key names a layer of them.")
    return name, header.metadata


def load_lora(path: Path, family_name: str) -> LoraModules:
    """All modules of a LoRA file. Raises SettingsError if it is none for this family."""
    try:
        return convert.load(path, family_name)
    except ValueError as problem:
        raise SettingsError(f"{path} cannot be read as a LoRA for {family_name}: {problem}.") from problem
