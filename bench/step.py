"""One LoRA step (forward, backward, clip, AdamW) of a full-size denoiser with random weights: speed and memory.

    python -m bench step --family FAMILY PRECISION+POLICY[+WORD]…:BATCH …

FAMILY: flux (1280 x 768 pixels), sdxl or sd3 (1024 x 1024). POLICY: a key of
trainer.engine.memory.checkpointing.POLICIES. WORD, host:
what is kept waits in the host's memory; weights: the frozen weights as well; turned: these are kept turned round as
well; replay: recorded (trainer.engine.cuda_graphs); narrow: adapters are no part of products; plain: FP8 within
diffusers' own
forward passes; native: attention is torch's own also where FlashAttention 4 is installed
(trainer.engine.attention.flash_attention_4); eager:
nothing is compiled; profile: the kernels that take longest are listed. `images_s` is the batch by the median time of a
step; `peak_gib` what torch allocated, or with a recording's memory reserved.
"""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.report import Report, options
from entrypoint.fetch import flash_attention
from entrypoint.system.hardware import detect
from trainer.engine import adapters, flat_parameters
from trainer.engine.cuda_graphs import EagerStep, GraphStep
from trainer.engine.device import limit_memory
from trainer.engine.execution import Engine
from trainer.engine.fused_linear import install
from trainer.engine.load import place_denoiser
from trainer.engine.memory.checkpointing import POLICIES
from trainer.engine.quantization.cast_adapters import AdapterCast
from trainer.spec.family import get_family
from trainer.spec.memory_model import Workload, predict_peak_gib
from trainer.spec.plan import EnginePlan

RANK, GIB, DEVICE = 16, 2**30, "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"flux": (1280, 768), "sdxl": (1024, 1024), "sd3": (1024, 1024)}
TEXT = {"flux": (512, 4096, 768), "sdxl": (77, 2048, 1280), "sd3": (333, 4096, 2048)}  # tokens, their width, the pooled
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}  # bf16 with all other formats
OFFLOADS = {"host": "activations", "weights": "weights"}
CHANNELS = {"flux": 16, "sdxl": 4, "sd3": 16}
FLUX = {"guidance_embeds": True}  # the classes' own defaults are the published models, but for these
SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


# With --small: a few narrow blocks of each class.
SMALL: dict[str, dict[str, Any]] = {
    "flux": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2},
    "sd3": {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128},
    "sdxl": {
        "block_out_channels": (32, 64, 128),
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (1, 2, 4),
    },
}


@contextlib.contextmanager
def random_weights(device: str) -> Iterator[None]:
    """Models that are made inside have random weights, the same each time, on `device` and in bf16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def denoiser(name: str, *, small: bool = False) -> Any:
    """The published architecture with random weights, on the accelerator, in bf16."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    less = SMALL[name] if small else {}
    with random_weights(DEVICE):
        if name == "flux":
            model: Any = FluxTransformer2DModel(**FLUX, **less)
        elif name == "sd3":
            model = SD3Transformer2DModel(**SD3 | less)
        else:
            model = UNet2DConditionModel(**SDXL | less)
    return model.requires_grad_(False).train()


