"""One LoRA step (forward, backward, clip, AdamW) of a full-size denoiser with random weights: speed and memory.

    python -m bench step --family FAMILY PRECISION+POLICY[+WORD]…:BATCH …

FAMILY: flux (1280 x 768 pixels), or flux2, krea2, qwen_image, sd3, sdxl, z_image (1024 x 1024). PRECISION: a value of
PARAMS_PRECISION. POLICY: what the backward pass recomputes (all, attention, products, none;
trainer.engine.memory.checkpointing). WORD:

host     saved activations are offloaded to host memory
weights  the frozen weights are streamed from host memory as well
turned   transposed copies of the weights are kept for the backward pass
replay   the step is captured as a CUDA graph and replayed
narrow   no adapter columns: the LoRA term is added after each FP8 product
plain    FP8 with diffusers' own forward passes of blocks
masked   captions of different lengths: a quarter of the last one's tokens fill it up, and attention gets a mask
native   torch's own attention, even if FlashAttention 4 is installed
eager    nothing is compiled
profile  also lists the kernels that take longest

`images_s`: the batch divided by the median time of a step. `peak_gib`: the memory that torch allocated; with `replay`,
the memory that it reserved.
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
from trainer.engine.memory.sharding import Peers, Shards
from trainer.engine.quantization.cast_adapters import AdapterCast
from trainer.spec.family import get_family
from trainer.spec.memory_model import Workload, predict_peak_gib
from trainer.spec.plan import EnginePlan

RANK = 16
GIB = 2**30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Width and height in pixels.
SQUARE = ("flux2", "sdxl", "sd3", "z_image", "qwen_image", "krea2")
SIZES = {"flux": (1280, 768)} | dict.fromkeys(SQUARE, (1024, 1024))
# Of a caption: tokens, features of a token (of Krea 2: its states, and features of each), features of the pooled text.
TEXT: dict[str, tuple[int, tuple[int, ...], int]]
TEXT = {"flux": (512, (4096,), 768), "sdxl": (77, (2048,), 1280), "sd3": (333, (4096,), 2048)}
TEXT |= {"z_image": (128, (2560,), 1), "flux2": (512, (7680,), 1), "qwen_image": (128, (3584,), 1)}
TEXT["krea2"] = (128, (12, 2560), 1)
SMALL_TEXT = {"krea2": (16, (12, 64), 1)}  # with --small
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}  # of activations; bf16 in all other precisions
OFFLOADS = {"host": "activations", "weights": "weights"}  # by WORD
CHANNELS = {"flux": 16, "flux2": 32, "sdxl": 4, "sd3": 16, "z_image": 16, "qwen_image": 16, "krea2": 16}  # of latents
SEED_OF_WEIGHTS = 0
SEED_OF_ADAPTERS = 1
# What the published models differ in from the defaults of diffusers' classes.
FLUX = {"guidance_embeds": True}
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
Z_IMAGE = {
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}
FLUX2 = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
QWEN_IMAGE = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
KREA2: dict[str, Any] = {}  # it is the default

# With --small: a few narrow blocks of each class.
SMALL: dict[str, dict[str, Any]] = {
    "flux": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2},
    "flux2": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2},
    "sd3": {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128},
    "sdxl": {
        "block_out_channels": (32, 64, 128),
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (1, 2, 4),
    },
    "z_image": {"dim": 256, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
    "qwen_image": {"num_layers": 2, "num_attention_heads": 2},
    "krea2": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 512,
        "text_hidden_dim": 64,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 128,
    },
}


def base_of(family: str, *, small: bool = False) -> str:
    """The value of BASE_MODEL of a family's first published model; of its miniature, with `small`."""
    return next(name for name, model in get_family(family).FACTS.models.items() if model.is_miniature == small)


@contextlib.contextmanager
def random_weights(device: str) -> Iterator[None]:
    """Models that are created inside have random weights, the same each time, on `device` and in bf16."""
    torch.manual_seed(SEED_OF_WEIGHTS)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def denoiser_config(name: str, base: str) -> dict[str, Any]:
    """The published config of a family's model. `base`: a value of BASE_MODEL; the family's first if it is empty."""
    facts = get_family(name).FACTS
    published = facts.models[base or base_of(name)].published
    assert published is not None, f"{base} has no published config"
    return dict(published.configs[f"{facts.parts['denoiser']}/config.json"])


def text_sizes(name: str, base: str, *, small: bool = False) -> tuple[int, tuple[int, ...], int]:
    """`TEXT` of a family, with the features that this model of it reads."""
    length, features, pooled_features = (TEXT | SMALL_TEXT if small else TEXT)[name]
    config = denoiser_config(name, base)
    if "joint_attention_dim" in config:
        features = (config["joint_attention_dim"],)
    return length, features, pooled_features


