"""Time to copy, write and read the state of a large adapter: a JSON line for each part.

    python -m bench.state FOLDER [--family flux] [--rank 128]

The tensors have the shapes and types of a real job's: the adapters of a full-size denoiser, and Prodigy's state for
them. All rows of a tensor share one row's memory, so that only the copies take memory. FOLDER: on the volume to
measure; about 8 bytes are written for each byte of the LoRA. `stall_s`: how long training waits for the copies (from
the host's memory here; on a GPU they overlap with the next step). `write_s`: to write, hash, flush, read back and
compare, while training continues. `cold_read_s`: to read the state on a restart, with an empty page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.step import FLUX, FLUX2, KREA2, QWEN_IMAGE, SD3, SDXL, Z_IMAGE
from trainer.checkpoints import state_files
from trainer.checkpoints.snapshots import Snapshots
from trainer.engine import adapters as lora
from trainer.lora_files import convert, peft_bridge, write
from trainer.spec.family import get_family

GB = 1e9


def adapters(name: str, rank: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapters' tensors by peft's names, and the optimiser's state for them."""
    from diffusers import (
        Flux2Transformer2DModel,
        FluxTransformer2DModel,
        Krea2Transformer2DModel,
        QwenImageTransformer2DModel,
        SD3Transformer2DModel,
        UNet2DConditionModel,
        ZImageTransformer2DModel,
    )

    kind = get_family(name)
    with torch.device("meta"):
        make: dict[str, Callable[[], Any]] = {
            "flux": lambda: FluxTransformer2DModel(**FLUX),
            "flux2": lambda: Flux2Transformer2DModel(**FLUX2),
            "sd3": lambda: SD3Transformer2DModel(**SD3),
            "sdxl": lambda: UNet2DConditionModel(**SDXL),
            "z_image": lambda: ZImageTransformer2DModel(**Z_IMAGE),
            "qwen_image": lambda: QwenImageTransformer2DModel(**QWEN_IMAGE),
            "krea2": lambda: Krea2Transformer2DModel(**KREA2),
        }
        model = make[name]().requires_grad_(False)
        facts = kind.FACTS
        lora.fuse_projections(kind.blocks(model), fused=facts.fused_targets, targets=facts.targets)
        parts = {"targets": facts.targets, "fused": facts.fused_targets}
        lora.add_adapters(model, kind.blocks(model), **parts, rank=rank, alpha=rank, seed=0)
    found = {k: repeated_rows(t) for k, t in lora.state(model).items()}
    state: dict[int, dict[str, Any]] = {}
    for i, (key, tensor) in enumerate(found.items()):
        state[i] = {
            "step": 1,
            "s": repeated_rows(tensor),
            "exp_avg": repeated_rows(tensor),
            "exp_avg_sq": repeated_rows(tensor),
        }
        state[i]["p0"] = repeated_rows(tensor) if ".lora_A." in key else torch.tensor(0.0)  # B begins as zero
    return found, state


def repeated_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of this shape whose rows are all the same memory."""
    return torch.rand(tensor.shape[-1]).expand(tensor.shape)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", default="flux")
    parser.add_argument("--rank", type=int, default=128)
    flags = parser.parse_args(arguments)
    tensors, state = adapters(flags.family, flags.rank)
    count = sum(t.numel() for t in tensors.values())
    report(
        {"what": "adapters", "family": flags.family, "rank": flags.rank, "tensors": len(tensors), "parameters": count}
    )
    snapshots = Snapshots(torch.optim.SGD([torch.zeros(1)], lr=1.0), "cpu")
    live = {"adapters": tensors, "optimizer": {"state": state, "param_groups": []}}
    facts = get_family(flags.family).FACTS
    for turn in ("first", "later"):
        began = time.monotonic()
        snapshots.release()
        modules = snapshots.copy(
            peft_bridge.from_peft_state(tensors, prefix=facts.lora_prefix, fused=facts.fused_targets, scale=1.0)
        )
        tree = snapshots.copy(live)
        report({"what": f"{turn} copies", "stall_s": time.monotonic() - began, "gb": snapshots.bytes / GB})
    out = flags.folder / "bench-state"
    try:
        began = time.monotonic()
        for to in get_family(flags.family).LORA_KEYS.file_formats:
            write.write_lora(out / f"{to}.safetensors", convert.to_file(modules, to, facts.name).tensors, {})
        report({"what": "lora", "write_s": time.monotonic() - began, "gb": size(out) / GB})
        began = time.monotonic()
        folder = state_files.save(out / "state", 1, tree)
        report({"what": "state", "write_s": time.monotonic() - began, "gb": size(folder) / GB})
        measure_disk(folder / "state.safetensors", out / "plain")
        forget(folder / "state.safetensors")
        began = time.monotonic()
        state_files.read(folder)
        report({"what": "state", "cold_read_s": time.monotonic() - began, "gb": size(folder) / GB})
    finally:
        shutil.rmtree(out, ignore_errors=True)


def measure_disk(source: Path, target: Path) -> None:
    """Only write and flush the same bytes: the speed of the volume."""
    with source.open("rb") as file, target.open("wb") as copy:
        spent = 0.0
        while block := file.read(2**26):
            began = time.monotonic()
            copy.write(block)
            spent += time.monotonic() - began
        began = time.monotonic()
        os.fsync(copy.fileno())
    report({"what": "the volume alone", "write_s": spent + time.monotonic() - began, "gb": source.stat().st_size / GB})
    target.unlink()


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def report(row: dict[str, Any]) -> None:
    """One JSON line, with the CPU time and the peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rounded = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
    print(
        json.dumps({**rounded, "cpu_s_so_far": round(time.process_time(), 1), "peak_gib": round(peak, 1)}), flush=True
    )


if __name__ == "__main__":
    main(sys.argv[1:])