class Bench:
    """A denoiser with adapters, in one precision."""

    def __init__(self, name: str, precision: str, *, small: bool = False) -> None:
        self.name, self.kind, self.precision, self.small = name, get_family(name), precision, small
        self.size, self.dtype = SIZES[name], DTYPES.get(precision, torch.bfloat16)
        self.model = denoiser(name, small=small)
        facts, blocks = self.kind.FACTS, self.kind.blocks(self.model)
        fused, targets = facts.fused_targets, facts.targets
        options = {"precision": precision, "dtype": self.dtype, "device": DEVICE, "rank": RANK}
        place_denoiser(self.model, blocks, **options, fused=fused, targets=targets)
        self.forwards = self.kind.fused_forwards()
        self.params = adapters.add_adapters(
            self.model, self.kind.blocks(self.model), targets=targets, fused=fused, rank=RANK, alpha=RANK, seed=0
        )
        torch.manual_seed(1)
        for name_, p in self.model.named_parameters():
            if "lora_B" in name_:
                torch.nn.init.normal_(p, std=0.01)
        free()
        self.optimizer_params = flat_parameters.flatten_parameters("adamw", self.params)
        self.optimizer = torch.optim.AdamW(self.optimizer_params, lr=1e-4)
        self.runner = EagerStep(self.params, self.optimizer_params)

    def engine(self, words: set[str]) -> Engine:
        torch.compiler.reset()
        self.runner.release()
        theirs = {ours: theirs for theirs, ours in self.forwards.items()}
        install(self.model, theirs if "plain" in words else self.forwards)
        plan = EnginePlan(
            device=DEVICE,
            dtype=str(self.dtype).removeprefix("torch."),
            recompute=next((w for w in POLICIES if w in words), "none"),
            offload=next((to for word, to in OFFLOADS.items() if word in words), "none"),
            compile="eager" not in words,
            turned_weights="turned" in words,
            attention=detect().fastest_attention if flash_attention.version() and "native" not in words else "native",
        )
        engine = Engine(self.model, self.kind.regions(self.model), plan)
        if "narrow" in words:
            engine.drop_adapter_columns()
        halves = AdapterCast(self.model, self.dtype) if "eager" in words else contextlib.nullcontext
        around = partial(engine.forward_backward, halves)
        self.runner = (GraphStep if "replay" in words else EagerStep)(self.params, self.optimizer_params, around)
        return engine

    def inputs(self, batch: int, *, seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        width, height = (128, 128) if self.small else self.size
        length, wide, pooled = TEXT[self.name]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=DEVICE, generator=generator)

        shape = (batch, CHANNELS[self.name], height // 8, width // 8)
        return {
            "noisy": normal(*shape),
            "target": normal(*shape),
            "t": torch.rand(batch, device=DEVICE, generator=generator),
            "tokens": normal(batch, length, wide).to(self.dtype),
            "pooled": normal(batch, pooled).to(self.dtype),
            "geometry": torch.tensor([[height, width, 0, 0, height, width]] * batch, device=DEVICE).float(),
            "scale": torch.full((), scale, device=DEVICE),
        }

    def work(self, engine: Engine | None, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and what the gradient is taken of."""
        text = {"tokens": given["tokens"], "pooled": given["pooled"]}
        with engine.saved_tensors() if engine else contextlib.nullcontext():
            out = self.kind.predict(
                self.model, given["noisy"], given["t"], text=text, guidance=1.0, geometry_B6=given["geometry"]
            )
        loss = torch.nn.functional.mse_loss(out.float(), given["target"])
        return loss, loss * given["scale"]

    def backward(self, engine: Engine | None, batch: int, *, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
        return self.runner(partial(self.work, engine), self.inputs(batch, seed=seed, scale=scale))

    def step(self, engine: Engine | None, batch: int) -> None:
        self.backward(engine, batch)
        norm = torch.nn.utils.clip_grad_norm_(self.optimizer_params, 1.0)
        norm.item()  # as in training, which looks at it
        self.optimizer.step()
        self.runner.clear()

    def measured(self, work: Callable[[], None], *, times: int = 5) -> dict[str, Any]:
        """Seconds of the first and of a usual step, and the peak. With one time alone, there is none between them."""
        row: dict[str, Any] = {"first_s": round(timed(work), 1)}
        if times > 1:
            work()
        recorded = torch.cuda.memory_reserved() / GIB if isinstance(self.runner, GraphStep) else 0  # with its pool
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row["step_s"] = round(statistics.median(timed(work) for _ in range(1 if self.small else times)), 4)
        if DEVICE == "cuda":
            row["peak_gib"] = round(max(recorded, torch.cuda.max_memory_allocated() / GIB), 2)
        return row


def free() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def timed(work: Callable[[], None]) -> float:
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    wait()
    started = time.monotonic()
    work()
    wait()
    return time.monotonic() - started


def measure(bench: Bench, variant: str, batch: int, *, times: int = 5) -> dict[str, Any]:
    """One row: the step in one way."""
    words = set(variant.split("+"))
    policy = next((w for w in POLICIES if w in words), "none")
    free()
    row: dict[str, Any] = {"what": variant, "batch": batch}
    try:
        engine = bench.engine(words)
        row |= bench.measured(lambda: bench.step(engine, batch), times=times)
        row["images_s"] = round(batch / row["step_s"], 3)
        if "profile" in words:
            profile(lambda: bench.step(engine, batch))
    except torch.OutOfMemoryError:
        row["peak_gib"] = "out of memory"
    footprint = next(m.footprint for m in bench.kind.FACTS.models.values())
    if footprint is not None and not bench.small:
        width, height = bench.size
        workload = Workload(width * height, batch, RANK, "adamw")
        offload = next((to for word, to in OFFLOADS.items() if word in words), "none")
        if policy not in footprint.saved_gib:
            return row
        gib = predict_peak_gib(
            footprint,
            workload,
            precision=bench.precision,
            recompute=policy,
            offload=offload,
            transposed="turned" in words,
        )
        row["predicted_gib"] = round(gib, 2)
    bench.runner.release()
    return row


def profile(work: Callable[[], None], rows: int = 60) -> None:
    """The kernels that take longest."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        timed(work)
    events = [e for e in found.key_averages() if e.self_device_time_total]
    total = sum(e.self_device_time_total for e in events)
    print(f"{total / 1e3:9.1f} ms in all")
    for e in sorted(events, key=lambda e: -e.self_device_time_total)[:rows]:
        share = 100 * e.self_device_time_total / total
        print(f"{e.self_device_time_total / 1e3:9.2f} ms {share:5.1f} % {e.count:5d} x {e.key[:110]}")


def counted(bench: Bench) -> dict[str, Any]:
    """The numbers of weights for `trainer.spec.family.Footprint`."""
    from trainer.engine.quantization.frozen_linear import FrozenLinear

    inside = sum(m.weight_NK.numel() for m in bench.model.modules() if isinstance(m, FrozenLinear))
    trained = sum(p.numel() for p in bench.params)
    every = sum(p.numel() for p in bench.model.parameters()) + inside - trained
    regions = len(bench.kind.regions(bench.model))
    return {
        "block_weights": inside,
        "other_weights": every - inside,
        "adapter_weights_per_rank": trained / RANK,
        "region_count": regions,
    }


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--size", type=int, nargs=2, help="width and height in pixels")
    parser.add_argument("--times", type=int, default=5, help="steps that are measured, after one or two that are not")
    parser.add_argument("--limit", type=float, help="GiB of the device's memory that a step may take")
    parser.add_argument(
        "what",
        nargs="+",
        help="PRECISION+POLICY[+host|+weights][+turned][+replay][+narrow][+plain][+native][+eager][+profile]:BATCH",
    )
    asked = parser.parse_args(arguments)
    report = Report(f"{asked.family}: a step", asked.markdown)
    torch._dynamo.config.cache_size_limit = 64
    bench: Bench | None = None
    for argument in asked.what:
        variant, batch = argument.split(":")
        precision = variant.split("+")[0]
        if bench is None or bench.precision != precision:
            bench = None
            free()
            if asked.limit:
                torch.cuda.set_per_process_memory_fraction(1.0)
            bench = Bench(asked.family, precision, small=asked.small)
            bench.size = tuple(asked.size or bench.size)
            print(json.dumps(counted(bench)), flush=True)
        limit_memory(DEVICE, asked.limit)  # not while the model is made, which then has 16 bits
        report.row(measure(bench, variant, int(batch), times=asked.times))