def denoiser(name: str, *, base: str = "", small: bool = False) -> Any:
    """The published architecture with random weights, on the accelerator, in bf16."""
    import diffusers

    config = denoiser_config(name, base)
    model_class = getattr(diffusers, config.pop("_class_name"))
    if small:
        config |= SMALL[name]
    with random_weights(DEVICE):
        model = model_class(**config)
    return model.requires_grad_(False).train()


class Bench:
    """A denoiser with adapters, in one precision, and the optimiser that trains them."""

    base = ""  # a value of BASE_MODEL; empty: the family's first
    masked = False  # see the word of this name

    def __init__(
        self, name: str, precision: str, *, base: str = "", small: bool = False, peers: Peers | None = None
    ) -> None:
        """`peers`: the processes that share the frozen weights, if these are sharded."""
        self.name = name
        self.base = base or base_of(name)
        self.family = get_family(name)
        self.precision = precision
        self.small = small
        self.size = SIZES[name]
        self.dtype = DTYPES.get(precision, torch.bfloat16)
        self.model = denoiser(name, base=self.base, small=small)
        fused = self.family.FACTS.fused_targets
        targets = self.family.FACTS.targets
        self.streamer = place_denoiser(
            self.model,
            self.family.blocks(self.model),
            precision=precision,
            dtype=self.dtype,
            device=DEVICE,
            rank=RANK,
            fused=fused,
            targets=targets,
            streamed=self.family.regions(self.model) if peers else (),
            shards=Shards(peers, DEVICE) if peers else None,
        )
        self.forwards = self.family.fused_forwards()
        self.params = adapters.add_adapters(
            self.model, self.family.blocks(self.model), targets=targets, fused=fused, rank=RANK, alpha=RANK, seed=0
        )
        # B begins at zero, and A would have no gradient.
        torch.manual_seed(SEED_OF_ADAPTERS)
        for parameter_name, p in self.model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(p, std=0.01)
        free()
        self.optimizer_params = flat_parameters.flatten_parameters("adamw", self.params)
        self.optimizer = torch.optim.AdamW(self.optimizer_params, lr=1e-4)
        self.runner = EagerStep(self.params, self.optimizer_params)

    def engine(self, words: set[str]) -> Engine:
        """The engine of one variant; replaces the one before."""
        self.masked = "masked" in words
        torch.compiler.reset()
        self.runner.release()
        original_forwards = {ours: theirs for theirs, ours in self.forwards.items()}
        install(self.model, original_forwards if "plain" in words else self.forwards)
        has_flash_4 = flash_attention.version() and "native" not in words
        plan = EnginePlan(
            device=DEVICE,
            dtype=str(self.dtype).removeprefix("torch."),
            recompute=policy_of(words),
            offload="shards" if self.streamer else offload_of(words),
            compile="eager" not in words,
            turned_weights="turned" in words,
            attention=detect().fastest_attention if has_flash_4 else "native",
        )
        engine = Engine(self.model, self.family.regions(self.model), plan, self.streamer)
        if "narrow" in words:
            engine.drop_adapter_columns()
        cast = AdapterCast(self.model, self.dtype) if "eager" in words else contextlib.nullcontext
        pass_context = partial(engine.forward_backward, cast)
        step_class = GraphStep if "replay" in words else EagerStep
        self.runner = step_class(self.params, self.optimizer_params, pass_context)
        return engine

    def inputs(self, batch: int, *, seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """A random batch. `scale`: of the loss, as with fp16."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        width, height = (128, 128) if self.small else self.size
        length, features, pooled_features = text_sizes(self.name, self.base, small=self.small)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=DEVICE, generator=generator)

        shape = (batch, CHANNELS[self.name], height // 8, width // 8)
        made = {
            "noisy": normal(*shape),
            "target": normal(*shape),
            "t": torch.rand(batch, device=DEVICE, generator=generator),
            "tokens": normal(batch, length, *features).to(self.dtype),
            "pooled": normal(batch, pooled_features).to(self.dtype),
            "real": torch.ones(batch, length, device=DEVICE, dtype=torch.bool),  # all tokens are the caption's
            "geometry": torch.tensor([[height, width, 0, 0, height, width]] * batch, device=DEVICE).float(),
            "scale": torch.full((), scale, device=DEVICE),
        }
        if self.masked:
            made["padding"] = torch.zeros(batch, length, device=DEVICE, dtype=torch.bool)
            made["padding"][-1, length - length // 4 :] = True
        return made

    def loss(self, engine: Engine | None, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the scaled loss of which the gradient is taken."""
        text = {name: inputs[name] for name in ("tokens", "pooled", "real", "padding") if name in inputs}
        with engine.saved_tensors() if engine else contextlib.nullcontext():
            out = self.family.predict(
                self.model, inputs["noisy"], inputs["t"], text=text, guidance=1.0, geometry_B6=inputs["geometry"]
            )
        loss = torch.nn.functional.mse_loss(out.float(), inputs["target"])
        return loss, loss * inputs["scale"]

    def backward(self, engine: Engine | None, batch: int, *, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
        """Add the gradient of a random batch; returns the loss."""
        return self.runner(partial(self.loss, engine), self.inputs(batch, seed=seed, scale=scale))

    def step(self, engine: Engine | None, batch: int) -> None:
        """A training step."""
        self.backward(engine, batch)
        norm = torch.nn.utils.clip_grad_norm_(self.optimizer_params, 1.0)
        norm.item()  # as in training, where the host waits for it
        self.optimizer.step()
        self.runner.clear()

    def measured(self, step: Callable[[], None], *, times: int = 5) -> dict[str, Any]:
        """Seconds of the first and of a usual step, and the peak. A second step warms up, unless `times` is 1."""
        row: dict[str, Any] = {"first_s": round(timed(step), 1)}
        if times > 1:
            step()
        reserved_gib = torch.cuda.memory_reserved() / GIB if isinstance(self.runner, GraphStep) else 0  # the graphs'
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row["step_s"] = round(statistics.median(timed(step) for _ in range(1 if self.small else times)), 4)
        if DEVICE == "cuda":
            row["peak_gib"] = round(max(reserved_gib, torch.cuda.max_memory_allocated() / GIB), 2)
        return row


def policy_of(words: set[str]) -> str:
    """The recompute policy among the words of a variant."""
    for policy in POLICIES:
        if policy in words:
            return policy
    return "none"


def offload_of(words: set[str]) -> str:
    """The offload mode among the words of a variant."""
    for word, offload in OFFLOADS.items():
        if word in words:
            return offload
    return "none"


def free() -> None:
    """Free unused memory of the device."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def timed(step: Callable[[], None]) -> float:
    """Seconds that `step` takes, until the device has finished it."""
    wait = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    wait()
    started = time.monotonic()
    step()
    wait()
    return time.monotonic() - started


def measure(bench: Bench, variant: str, batch: int, *, times: int = 5) -> dict[str, Any]:
    """One row: measured, and with the predicted peak where the model's footprint has one."""
    words = set(variant.split("+"))
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
    footprint = bench.family.FACTS.models[bench.base].footprint
    if footprint is not None and not bench.small:
        if policy_of(words) not in footprint.saved_gib:
            return row
        width, height = bench.size
        gib = predict_peak_gib(
            footprint,
            Workload(width * height, batch, RANK, "adamw"),
            precision=bench.precision,
            recompute=policy_of(words),
            offload=offload_of(words),
            transposed="turned" in words,
        )
        row["predicted_gib"] = round(gib, 2)
    bench.runner.release()
    return row


def profile(step: Callable[[], None], rows: int = 60) -> None:
    """Print the kernels that take longest."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        timed(step)
    kernels = [event for event in profiled.key_averages() if event.self_device_time_total]
    total_us = sum(kernel.self_device_time_total for kernel in kernels)
    print(f"{total_us / 1e3:9.1f} ms in all")
    for kernel in sorted(kernels, key=lambda kernel: -kernel.self_device_time_total)[:rows]:
        share = 100 * kernel.self_device_time_total / total_us
        print(f"{kernel.self_device_time_total / 1e3:9.2f} ms {share:5.1f} % {kernel.count:5d} x {kernel.key[:110]}")


def counted(bench: Bench) -> dict[str, Any]:
    """The numbers of weights that `trainer.spec.family.Footprint` has."""
    from trainer.engine.quantization.frozen_linear import FrozenLinear

    block_weights = sum(m.weight_NK.numel() for m in bench.model.modules() if isinstance(m, FrozenLinear))
    trained = sum(p.numel() for p in bench.params)
    frozen = sum(p.numel() for p in bench.model.parameters()) + block_weights - trained
    return {
        "block_weights": block_weights,
        "other_weights": frozen - block_weights,
        "adapter_weights_per_rank": trained / RANK,
        "region_count": len(bench.family.regions(bench.model)),
    }


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--size", type=int, nargs=2, help="width and height in pixels")
    parser.add_argument("--times", type=int, default=5, help="steps that are measured, after one or two to warm up")
    parser.add_argument("--limit", type=float, help="cap of the device's memory, in GiB")
    parser.add_argument(
        "what",
        nargs="+",
        help="PRECISION+POLICY[+host|+weights][+turned][+replay][+narrow][+plain][+masked][+native][+eager][+profile]:BATCH",
    )
    asked = parser.parse_args(arguments)
    report = Report(f"{asked.base or asked.family}: a step", asked.markdown)
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
            bench = Bench(asked.family, precision, base=asked.base, small=asked.small)
            bench.size = tuple(asked.size or bench.size)
            print(json.dumps(counted(bench)), flush=True)
        limit_memory(DEVICE, asked.limit)  # not while the model is created, in 16 bits
        report.row(measure(bench, variant, int(batch), times=asked.times))
