"""The host memory that a job takes to convert and load a full-size model in the file layouts that users have.

    python -m bench.layouts FOLDER flux|sdxl|sd3 file|zeros|shards [float16|bfloat16]

Writes random weights (bfloat16 by default) to one file under their original names, or to shards with an index in
diffusers' layout. Then converts the file and loads the denoiser as a job does, and prints one JSON line: the peak of
the process's own memory, without mapped files, in each phase. On an accelerator the denoiser is quantised to 8 bits;
on the CPU it becomes bf16, which takes memory of its own where the file has another format. A file needs twice its
size on disk: 24 GB for Flux.1's denoiser, 7 for SDXL, 16 for SD3 with T5; shards are read where they are. `zeros` is a
sparse file of zeros, which takes no space on disk.
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
from trainer.storage import safetensors_writer

GIB = 2**30
SHARD_BYTES = 10 * 10**9  # as in most repositories of the Hub
State = dict[str, torch.Tensor]


# ---- weights that are a function of their name, and are never all in memory


@cache
def random_numbers() -> torch.Tensor:
    """A prime number of random numbers: repeated, no half, third or row of a weight equals another."""
    return torch.randn(1_048_573, generator=torch.Generator().manual_seed(0)) * 0.2


def weight(name: str, like: torch.Tensor) -> torch.Tensor:
    """The weight called `name`, always the same, in the shape and type of `like`."""
    numbers = random_numbers()
    begin = zlib.crc32(name.encode()) % len(numbers)
    count = like.numel()
    if begin + count <= len(numbers):
        return numbers[begin : begin + count].to(like.dtype).view(like.shape)
    rolled = numbers.roll(-begin).to(like.dtype)
    return rolled.repeat(-(-count // len(rolled)))[:count].view(like.shape)


def random_state(model: torch.nn.Module, dtype: torch.dtype) -> State:
    """Lazy tensors for all weights of a model on the device "meta"."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    state: State = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            like = tensor.to(dtype)
            state[name] = lazy_tensors.LazyTensor(like, partial(weight, name, like))
    return state


def file_state(name: str, models: dict[str, torch.nn.Module], dtype: torch.dtype) -> State:
    """All parts in one file; of Flux the denoiser alone, which is how its users have it."""
    states = {part: random_state(model, dtype) for part, model in models.items()}
    config: dict[str, Any] = dict(models["denoiser"].config)
    if name == "flux":
        return original.denoiser(name, states["denoiser"], config)
    return original.whole_file(name, states, config)


def write_zeros(path: Path, state: State) -> None:
    """A safetensors file with zeros for `state`: sparse, so that the zeros take no space on disk."""
    entries: dict[str, Any] = {}
    begin = 0
    for name, tensor in state.items():
        end = begin + tensor.nbytes
        dtype = lazy_tensors.DTYPE_NAMES[tensor.dtype]
        entries[name] = {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": [begin, end]}
        begin = end
    header = safetensors_writer.encode_header(entries)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + begin)


def write_shards(folder: Path, model: torch.nn.Module, dtype: torch.dtype, size: int) -> None:
    """The denoiser in diffusers' layout: shards of at most `size` bytes, and their index."""
    shards: list[State] = [{}]
    for key, tensor in random_state(model, dtype).items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > size:
            shards.append({})
        shards[-1][key] = tensor
    base = "diffusion_pytorch_model"
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"{base}-{number:05d}-of-{len(shards):05d}.safetensors"
        lazy_tensors.write_file(folder / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ---- measuring


M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
SAMPLING_INTERVAL_S = 0.001


def own_memory() -> int:
    """Bytes of this process that are not a mapped file."""
    sizes = re.findall(r"(?:RssAnon|RssShmem):\s+(\d+)", Path("/proc/self/status").read_text())  # in KiB
    return 1024 * sum(map(int, sizes))


@contextlib.contextmanager
def memory_taken() -> Iterator[list[int]]:
    """The peak of this process's own memory inside, in bytes above the start, as the only item of a list."""
    # glibc keeps freed blocks up to this size for later, and they would count. Larger ones go back to the system.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    gc.collect()
    start = own_memory()
    peak = [0]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLING_INTERVAL_S):
            peak[0] = max(peak[0], own_memory() - start)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


def write_model(
    folder: Path,
    name: str,
    layout: str,
    *,
    changes: dict[str, dict[str, Any]],
    dtype: torch.dtype,
    shard: int = SHARD_BYTES,
) -> ModelPlan:
    """Write the model to disk; returns the plan's section for it. `changes`: see `full_size.write_configs`."""
    models = write_configs(folder / "model", name, changes)
    facts = get_family(name).FACTS
    parts = {}
    if layout == "shards":
        write_shards(folder / "model" / facts.parts["denoiser"], models["denoiser"], dtype, shard)
    else:
        file = folder / "all.safetensors"
        state = file_state(name, models, dtype)
        if layout == "zeros":
            write_zeros(file, state)
        else:
            lazy_tensors.write_file(file, state)
        parts = dict.fromkeys(["denoiser"] if name == "flux" else models, str(file))
    base = next(iter(facts.models))
    return ModelPlan(base, name, base, path=str(folder / "model"), parts=parts)


def measure(plan: ModelPlan, cache: Path, *, device: str) -> tuple[Any, dict[str, float]]:
    """The denoiser as a job has it before adapters are added; seconds and GiB of each phase of loading it."""
    family = get_family(plan.family)
    facts = family.FACTS
    row: dict[str, float] = {}
    started = time.monotonic()
    with memory_taken() as peak:
        folder = single_file.convert_single_files(plan, cache)
    row["assembled_s"] = round(time.monotonic() - started, 1)
    row["assembled_own_gib"] = peak[0] / GIB
    started = time.monotonic()
    with memory_taken() as peak:
        dtype = stored_dtype(folder / facts.parts["denoiser"])
        denoiser = family.load_denoiser(folder, device="cpu", dtype=dtype)
        row["loaded_own_gib"] = peak[0] / GIB
        place_denoiser(
            denoiser,
            family.blocks(denoiser),
            precision="fp8" if device == "cuda" else "bf16",
            dtype=torch.bfloat16,
            device=device,
            fused=facts.fused_targets if device == "cuda" else {},
            targets=facts.targets,
        )
    row["placed_s"] = round(time.monotonic() - started, 1)
    row["placed_own_gib"] = peak[0] / GIB
    if device == "cuda":
        row["device_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return denoiser, {key: round(value, 3) for key, value in row.items()}


def wrong_weights(folder: Path) -> list[str]:
    """The weights of a converted denoiser that differ from what was written, by diffusers' names."""
    wrong = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:  # once: its header is long
            for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                content = opened.get_tensor(name)
                if not torch.equal(content, weight(name, content)):
                    wrong.append(name)
    return wrong


def main(arguments: list[str]) -> None:
    folder_name, name, layout, *rest = arguments
    folder = Path(folder_name)
    dtype = getattr(torch, rest[0] if rest else "bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = write_model(folder, name, layout, changes=FULL[name], dtype=dtype)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    _, row = measure(plan, folder / "cache", device=device)
    if layout != "zeros":
        converted = single_file.convert_single_files(plan, folder / "cache")
        row["wrong"] = len(wrong_weights(converted / get_family(name).FACTS.parts["denoiser"]))
    title = f"{name} as {layout} of {str(dtype).removeprefix('torch.')}, to {device}"
    print(json.dumps({"what": title, "gib": round(size / GIB, 2), **row}))


if __name__ == "__main__":
    main(sys.argv[1:])
