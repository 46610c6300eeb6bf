"""Random plans: families, sizes, formats, optimisers, what is recomputed, kept on the host, recorded, and done between.

The models have blocks as wide as published ones, but few of them, and the miniatures' text encoders and VAE; on a CPU
they are the miniatures. The plan of a seed is always the same. tests/support/attempts.py runs them.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
from PIL import Image

from bench.step import FLUX, FLUX2, KREA2, QWEN_IMAGE, SD3, SDXL, Z_IMAGE, random_weights
from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from entrypoint.system.hardware import Hardware
from tests.support.miniatures import base
from trainer.data.cache import ALONE
from trainer.data.encode import open_cache
from trainer.data.records import Scan
from trainer.data.scan import scan
from trainer.engine.memory.checkpointing import POLICIES
from trainer.job.prepare import PreparedData
from trainer.job.rolling.rolling_cache import fill, make_sampler
from trainer.spec.family import base_models, family_names, get_family
from trainer.spec.optimizers import OPTIMIZERS
from trainer.spec.plan import Plan, Prompt

PICTURES = 3 * [(96, 64)] + 3 * [(64, 64)]  # two buckets; one picture is held out
# Its text encoder is the miniature's, and so are the blocks that fuse its states.
KREA2_FUSION = {"text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 96}
WIDE: dict[str, dict[str, Any]] = {  # what the denoisers have in common with the published ones: all but their depth
    "flux": {**FLUX, "num_layers": 1, "num_single_layers": 3, "num_attention_heads": 24, "attention_head_dim": 128,
             "axes_dims_rope": (16, 56, 56)},
    "flux2": {**FLUX2, "num_layers": 1, "num_single_layers": 3, "in_channels": 64, "joint_attention_dim": 96},
    "sd3": {**SD3, "num_layers": 4},
    "sdxl": {**SDXL, "transformer_layers_per_block": (1, 1, 2), "cross_attention_dim": 128, "norm_num_groups": 32,
             "projection_class_embeddings_input_dim": 6 * 256 + 64},
    "z_image": {**Z_IMAGE, "n_layers": 3, "n_refiner_layers": 1, "cap_feat_dim": 64},
    "qwen_image": {**QWEN_IMAGE, "num_layers": 2, "joint_attention_dim": 64},
    "krea2": {**KREA2, "num_layers": 2, "intermediate_size": 2048, "text_hidden_dim": 32, **KREA2_FUSION},
}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"
T5_LENGTH = 512  # tokens, as the published pipelines have them
OFTEN = {"fp8": 3, "bf16": 3}  # times as often as the other formats
COMPILED = 50  # of so many plans one is compiled, which takes tens of seconds


@dataclass(frozen=True)
class Scale:
    """How large the plans are."""

    sides: tuple[tuple[int, ...], tuple[int, ...]]  # resolutions of both datasets, in pixels
    batches: tuple[tuple[int, int], tuple[int, int]]  # pictures at once, from and to
    ranks: tuple[int, ...]
    steps: int  # micro-batches: on an accelerator an epoch at least
    sample: int  # pixels of a side


SCALES = {
    "cuda": Scale(((384, 512, 640), (256, 320)), ((1, 3), (2, 6)), (4, 16, 32, 64), 12, 256),
    "cpu": Scale(((64, 96), (64,)), ((1, 2), (2, 3)), (2, 4), 3, 64),
}


@dataclass(frozen=True)
class Drawn:
    """One plan. `room`: the cap, 0 where nothing but what is there before the first step fits, 1 where what is asked
    for just fits."""

    seed: int
    family: str
    settings: dict[str, str]
    engine: dict[str, Any]
    datasets: tuple[dict[str, Any], ...]
    samples: bool
    room: float


def drawn(seed: int, hardware: Hardware) -> Drawn:
    rng, scale = random.Random(f"plan {seed}"), SCALES[hardware.device]
    cuda = hardware.device == "cuda"
    compiled = cuda and seed % COMPILED == COMPILED // 2
    name = "sd3" if compiled else rng.choice(family_names())
    precision = rng.choices(hardware.formats, [OFTEN.get(p, 1) for p in hardware.formats])[0]
    recompute = rng.choice(("attention", "all") if compiled else tuple(POLICIES))
    places = {"all": ("activations", "weights"), "attention": ("activations",)}.get(recompute, ())
    offload = rng.choice(places) if cuda and places and rng.random() < 0.25 else "none"
    kind = rng.choices(("lora", "rslora", "dora"), (8, 1, 1))[0] if offload != "weights" else "lora"
    accumulation = rng.choice((1, 1, 2))
    every = {"SAMPLE": rng.choice((0, 0, 5)), "VALIDATE": rng.choice((0, 3, 5)), "SAVE": rng.choice((0, 4))}
    settings = {
        "PARAMS_PRECISION": precision,
        "PARAMS_NETWORK_DIM": str(rng.choice(scale.ranks)),
        "PARAMS_LORA_TYPE": kind,
        "PARAMS_SPLIT_QKV": rng.choice(("true", "false")),
        "PARAMS_OPTIMIZER_TYPE": rng.choice(tuple(OPTIMIZERS)),
        "PARAMS_EMA_DECAY": rng.choice(("0", "0", "0.9")),
        "PARAMS_GRADIENT_ACCUMULATION": str(accumulation),
        "PARAMS_MAX_STEPS": str(scale.steps // accumulation),
        "PARAMS_SEED": str(seed),
        "PARAMS_COMPILE": str(compiled).lower(),
        **{f"PARAMS_{what}_EVERY_N_STEPS": str(steps) for what, steps in every.items()},
    }
    engine = {
        "recompute": recompute,
        "kept_blocks": rng.choice((0, 0, 1, 2)) if recompute in ("products", "attention") and offload == "none" else 0,
        "offload": offload,
        "turned_weights": (precision, recompute, offload) == ("fp8", "none", "none") and rng.random() < 0.5,
        "replay": hardware.can_capture and rng.random() < 0.9,
        "host_gib": rng.choice((None, None, 0.0)),  # 0: the weights have no place on the host
    }
    datasets = tuple(
        {"resolution": rng.choice(sides), "batch_size": rng.randint(*counts), "num_repeats": repeats,
         "enable_bucket": True, "bucket_reso_steps": 32, "min_bucket_reso": 32, "max_bucket_reso": 1024,
         "validation_split": 0.1}
        for sides, counts, repeats in zip(scale.sides, scale.batches, (1, 2), strict=True)
    )  # fmt: skip
    # Too little for what is asked, just enough, or enough for recordings of several sizes.
    room = rng.uniform(*rng.choices(((-0.05, 0.95), (0.95, 1.15), (1.15, 2.5)), (70, 15, 15))[0])
    return Drawn(seed, name, settings, engine, datasets, every["SAMPLE"] > 0, round(room, 3))


def miniature(name: str) -> Path:
    return Path(base_models()[base(name)][1].source)


def wide(name: str) -> Any:
    """The denoiser of a few blocks that are as wide as published ones, for the miniature's texts."""
    place = miniature(name) / get_family(name).FACTS.parts["denoiser"]
    config = json.loads((place / "config.json").read_text())
    return getattr(diffusers, config["_class_name"]).from_config({**config, **WIDE[name]})


