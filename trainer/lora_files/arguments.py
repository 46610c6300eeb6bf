"""`python -m trainer.export` and `python -m trainer.sample`: convert and merge LoRA files, draw pictures with them."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

from trainer.lora_files import convert, inspect, key_names
from trainer.lora_files.weights import LoraModules
from trainer.spec.errors import KilnError, SettingsError
from trainer.spec.family import family_names
from trainer.storage import safetensors_header

log = logging.getLogger(__name__)


def run_command(work: Callable[[], None]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        work()
    except KilnError as problem:
        log.error("%s", problem)
        return problem.exit_code
    return 0


# ---- files


def split_weight(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:WEIGHT`."""
    found = re.fullmatch(r"(.+?)(?::([+-]?[0-9]*\.?[0-9]+))?", text)
    assert found is not None
    return Path(found[1]), float(found[2] or 1)


def read_family(path: Path, asked: str | None) -> tuple[str, dict[str, str]]:
    """A file's family and its header."""
    try:
        header = safetensors_header.read_header(path)
    except ValueError as problem:
        raise SettingsError(f"{path}: {problem}.") from problem
    stems = [found[0] for key in header.entries if (found := key_names.split_key(key))]
    name = asked or inspect.likely_family(stems, header.metadata)
    if name is None:
        raise SettingsError(f"{path} has no keys of a LoRA for {', '.join(family_names())}.")
    return name, header.metadata


def load_lora(path: Path, family_name: str) -> LoraModules:
    try:
        return convert.load(path, family_name)
    except ValueError as problem:
        raise SettingsError(f"{path}, as a LoRA for {family_name}: {problem}.") from problem
