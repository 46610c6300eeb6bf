"""Convert a LoRA file to another tool's keys, or merge several.

python -m trainer.export IN.safetensors --to kohya|peft|comfyui --out OUT.safetensors
python -m trainer.export --merge a.safetensors:0.6 b.safetensors:0.4 --out OUT.safetensors
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from trainer.lora_files import convert, write
from trainer.lora_files.arguments import load_lora, read_family, run_command, split_weight
from trainer.spec.errors import SettingsError
from trainer.spec.family import family_names, get_family

log = logging.getLogger(__name__)
# Metadata that describe only the file that was read: PEFT's settings and the hashes.
DROPPED_METADATA = ("lora_adapter_metadata", "sshs_", "modelspec.hash")


def export_command(arguments: list[str]) -> int:
    """`python -m trainer.export`; returns the exit code."""
    parser = argparse.ArgumentParser("python -m trainer.export", description="Convert a LoRA file, or merge several.")
    parser.add_argument("file", nargs="?", type=Path, metavar="IN.safetensors")
    parser.add_argument("--merge", nargs="+", metavar="FILE[:WEIGHT]", help="merge these instead")
    parser.add_argument(
        "--to", choices=sorted(convert.KEY_FORMATS), default="kohya", help="the keys to write (default: kohya)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.safetensors")
    parser.add_argument("--family", choices=family_names(), help="if the keys are ambiguous")
    parser.add_argument("--without-text-encoders", action="store_true", help="drop the modules of the text encoders")
    options = parser.parse_args(arguments)
    if (options.file is None) == (options.merge is None):
        parser.error("give one file to convert, or several after --merge")
    return run_command(lambda: _export(options))


def _export(options: argparse.Namespace) -> None:
    paths = [split_weight(text) for text in options.merge] if options.merge else [(options.file, 1.0)]
    families_and_metadata = [read_family(path, options.family) for path, _ in paths]
    families = [name for name, _ in families_and_metadata]
    if len(set(families)) > 1:
        listed = ", ".join(f"{path} is for {name}" for (path, _), name in zip(paths, families, strict=True))
        raise SettingsError(f"Only LoRAs of one family can be merged: {listed}.")
    family_name = families[0]
    facts = get_family(family_name).FACTS
    loras = [(load_lora(path, family_name), strength) for path, strength in paths]
    try:
        modules = convert.merge(loras) if options.merge else loras[0][0]
    except ValueError as problem:
        raise SettingsError(f"--merge: {problem}.") from problem
    if options.without_text_encoders:
        prefix = f"{facts.lora_prefix}."
        modules = {name: weights for name, weights in modules.items() if name.startswith(prefix)}
    if not modules:
        raise SettingsError("There is nothing to write: every module was dropped or has weight 0.")
    try:
        file = convert.to_file(modules, options.to, family_name)
    except ValueError as problem:
        raise SettingsError(f"--to {options.to}: {problem}.") from problem
    metadata: dict[str, str] = {}
    if options.merge:
        metadata["kiln_merged_from"] = json.dumps({path.name: strength for path, strength in paths})
    else:
        old_metadata = families_and_metadata[0][1]
        metadata = {key: value for key, value in old_metadata.items() if not key.startswith(DROPPED_METADATA)}
    metadata |= {"ss_network_dim": str(file.rank), "ss_network_alpha": f"{file.alpha:g}"}
    metadata.setdefault("modelspec.architecture", f"{facts.architecture}/lora")
    write.write_lora(options.out, file.tensors, metadata)
    log.info("%s: %d modules for %s, rank %d, alpha %g.", options.out, len(modules), family_name, file.rank, file.alpha)


if __name__ == "__main__":
    sys.exit(export_command(sys.argv[1:]))
