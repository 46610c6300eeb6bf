"""Regularisation images that the base model draws itself, once, before anything is trained.

Prior preservation (DreamBooth, arXiv:2208.12242): training on them too keeps the model's idea of the class. They are
in CACHE_PATH/class-pictures, in a folder named by a hash of everything that decides them.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.data import encode
from trainer.engine.device import release, torch_dtype
from trainer.engine.encoders import load_text_encoders, load_vae
from trainer.engine.load import load_denoiser
from trainer.job.reporting.status import Status
from trainer.spec import memory_model
from trainer.spec.errors import SettingsError
from trainer.spec.family import CLIP_TOKENS, base_models, facts_of, get_family
from trainer.spec.plan import Dataset, EnginePlan, Plan, Prompt, Source
from trainer.storage import atomic, digests, folders, json_files
from trainer.storage.read import is_regular
from trainer.training.objective import scheduler_changes

log = logging.getLogger(__name__)
VERSION = 1  # of how they are drawn: a new one draws all anew


@dataclass(frozen=True)
class ClassImages:
    """The images of one source. `prompt` has the seed of the first; the others count up from there."""

    prompt: Prompt
    count: int

    def folder(
        self, cache: Path, model: Path, *, precision: str, scheduler: dict[str, Any], max_tokens: int = CLIP_TOKENS
    ) -> Path:
        """Where they are: by the prompt, the number, the model's weights and the format that these are computed in."""
        parts = sorted(path for path in model.iterdir() if path.is_dir())
        weights = [(path.name, digests.weights_digest(path)) for path in parts]
        content = [VERSION, asdict(self.prompt), self.count, precision, scheduler, *weights]
        if max_tokens != CLIP_TOKENS:
            content.append(f"{max_tokens} tokens")
        key = digests.digest(content)
        return cache / "class-pictures" / key[:32]

    def missing(self, folder: Path) -> list[tuple[Path, Prompt]]:
        """The files that are not there yet, or have changed since, and the prompt of each."""
        folders.set_aside_changed(folder)
        missing = []
        for number in range(self.count):
            path = folder / f"{number:05d}.png"
            if not is_regular(path):
                json_files.set_aside_unless(path, lambda _: False, "is not a file")
                missing.append((path, replace(self.prompt, seed=self.prompt.seed + number)))
        return missing


def draw_class_images(plan: Plan, *, status: Status, check_in: Callable[[], None]) -> Plan:
    """Draw the class images that are missing; returns the plan with the folder of each source that has some."""
    facts = facts_of(plan.model.family, plan.model.base)
    model = Path(plan.model.path)
    defaults: dict[str, Any] = {"steps": facts.prompt_steps, "guidance": facts.prompt_guidance, "cfg": facts.prompt_cfg}
    defaults |= base_models()[plan.model.base][1].defaults
    scheduler = scheduler_changes(plan.train)
    wanted: list[tuple[ClassImages, Path]] = []

    def with_folder(source: Source, dataset: Dataset) -> Source:
        if source.kind != "generated":
            return source
        width, height = (max(facts.multiple, side // facts.multiple * facts.multiple) for side in dataset.resolution)
        prompt = Prompt(text=source.location, width=width, height=height, seed=plan.train.seed, **defaults)
        images = ClassImages(prompt, source.count)
        folder = images.folder(
            Path(plan.output.cache),
            model,
            precision=plan.engine.precision,
            scheduler=scheduler,
            max_tokens=plan.train.max_token_length,
        )
        wanted.append((images, folder))
        return dataclasses.replace(source, path=str(folder))

    with_folders = plan.map_sources(with_folder)
    if wanted:
        status.phase("drawing class pictures")
        _fill(wanted, plan, model=model, check_in=check_in)
    return with_folders


def engine_for_one(plan: Plan) -> EnginePlan:
    """The plan for the first process while it is alone, without the GPUs that are to share the weights with it.

    They come from the host. Raises SettingsError where they take more than it has for the weights of all processes.
    """
    engine = plan.engine
    if engine.offload != "shards":
        return engine
    footprint = base_models()[plan.model.base][1].footprint
    if footprint is not None and engine.host_gib is not None:
        needed_gib = memory_model.weights_gib(footprint, 0, engine.precision)
        have_gib = engine.host_gib * engine.num_gpus
        if needed_gib > have_gib:
            fewer_bits = "" if engine.precision == "nf4" else "; or set PARAMS_PRECISION=nf4"
            raise SettingsError(
                f"class_prompt: one GPU alone draws class images, with the weights in the host's memory. In "
                f"{engine.precision} they need {needed_gib:.1f} GiB there, where a job may take {have_gib:.1f}. Fix: "
                f"give the images in image_dir, with is_reg, instead; or take a machine with more memory{fewer_bits}."
            )
    return replace(engine, offload="weights")


def _fill(wanted: Sequence[tuple[ClassImages, Path]], plan: Plan, *, model: Path, check_in: Callable[[], None]) -> None:
    """Draw what is missing of each. The model is loaded only if something is, and released at the end."""
    family = get_family(plan.model.family)
    scheduler = scheduler_changes(plan.train)
    missing: list[tuple[Path, Prompt]] = []
    for images, folder in wanted:
        missing += images.missing(folder)
    if not missing:
        log.info("All %d class images are in the cache.", sum(images.count for images, _ in wanted))
        return
    engine = engine_for_one(plan)
    started = time.monotonic()
    texts = list(dict.fromkeys(encode.prompt_texts([prompt for _, prompt in missing])))
    encoders = load_text_encoders(family, model, engine)
    encoded = dict(zip(texts, family.encode_text(encoders, texts, max_tokens=plan.train.max_token_length), strict=True))
    del encoders
    release()
    denoiser, weight_streamer = load_denoiser(family, model, engine, fused={}, targets=())
    if weight_streamer:
        weight_streamer.attach()
    vae = load_vae(family, model, engine)
    dtype = torch_dtype(engine)
    for path, prompt in missing:
        check_in()
        text, negative = (
            {key: value[None].to(engine.device, dtype) for key, value in encoded[words].items()}
            for words in (prompt.text, prompt.negative)
        )
        with torch.no_grad():
            image = family.sample(
                denoiser, vae, model, prompt=prompt, text=text, negative=negative, scheduler=scheduler
            )
        with atomic.replacing(path, shared=True) as temporary:
            image.save(temporary, format="PNG")
    for images, folder in wanted:
        folders.mark(folder, [f"{number:05d}.png" for number in range(images.count)])
    del denoiser, weight_streamer, vae
    release()
    log.info("Drew %d class images in %.1f s.", len(missing), time.monotonic() - started)
