"""How long samples take while a job trains: pictures of 1024 x 1024 with the family's default steps and guidance.

    python -m bench samples --family flux --limit 23
    python -m bench samples --family flux --pictures 4 --rounds 3

A full-size denoiser and VAE with random weights, in a rehearsed job (`python -m bench shapes`): drawn by the family's
own function in the memory of the captured steps, as `trainer.job.session` does.

`first_s`: the first picture of a round, `others_s`: the mean of the others, `round_s`: all of them as PNG files.
A picture's file is compressed while the next one is drawn. `step_s`,
`next_step_s`: a usual step, and the first one after the round. `same`: whether a round draws the same bits again, with
the same weights.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench import full_size, shapes
from bench import step as steps
from bench.report import Report, options
from trainer.data.batches import MicroBatch
from trainer.engine.execution import without_new_compilation
from trainer.job import sizes
from trainer.spec.plan import Prompt

GIB = 2**30


def vae_of(folder: Path, family: str, *, small: bool) -> Any:
    """Writes the configs of a model into `folder`; returns its VAE with random weights."""
    skeleton: Any = full_size.write_configs(folder, family, {} if small else full_size.FULL[family])["vae"]
    config = dict(skeleton.config)
    if "latent_channels" in config:  # a miniature may have others than the denoiser
        config["latent_channels"] = steps.CHANNELS[family]
    with steps.random_weights(steps.DEVICE):
        vae = type(skeleton).from_config(config)
    return vae.float().eval().requires_grad_(False)


def draw_round(
    job: shapes.Job, vae: Any, folder: Path, prompts: list[Prompt], texts: list[dict[str, torch.Tensor]]
) -> dict[str, Any]:
    """Draw all prompts between two steps; seconds, and the hashes of the files."""
    seconds: list[float] = []
    saved: list[Future[str]] = []
    started = time.monotonic()
    with (
        job.runner.sampling(job.state.denoiser, vae),
        torch.no_grad(),
        without_new_compilation(),
        ThreadPoolExecutor(1) as thread,
    ):
        for prompt, text in zip(prompts, texts, strict=True):
            began = time.monotonic()
            image = job.family.sample(job.state.denoiser, vae, folder, prompt=prompt, text=text, negative=text)
            saved.append(thread.submit(_save, image, folder / "sample.png"))
            seconds.append(time.monotonic() - began)
        hashes = [writing.result() for writing in saved]
    row: dict[str, Any] = {"round_s": round(time.monotonic() - started, 2), "first_s": round(seconds[0], 2)}
    if len(seconds) > 1:
        row["others_s"] = round(sum(seconds[1:]) / (len(seconds) - 1), 2)
    return {**row, "hashes": hashes}


def _save(image: Image.Image, path: Path) -> str:
    """The hash of the file."""
    image.save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: list[str]) -> None:
    parser = options(__doc__)
    parser.add_argument("--limit", type=float, help="cap of the device's memory, in GiB")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="of the job")
    asked = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    family = asked.family
    base = asked.base or steps.base_of(family)
    plan = shapes.default_plan(base, asked.limit, 1, dict(s.split("=", 1) for s in asked.settings))
    side = 256 if asked.small else 1024
    epoch = shapes.epoch_of(2, 1, sides=(side,))
    job = shapes.Job(plan, epoch, small=asked.small)
    generator = torch.Generator().manual_seed(0)
    made = [shapes.micro_batch(plan, each, generator) for each in epoch]
    job.rehearse(epoch, made)
    facts = job.family.FACTS
    prompts = []
    for seed in range(asked.pictures):
        prompts.append(Prompt("", side, side, seed, facts.prompt_steps, facts.prompt_guidance, facts.prompt_cfg))
    texts = [on_device(made[seed % len(made)]) for seed in range(asked.pictures)]
    report = Report(f"{base}: samples, {asked.limit or 'all'} GiB", asked.markdown)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        vae = vae_of(folder, family, small=asked.small)
        if plan.engine.device == "cuda":  # as `trainer.engine.encoders.load_vae`
            vae = vae.half()
        if plan.engine.tile_vae:
            vae.enable_tiling()
        before: list[str] = []
        weights = [p.detach().clone() for p in job.state.optimizer_params]
        for number in range(asked.rounds):
            times = [time.monotonic(), *job.train(made)]
            with torch.no_grad():
                for p, value in zip(job.state.optimizer_params, weights, strict=True):
                    p.copy_(value)
            drawn = draw_round(job, vae, folder, prompts, texts)
            resumed = time.monotonic()
            next_s = next(iter(job.train(made[:1]))) - resumed
            hashes = drawn.pop("hashes")
            row = {"round": number + 1, "steps": facts.prompt_steps, **drawn}
            row |= {"step_s": round(times[-1] - times[-2], 4), "next_step_s": round(next_s, 4)}
            if before:
                row["same"] = before == hashes
            before = hashes
            if torch.cuda.is_available():
                row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
                row["captured"] = f"{len(getattr(job.runner, 'captured', ()))} of {len(sizes.one_of_each_size(epoch))}"
            report.row(row)


def on_device(batch: MicroBatch) -> dict[str, torch.Tensor]:
    """A batch's text, as samples get it."""
    return {name: tensor.to(steps.DEVICE) for name, tensor in batch.text.items()}
