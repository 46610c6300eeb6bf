"""Convert a LoRA file to another tool's keys, or merge several.

python -m trainer.export IN.safetensors --to kohya|peft|comfyui --out OUT.safetensors [--precision fp16|bf16|fp32]
python -m trainer.export --merge a.safetensors:0.6 b.safetensors:0.4 --out OUT.safetensors
"""

from __future__ import annotations

from trainer.process import guard

if __name__ == "__main__":
    guard.begin()  # before everything else is imported: from here on a stop is a stop

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.lora_files import inspect
from trainer.lora_files.arguments import check_file, load_lora, plural, read_family, run_command, split_weights
from trainer.process import streams
from trainer.spec.commands.parser import Parser
from trainer.spec.errors import SettingsError
from trainer.spec.family import family_names, get_family
from trainer.spec.weight_formats import SAVE_PRECISIONS
from trainer.storage import safetensors_header

if TYPE_CHECKING:
    from trainer.lora_files.weights import LoraModules

log = logging.getLogger(__name__)
WITH_UNTRAINED = (
    "comfyui",
    "kohya",
    "native",
)  # formats that keep layers as one: a DoRA has magnitudes for all of its rows
KEY_FORMATS = ("comfyui", "kohya", "native", "peft")  # those of convert.KEY_FORMATS, which needs torch
# Metadata that describe only the file that was read: PEFT's settings and the hashes.
DROPPED_METADATA = ("lora_adapter_metadata", "sshs_", "modelspec.hash", "kiln_balance")


def export_command(arguments: list[str]) -> int:
    """`python -m trainer.export`; returns the exit code."""
    parser = Parser("python -m trainer.export", description="Convert a LoRA file, or merge several.")
    parser.add_argument("file", nargs="?", metavar="IN.safetensors")
    parser.add_argument("--merge", nargs="+", metavar="FILE[:STRENGTH]", help="merge these instead")
    parser.add_argument("--to", choices=KEY_FORMATS, default="kohya", help="the keys to write (default: kohya)")
    parser.add_argument(
        "--precision", choices=tuple(SAVE_PRECISIONS), help="of the matrices to write (default: as in the files read)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.safetensors if it exists")
    parser.add_argument("--family", choices=family_names(), help="if the keys are ambiguous")
    parser.add_argument("--without-text-encoders", action="store_true", help="drop the modules of the text encoders")
    parser.add_argument(
        "--without-embeddings", action="store_true", help="drop the embeddings that OneTrainer puts into a file"
    )
    options = parser.parse_args(arguments)
    if (options.file is None) == (options.merge is None):
        parser.error("give one file to convert, or several after --merge")
    return run_command(lambda: _export(options))


def _export(options: argparse.Namespace) -> None:
    paths = split_weights(options.merge, "--merge") if options.merge else [(_input(options.file), 1.0)]
    check_file(options.out, "--out", overwrite=options.overwrite, inputs=[path for path, _ in paths])
    families_and_metadata = [read_family(path, options.family) for path, _ in paths]
    families = [name for name, _ in families_and_metadata]
    if len(set(families)) > 1:
        listed = ", ".join(f"{path} is for {name}" for (path, _), name in zip(paths, families, strict=True))
        raise SettingsError(f"Only LoRAs of one family can be merged: {listed}.")
    family_name = families[0]
    facts = get_family(family_name).FACTS

    from trainer.lora_files import convert, write  # late: torch

    loras = []
    for path, strength in paths:
        modules = load_lora(
            path,
            family_name,
            without_embeddings=options.without_embeddings,
            with_untrained=options.to in WITH_UNTRAINED,
        )
        loras.append((modules, strength))
        if not strength:
            log.info("%s has strength 0 and adds nothing.", path)
    try:
        modules = convert.merge(loras) if options.merge else loras[0][0]
    except ValueError as problem:
        raise SettingsError(f"--merge: {problem}.") from problem
    if options.without_text_encoders:
        modules = _without_text_encoders(modules, facts.lora_prefix)
    save_precision = options.precision or max(
        (inspect.save_precision(safetensors_header.read_header(path)) for path, _ in paths),
        key=lambda name: SAVE_PRECISIONS[name].significand,
    )
    if not modules:
        raise SettingsError("There is nothing to write: every module was dropped or has strength 0.")
    try:
        file = convert.to_file(modules, options.to, family_name, save_precision)
    except ValueError as problem:
        raise SettingsError(f"--to {options.to}: {problem}.") from problem
    metadata: dict[str, str] = {}
    if options.merge:
        metadata["kiln_merged_from"] = json.dumps(_strengths(paths))
    else:
        old_metadata = families_and_metadata[0][1]
        metadata = {key: value for key, value in old_metadata.items() if not key.startswith(DROPPED_METADATA)}
    metadata |= {"ss_network_dim": str(file.rank), "ss_network_alpha": f"{file.alpha:g}", **file.header}
    metadata.setdefault("modelspec.architecture", f"{facts.architecture}/lora")
    write.write_lora(options.out, file.tensors, metadata)
    count = plural(sum(1 for weights in modules.values() if weights.rank), "module")
    log.info(
        "%s: %s for %s, rank %d, alpha %g, %s.",
        options.out, count, family_name, file.rank, file.alpha, save_precision,
    )  # fmt: skip


def _input(name: str) -> Path:
    """The file to convert. A strength belongs to --merge."""
    path, strength = split_weights([name], "IN.safetensors")[0]
    if strength != 1:
        raise SettingsError(f"{name}: a file to convert takes no strength. Fix: --merge {name}.")
    return path


def _without_text_encoders(modules: LoraModules, prefix: str) -> LoraModules:
    kept = {name: weights for name, weights in modules.items() if name.startswith(f"{prefix}.")}
    log.info("Dropped %s of text encoders.", plural(len(modules) - len(kept), "module"))
    return kept


def _strengths(paths: Sequence[tuple[Path, float]]) -> dict[str, float]:
    """The names of the files → their strengths, added up where a name comes twice."""
    strengths: dict[str, float] = {}
    for path, strength in paths:
        strengths[path.name] = strengths.get(path.name, 0.0) + strength
    return strengths


if __name__ == "__main__":
    streams.protect()
    sys.exit(export_command(sys.argv[1:]))