@dataclass
class Ground:
    """What the plans share: the models, the pictures, and the cache of latents and texts."""

    folder: Path
    hardware: Hardware

    @property
    def device(self) -> str:
        return self.hardware.device

    @cached_property
    def models(self) -> dict[str, Path]:
        return {name: miniature(name) if self.device == "cpu" else self.written(name) for name in family_names()}

    def written(self, name: str) -> Path:
        """The miniature with a wide denoiser in its place, and with texts as long as published models have them."""
        small, folder = miniature(name), self.folder / name
        place = folder / get_family(name).FACTS.parts["denoiser"]
        shutil.copytree(small, folder, ignore=lambda at, _: [WEIGHTS] if Path(at).name == place.name else [])
        with random_weights(self.device):
            wide(name).save_pretrained(place)
        for path in folder.glob("tokenizer*/tokenizer_config.json"):
            about = json.loads(path.read_text())
            if about["tokenizer_class"].startswith("T5"):
                path.write_text(json.dumps({**about, "model_max_length": T5_LENGTH}))
        return folder

    @cached_property
    def images(self) -> Path:
        folder = self.folder / "pictures"
        folder.mkdir()
        for i, size in enumerate(PICTURES):
            Image.effect_noise(size, 90 + i).convert("RGB").save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(f"a red circle, number {i}")
        return folder

    @cached_property
    def found(self) -> Scan:
        """The same for all plans: each has two datasets of the same pictures."""
        return scan(self.plan(drawn(0, self.hardware)).data, cpu_workers=0)

    def plan(self, of: Drawn) -> Plan:
        subsets = [{"image_dir": str(self.images), "caption_extension": ".txt"}]
        datasets = [{**dataset, "subsets": subsets} for dataset in of.datasets]
        asked = {
            "BASE_MODEL": base(of.family), "OUTPUT_PATH": str(self.folder / "out"), "OUTPUT_NAME": "x",
            "CACHE_PATH": str(self.folder / "cache"), "DATASET_CONFIG": json.dumps({"datasets": datasets}),
            "BACKEND": self.hardware.backend, "PARAMS_MAX_LOSS_SPIKE": "0", "PARAMS_MAX_SKIPPED_STEPS": "1000",
        }  # fmt: skip
        now = datetime(2026, 1, 2, tzinfo=UTC)
        made = make_plan(
            read_settings({**asked, **of.settings}),
            read_manifest(asked["DATASET_CONFIG"], None),
            self.hardware,
            now=now,
        )
        for_each = [
            dataclasses.replace(
                d,
                subsets=tuple(
                    dataclasses.replace(s, source=dataclasses.replace(s.source, path=s.source.location))
                    for s in d.subsets
                ),
            )
            for d in made.data.datasets
        ]
        side = SCALES[self.device].sample
        prompt = Prompt("a blue square", side, side, seed=of.seed, steps=2, guidance=3.5, cfg=3.0)
        return dataclasses.replace(
            made,
            model=dataclasses.replace(made.model, path=str(self.models[of.family])),
            data=dataclasses.replace(made.data, datasets=tuple(for_each)),
            engine=dataclasses.replace(made.engine, **of.engine),
            prompts=(prompt,) if of.samples else (),
        )

    def ready(self, plan: Plan) -> PreparedData:
        """What `prepare.prepare_data` gives, of pictures that were looked at before."""
        cache = open_cache(
            Path(plan.output.cache), Path(plan.model.path), family=plan.model.family, precision=plan.engine.dtype
        )
        made = PreparedData(plan, self.found, make_sampler(plan, self.found), cache, None)
        fill(made.plan, made.sampler, made.cache, check_in=lambda: None, share=ALONE)
        return made
