"""Tensors → a safetensors file with the header that users' tools read. What the tensors are:
`trainer.lora_files.convert`.

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


def export_command(arguments: list[str]) -> int:
    """`python -m trainer.export`; returns the exit code."""
    parser = argparse.ArgumentParser("python -m trainer.export", description="Convert a LoRA file, or merge several.")
    parser.add_argument("file", nargs="?", type=Path, metavar="IN.safetensors")
    parser.add_argument("--merge", nargs="+", metavar="FILE[:WEIGHT]", help="add these up instead")
    parser.add_argument("--to", choices=sorted(convert.KEY_FORMATS), default="kohya", help="whose key names (kohya)")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.safetensors")
    parser.add_argument("--family", choices=family_names(), help="if the keys do not tell")
    parser.add_argument("--without-text-encoders", action="store_true", help="leave their modules out")
    asked = parser.parse_args(arguments)
    if (asked.file is None) == (asked.merge is None):
        parser.error("name one file to convert, or some after --merge")
    return run_command(lambda: _export(asked))


def _export(asked: argparse.Namespace) -> None:
    several = [split_weight(text) for text in asked.merge] if asked.merge else [(asked.file, 1.0)]
    found = [read_family(path, asked.family) for path, _ in several]
    kinds = {name for name, _ in found}
    if len(kinds) > 1:
        each = ", ".join(f"{path} is for {name}" for (path, _), (name, _) in zip(several, found, strict=True))
        raise SettingsError(f"Only LoRAs of one family can be merged: {each}.")
    name = kinds.pop()
    loaded = [(load_lora(path, name), weight) for path, weight in several]
    try:
        modules = convert.merge(loaded) if asked.merge else loaded[0][0]
    except ValueError as problem:
        raise SettingsError(f"--merge: {problem}.") from problem
    if asked.without_text_encoders:
        own = f"{get_family(name).FACTS.lora_prefix}."
        modules = {module: adapter for module, adapter in modules.items() if module.startswith(own)}
    if not modules:
        raise SettingsError("Nothing is left to write.")
    try:
        made = convert.to_file(modules, asked.to, name)
    except ValueError as problem:
        raise SettingsError(f"This cannot be written with {asked.to}'s names: {problem}.") from problem
    # Peft's settings and the hashes are about the file that was read.
    gone = ("lora_adapter_metadata", "sshs_", "modelspec.hash")
    metadata = {} if asked.merge else {k: v for k, v in found[0][1].items() if not k.startswith(gone)}
    metadata |= {"ss_network_dim": str(made.rank), "ss_network_alpha": f"{made.alpha:g}"}
    metadata.setdefault("modelspec.architecture", f"{get_family(name).FACTS.architecture}/lora")
    if asked.merge:
        metadata["kiln_merged_from"] = json.dumps({path.name: weight for path, weight in several})
    write.write_lora(asked.out, made.tensors, metadata)
    log.info("%s: %d modules for %s, rank %d, alpha %g.", asked.out, len(modules), name, made.rank, made.alpha)


if __name__ == "__main__":
    import sys

    sys.exit(export_command(sys.argv[1:]))
