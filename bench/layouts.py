"""How much of the host's memory a full-size model takes that comes as users have it.

    python -m bench.layouts FOLDER flux|sdxl|sd3 file|zeros|shards [float16|bfloat16]

Writes random weights (bfloat16 unless said) in one file under their original names, or as shards with an index in
diffusers' layout; then assembles them and loads the denoiser as a job does, and prints one JSON line: the most memory
of its own, besides mapped files, that the process took in each phase. On an accelerator the denoiser is quantised to
8 bits; on the CPU it becomes bf16, which is memory of its own where the file has another format. A file needs twice
its size on disk: 24 GB for Flux.1's denoiser, 7 for SDXL, 16 for SD3 with T5; shards are read where they are. `zeros`
is a file of zeros, which takes no room itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from bench import original_names as original
from bench.full_size import FULL, write_configs
from trainer.base_model import lazy_tensors, single_file
from trainer.engine.load import place_denoiser, stored_dtype
from trainer.spec.family import get_family
from trainer.spec.plan import ModelPlan

GIB = 2**30
SHARD = 10 * 10**9  # bytes, as the Hub's files have
State = dict[str, torch.Tensor]


# ---- weights that are known by their name, and never all there


@cache
def pattern() -> torch.Tensor:
    """As many random numbers as a prime says: no half, third or row of a weight looks like another."""
    return torch.randn(1_048_573, generator=torch.Generator().manual_seed(0)) * 0.2


def numbers(name: str, like: torch.Tensor) -> torch.Tensor:
    """The weight called `name`, always the same."""
    begin, count = zlib.crc32(name.encode()) % len(pattern()), like.numel()
    if begin + count <= len(pattern()):
        return pattern()[begin : begin + count].to(like.dtype).view(like.shape)
    turned = pattern().roll(-begin).to(like.dtype)
    return turned.repeat(-(-count // len(turned)))[:count].view(like.shape)


def random_state(model: torch.nn.Module, dtype: torch.dtype) -> State:
    """Stand-ins for all weights of a model on the device "meta"."""
    shared: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    likes = {n: t.to(dtype) for n, t in model.state_dict().items() if n not in shared}
    return {name: lazy_tensors.LazyTensor(like, partial(numbers, name, like)) for name, like in likes.items()}


def file_state(name: str, models: dict[str, torch.nn.Module], dtype: torch.dtype) -> State:
    """All parts of one file; of Flux the denoiser alone, which is how its users have it."""
    states = {part: random_state(model, dtype) for part, model in models.items()}
    config = dict(models["denoiser"].config)  # type: ignore[call-overload]
    return (
        original.denoiser(name, states["denoiser"], config) if name == "flux" else original.whole(name, states, config)
    )


def write_zeros(path: Path, state: State) -> None:
    """A safetensors file with zeros for `state`, on disk as a hole."""
    place, header = 0, {}
    for name, tensor in state.items():
        kind = lazy_tensors.DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": [*tensor.shape], "data_offsets": [place, place + tensor.nbytes]}
        place += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)


def write_shards(folder: Path, model: torch.nn.Module, dtype: torch.dtype, size: int) -> None:
    """The denoiser in diffusers' layout: shards of at most `size` bytes, and their index."""
    shards: list[State] = [{}]
    for key, tensor in random_state(model, dtype).items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > size:
            shards.append({})
        shards[-1][key] = tensor
    base = "diffusion_pytorch_model"
    names = [f"{base}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        lazy_tensors.write_file(folder / file, shard)
    places = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


# ---- what it takes


M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def own_memory() -> int:
    """Bytes of this process that are not a mapped file."""
    kinds = re.findall(r"(?:RssAnon|RssShmem):\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * sum(map(int, kinds))


@contextlib.contextmanager
def memory_taken() -> Iterator[list[int]]:
    """The most memory of its own that this process took inside, in bytes more than at the start; looked at often."""
    # What is freed goes back at once: glibc would keep as much of it as the largest tensors, and count it as ours.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    gc.collect()
    start, most, done = own_memory(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], own_memory() - start)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def written(
    folder: Path,
    name: str,
    layout: str,
    *,
    changes: dict[str, dict[str, Any]],
    dtype: torch.dtype,
    shard: int = SHARD,
) -> ModelPlan:
    """The model on disk, and what a plan says of it."""
    models, facts = write_configs(folder / "model", name, changes), get_family(name).FACTS
    parts = {}
    if layout in ("file", "zeros"):
        file = folder / "all.safetensors"
        {"file": lazy_tensors.write_file, "zeros": write_zeros}[layout](file, file_state(name, models, dtype))
        parts = dict.fromkeys(["denoiser"] if name == "flux" else models, str(file))
    else:
        write_shards(folder / "model" / facts.parts["denoiser"], models["denoiser"], dtype, shard)
    base = next(iter(facts.models))
    return ModelPlan(base, name, base, path=str(folder / "model"), parts=parts)


def measured(plan: ModelPlan, cache: Path, *, device: str) -> tuple[Any, dict[str, float]]:
    """The denoiser as a job has it before there are adapters, and what making it took."""
    kind, row = get_family(plan.family), {}
    facts, precision = kind.FACTS, "fp8" if device == "cuda" else "bf16"
    started = time.monotonic()
    with memory_taken() as assembling:
        folder = single_file.convert_single_files(plan, cache)
    row |= {"assembled_s": round(time.monotonic() - started, 1), "assembled_own_gib": assembling[0] / GIB}
    started = time.monotonic()
    with memory_taken() as loading:
        as_stored = stored_dtype(folder / facts.parts["denoiser"])
        denoiser = kind.load_denoiser(folder, device="cpu", dtype=as_stored)
        row["loaded_own_gib"] = loading[0] / GIB
        blocks, fused = kind.blocks(denoiser), facts.fused_targets if device == "cuda" else {}
        options = {"precision": precision, "dtype": torch.bfloat16, "device": device}
        place_denoiser(denoiser, blocks, **options, fused=fused, targets=facts.targets)
    row |= {"placed_s": round(time.monotonic() - started, 1), "placed_own_gib": loading[0] / GIB}
    if device == "cuda":
        row["device_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return denoiser, {key: round(value, 3) for key, value in row.items()}


def wrong(folder: Path) -> list[str]:
    """The weights of an assembled denoiser that are not what was written, by diffusers' names."""
    found = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:  # once: its header is long
            for key in opened.keys():  # noqa: SIM118 (it is no dictionary)
                content = opened.get_tensor(key)
                if not torch.equal(content, numbers(key, content)):
                    found.append(key)
    return found


def main(arguments: list[str]) -> None:
    place_, name, layout, *rest = arguments
    folder, dtype = Path(place_), getattr(torch, rest[0] if rest else "bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = written(folder, name, layout, changes=FULL[name], dtype=dtype)
    size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    _, row = measured(plan, folder / "cache", device=device)
    if layout != "zeros":
        where = single_file.convert_single_files(plan, folder / "cache") / get_family(name).FACTS.parts["denoiser"]
        row["wrong"] = len(wrong(where))
    what = f"{name} as {layout} of {str(dtype).removeprefix('torch.')}, to {device}"
    print(json.dumps({"what": what, "gib": round(size / GIB, 2), **row}))


if __name__ == "__main__":
    main(sys.argv[1:])
