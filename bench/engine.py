"""One LoRA step (forward, backward, clip, fused AdamW) of a full-size denoiser with random weights: speed and memory.

    python -m bench.engine FAMILY PRECISION+POLICY[+host][+eager][+profile]:BATCH …
    python -m bench.engine FAMILY parity

FAMILY: flux (1280 x 768 pixels), sdxl or sd3 (1024 x 1024). POLICY: a key of trainer.recompute.POLICIES; host: what is
kept waits in the host's memory. `images_s` is the batch by the median time of a step; `peak_gib` what torch allocated.
`parity`: the gradient of every adapter in each format against bf16, on the same batch. Needs an accelerator.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from trainer import lora
from trainer.engine import Engine, place
from trainer.families import family
from trainer.memory import Work, predicted
from trainer.plan import EnginePlan

RANK, GIB, DEVICE = 16, 2**30, "cuda"
SIZES = {"flux": (1280, 768), "sdxl": (1024, 1024), "sd3": (1024, 1024)}
TEXT = {"flux": (512, 4096, 768), "sdxl": (77, 2048, 1280), "sd3": (333, 4096, 2048)}  # tokens, their width, the pooled
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


def denoiser(name: str) -> Any:
    """The published architecture with random weights, on the accelerator, in bf16."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            if name == "flux":
                model: Any = FluxTransformer2DModel(**FLUX)
            elif name == "sd3":
                model = SD3Transformer2DModel(**SD3)
            else:
                model = UNet2DConditionModel(**SDXL)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False).train()


class Bench:
    """A denoiser with adapters, in one precision."""

    def __init__(self, name: str, precision: str) -> None:
        self.name, self.kind, self.precision = name, family(name), precision
        self.model = denoiser(name)
        facts, blocks = self.kind.FACTS, self.kind.blocks(self.model)
        fused, targets = facts.fused_targets, facts.targets
        place(self.model, blocks, precision=precision, device=DEVICE, fused=fused, targets=targets)
        self.params = lora.add_adapters(
            self.model, self.kind.blocks(self.model), targets=targets, fused=fused, rank=RANK, alpha=RANK, seed=0
        )
        torch.manual_seed(1)
        for name_, p in self.model.named_parameters():
            if "lora_B" in name_:
                torch.nn.init.normal_(p, std=0.01)
        free()
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, fused=True)

    def engine(self, words: set[str]) -> Engine:
        torch.compiler.reset()
        policy = next((w for w in ("none", "attention", "all") if w in words), "none")
        plan = EnginePlan(
            device=DEVICE,
            recompute=policy,
            offload="activations" if "host" in words else "none",
            compile="eager" not in words,
        )
        return Engine(self.model, self.kind.regions(self.model), plan)

    def backward(self, engine: Engine, batch: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator(DEVICE).manual_seed(seed)
        width, height = SIZES[self.name]
        length, wide, pooled = TEXT[self.name]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=DEVICE, generator=generator)

        shape = (batch, CHANNELS[self.name], height // 8, width // 8)
        noisy, target = normal(*shape), normal(*shape)
        t_B = torch.rand(batch, device=DEVICE, generator=generator)
        text = {"tokens": normal(batch, length, wide).bfloat16(), "pooled": normal(batch, pooled).bfloat16()}
        geometry = torch.tensor([[height, width, 0, 0, height, width]] * batch, device=DEVICE, dtype=torch.float32)
        with engine.saving():
            out = self.kind.predict(self.model, noisy, t_B, text=text, guidance=1.0, geometry_B6=geometry)
        loss = torch.nn.functional.mse_loss(out.float(), target)
        loss.backward()
        return loss

    def step(self, engine: Engine, batch: int) -> None:
        self.backward(engine, batch)
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def timed(work: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    started = time.monotonic()
    work()
    torch.cuda.synchronize()
    return time.monotonic() - started


def measure(bench: Bench, variant: str, batch: int) -> None:
    words = set(variant.split("+"))
    free()
    row: dict[str, Any] = {"what": f"{bench.name} {variant}", "batch": batch}
    try:
        engine = bench.engine(words)
        row["first_s"] = round(timed(lambda: bench.step(engine, batch)), 1)
        bench.step(engine, batch)
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(timed(lambda: bench.step(engine, batch)) for _ in range(5))
        row |= {"step_s": round(seconds, 4), "images_s": round(batch / seconds, 3)}
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        footprint = next(m.footprint for m in bench.kind.FACTS.models.values())
        if footprint is not None:
            width, height = SIZES[bench.name]
            policy = next(w for w in ("none", "attention", "all") if w in words)
            row["predicted_gib"] = round(
                predicted(
                    footprint,
                    Work(width * height, batch, RANK, "adamw"),
                    precision=bench.precision,
                    recompute=policy,
                    offload="activations" if "host" in words else "none",
                ),
                2,
            )
    except torch.OutOfMemoryError:
        row["peak_gib"] = "out of memory"
    print(json.dumps(row), flush=True)
    if "profile" in words:
        profile(lambda: bench.step(engine, batch))
    bench.optimizer.zero_grad(set_to_none=True)


def profile(work: Callable[[], None], rows: int = 25) -> None:
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
    """The numbers of weights for `trainer.families.Footprint`."""
    from trainer.frozen import FrozenLinear

    inside = sum(m.weight_NK.numel() for m in bench.model.modules() if isinstance(m, FrozenLinear))
    trained = sum(p.numel() for p in bench.params)
    every = sum(p.numel() for p in bench.model.parameters()) + inside - trained
    regions = len(bench.kind.regions(bench.model))
    return {"blocks": inside, "rest": every - inside, "adapters_per_rank": trained / RANK, "regions": regions}


def parity(name: str) -> None:
    """Cosines of the adapters' gradients against bf16, each format; the worst, the median, and the loss."""
    reference: list[torch.Tensor] = []
    for precision in ("bf16", "fp8", "fp8-storage", "int8"):
        free()
        bench = Bench(name, precision)
        engine = bench.engine({"all", "eager"})
        loss = bench.backward(engine, 1, seed=3).item()
        found = [p.grad.flatten().double().cpu() for p in bench.params if p.grad is not None]
        del bench, engine
        if not reference:
            reference = found
        cosines = [torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(found, reference, strict=True)]
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, reference, strict=True)]
        print(
            json.dumps(
                {
                    "what": f"{name} {precision} against bf16",
                    "worst_cosine": round(min(cosines), 5),
                    "median_cosine": round(statistics.median(cosines), 5),
                    "median_error": round(statistics.median(errors), 4),
                    "below_0.99": sum(c < 0.99 for c in cosines),
                    "adapters": len(cosines),
                    "loss": round(loss, 5),
                }
            ),
            flush=True,
        )


def main(arguments: list[str]) -> None:
    name, *rest = arguments
    torch._dynamo.config.cache_size_limit = 64
    if rest == ["parity"]:
        parity(name)
        return
    bench: Bench | None = None
    for argument in rest:
        variant, batch = argument.split(":")
        precision = variant.split("+")[0]
        if bench is None or bench.precision != precision:
            bench = None
            free()
            bench = Bench(name, precision)
            print(json.dumps(counted(bench)), flush=True)
        measure(bench, variant, int(batch))


if __name__ == "__main__":
    main(sys.argv[1:])
