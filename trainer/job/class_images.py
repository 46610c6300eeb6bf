"""Regularisation pictures that the base model draws itself, once, before anything is trained.

Prior preservation (DreamBooth, arXiv:2208.12242): what the model makes of the class's name goes on being what it makes
of it. The pictures lie in CACHE_PATH/class-pictures, in a folder named by all that decides them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.engine.device import release, torch_dtype
from trainer.engine.encoders import load_text_encoders, load_vae
from trainer.engine.load import load_denoiser
from trainer.job import prepare
from trainer.spec.family import Family
from trainer.spec.plan import EnginePlan, Prompt
from trainer.storage import atomic, digests

log = logging.getLogger(__name__)
VERSION = 1  # of how they are drawn: another one draws them anew


@dataclass(frozen=True)
class Wanted:
    """The pictures of one subset: `prompt` has the first one's seed, the others count up from there."""

    prompt: Prompt
    count: int

    def folder(self, cache: Path, model: Path, *, precision: str, scheduler: dict[str, Any]) -> Path:
        """Where they lie: a function of the prompt, the number, the weights and how these are computed with."""
        parts = sorted(p for p in model.iterdir() if p.is_dir())
        weights = [(p.name, digests.weights_digest(p)) for p in parts]
        key = digests.digest([VERSION, asdict(self.prompt), self.count, precision, scheduler, *weights])
        return cache / "class-pictures" / key[:32]

    def missing(self, folder: Path) -> list[tuple[Path, Prompt]]:
        """The files that are not there yet, and what to draw for each."""
        paths = [folder / f"{number:05d}.png" for number in range(self.count)]
        return [
            (path, replace(self.prompt, seed=self.prompt.seed + number))
            for number, path in enumerate(paths)
            if not path.is_file()
        ]


def fill(
    wanted: Sequence[tuple[Wanted, Path]],
    *,
    family: Family,
    model: Path,
    engine: EnginePlan,
    scheduler: dict[str, Any],
    check_in: Callable[[], None],
) -> None:
    """Draw what is missing of each; the model is loaded only if something is, and is gone when this returns."""
    missing = [item for one, folder in wanted for item in one.missing(folder)]
    if not missing:
        log.info("All %d class pictures are in the cache.", sum(one.count for one, _ in wanted))
        return
    started = time.monotonic()
    texts = list(dict.fromkeys(prepare.prompt_texts([prompt for _, prompt in missing])))
    encoders = load_text_encoders(family, model, engine)
    encoded = dict(zip(texts, family.encode_text(encoders, texts), strict=True))
    del encoders
    release()
    denoiser, stream = load_denoiser(family, model, engine, fused={}, targets=())
    if stream:
        stream.attach()
    device, dtype, vae = engine.device, torch_dtype(engine), load_vae(family, model, engine)
    for path, prompt in missing:
        check_in()
        text, negative = (
            {k: v[None].to(device, dtype) for k, v in encoded[t].items()} for t in (prompt.text, prompt.negative)
        )
        with torch.no_grad():
            image = family.sample(
                denoiser, vae, model, prompt=prompt, text=text, negative=negative, scheduler=scheduler
            )
        with atomic.replacing(path) as temporary:
            image.save(temporary, format="PNG")
    del denoiser, stream, vae
    release()
    log.info("Drew %d class pictures in %.1f s.", len(missing), time.monotonic() - started)
