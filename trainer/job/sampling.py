"""Sample images during a job: prompts at fixed seeds, drawn with the weights so far.

Several processes draw a round together. The first one looks which samples are missing and tells the others
(`share_out`); of this list each draws every N-th one (`sample`), all at once. An image depends on its prompt, its seed
and the weights alone, and these have the same bits in all processes, so it does not matter who draws it. On the first
machine each is written to its place as soon as it is drawn; those of other machines come through the network at the end
of the round (`collect`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin

from trainer.data.cache import Cache
from trainer.data.decode import LARGEST_SAMPLE, read_sample
from trainer.engine.device import torch_dtype
from trainer.engine.encoders import load_vae
from trainer.engine.execution import without_new_compilation
from trainer.job.reporting.contact_sheet import contact_sheet
from trainer.spec.family import Family
from trainer.spec.plan import Plan, Prompt
from trainer.storage import atomic, json_files, own_files
from trainer.storage.own_files import SHEET_NAME
from trainer.storage.read import read_regular
from trainer.training.distributed import Workers
from trainer.training.objective import scheduler_changes
from trainer.training.state import TrainingState

log = logging.getLogger(__name__)
Wanted = list[tuple[float, int]]  # samples of a step: strength of the LoRA, number of the prompt


def share_out(
    step: int, folder: Path, *, prompts: Sequence[Prompt], strengths: Sequence[float], workers: Workers
) -> tuple[Path, Wanted]:
    """Where samples go, and those of `step` that the first process misses there; none after a stop.

    `folder`: of this process's run. All processes must call it, and all get the same samples.
    """
    found: Wanted = []
    if workers.is_first and not workers.notices_stop():
        found = missing(folder, prompts, step=step, strengths=strengths)
    told = json.loads(workers.from_process(0, json.dumps([str(folder), found]).encode()))
    of_first = Path(told[0])
    return of_first if workers.node == 0 else folder, [(strength, number) for strength, number in told[1]]


def missing(folder: Path, prompts: Sequence[Prompt], *, step: int, strengths: Sequence[float] = (1.0,)) -> Wanted:
    """The samples of `step` that `folder` lacks. What has the name of one and is not it is set aside."""
    found: Wanted = []
    for strength in strengths:
        for number, prompt in enumerate(prompts):
            path = folder / own_files.sample_name(step, number, strength)
            if not is_of(path, prompt):
                json_files.set_aside_unless(path, lambda _: False, "is damaged, or another image than this prompt's")
                found.append((strength, number))
    return found


def collect(step: int, folder: Path, wanted: Wanted, *, workers: Workers) -> int:
    """Bring what other machines have drawn of `wanted` to the first one; how many there are now in `folder`.

    All processes must call it. Each sample is looked for at the process whose share it was.
    """
    count = 0
    for place, (strength, number) in enumerate(wanted):
        path = folder / own_files.sample_name(step, number, strength)
        owner = place % workers.size
        if workers.node_of(owner) != 0:
            is_mine = owner == workers.process_rank and path.exists()
            content = workers.from_process(owner, read_regular(path, limit=LARGEST_SAMPLE) if is_mine else b"")
            if workers.is_first and content:
                with atomic.replacing(path) as temporary:
                    temporary.write_bytes(content)
        count += path.exists()
    return count


def sample(
    step: int,
    wanted: Wanted,
    *,
    plan: Plan,
    family: Family,
    training_state: TrainingState,
    cache: Cache,
    folder: Path,
    workers: Workers,
    check_in: Callable[[], None],
    around: Callable[[Any, Any], contextlib.AbstractContextManager[None]],
) -> None:
    """Draw this process's share of the samples `wanted` of `step` into `folder`, with the weights to use.

    Looks for a stop, and calls `check_in`, before each image. `around`: `EagerStep.sampling`. Raises
    torch.OutOfMemoryError; what is drawn by then stays, and is not drawn again.
    """
    started = time.monotonic()
    own = wanted[workers.process_rank :: workers.size]
    if not own:
        return
    device = plan.engine.device
    dtype = torch_dtype(plan.engine)
    model = Path(plan.model.path)

    def encoded(caption: str) -> dict[str, torch.Tensor]:
        cached = cache.load(cache.text_path(caption))
        on_device = {key: value[None].to(device, dtype) for key, value in cached.items()}
        return training_state.texts.encode_trained(on_device, [caption])

    def draw(vae: Any, prompt: Prompt) -> Image.Image:
        check_in()
        return family.sample(
            training_state.denoiser,
            vae,
            model,
            prompt=prompt,
            text=encoded(prompt.text),
            negative=encoded(prompt.negative),
            scheduler=scheduler_changes(plan.train),
        )

    vae = load_vae(family, model, plan.engine)
    with (
        around(training_state.denoiser, vae),
        training_state.inference_weights(),
        torch.no_grad(),
        without_new_compilation(),
        training_state.as_used(),
    ):
        count = 0
        for strength in dict.fromkeys(strength for strength, _ in own):
            numbers = [number for other, number in own if other == strength]
            with training_state.at_strength(strength):
                count += draw_all(
                    folder,
                    plan.prompts,
                    numbers,
                    step=step,
                    draw=partial(draw, vae),
                    stopped=workers.notices_stop,
                    strength=strength,
                )
    of_all = f"{count} of {len(wanted)}" if workers.size > 1 else str(count)
    log.info("Drew %s samples of step %d in %.1f s.", of_all, step, time.monotonic() - started)


def draw_all(
    folder: Path,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    *,
    step: int,
    draw: Callable[[Prompt], Image.Image],
    stopped: Callable[[], bool],
    strength: float = 1.0,
) -> int:
    """Draw the prompts of these numbers that have no image of `step` in `folder` yet; return how many.

    Each is written as step-00000100-00.png with its prompt in the PNG. `stopped` is asked before each. `strength`: of
    the LoRA, with which `draw` draws.
    """
    saved: list[Future[None]] = []
    with ThreadPoolExecutor(1, "png") as thread:  # an image is compressed while the next one is drawn
        for number in numbers:
            prompt = prompts[number]
            path = folder / own_files.sample_name(step, number, strength)
            if is_of(path, prompt):  # drawn before memory ran out
                continue
            if stopped():
                break
            saved.append(thread.submit(_save, draw(prompt), path, _png_info(prompt, step, strength)))
    for writing in saved:
        writing.result()
    return len(saved)


def _save(image: Image.Image, path: Path, info: PngImagePlugin.PngInfo) -> None:
    with atomic.replacing(path) as temporary:
        image.save(temporary, pnginfo=info)


def set_aside_outdated(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Move the images of prompts that have changed since into `folder`/earlier, so that no row shows two prompts."""
    moved = 0
    for path in sorted(folder.glob("step-*.png")):
        known = own_files.read_sample_name(path.name)
        if known is None:
            continue
        number = known[1]
        if number < len(prompts) and is_of(path, prompts[number]):
            continue
        earlier = folder / "earlier"
        earlier.mkdir(exist_ok=True)
        target = earlier / path.name
        copy = 1
        while os.path.lexists(target):
            copy += 1
            target = earlier / f"{path.stem}-{copy}.png"
        path.rename(target)
        moved += 1
    if moved:
        log.info("prompts.txt has changed: %d images of earlier prompts are in %s.", moved, folder / "earlier")
        if any(own_files.read_sample_name(path.name) for path in folder.iterdir()):
            contact_sheet(folder, prompts)
        elif own_files.is_sheet(folder / SHEET_NAME):
            (folder / SHEET_NAME).unlink()


def is_of(path: Path, prompt: Prompt) -> bool:
    """Whether the image was drawn with this prompt, its seed, size and all, as its own text chunk says."""
    return drawn_with(path) == _parameters(prompt)


def drawn_with(path: Path) -> str | None:
    """What an image says that it was drawn with; None where it says nothing, or is damaged."""
    image = read_sample(path)
    parameters = image.info.get("parameters") if image is not None else None
    return str(parameters) if parameters is not None else None


def _parameters(prompt: Prompt) -> str:
    """All that decides an image besides the weights, in A1111's format, which viewers of generated images show."""
    negative = f"\nNegative prompt: {prompt.negative}" if prompt.negative else ""
    return (
        f"{prompt.text}{negative}\nSteps: {prompt.steps}, CFG scale: {prompt.cfg}, Distilled CFG Scale: "
        f"{prompt.guidance}, Seed: {prompt.seed}, Size: {prompt.width}x{prompt.height}"
    )


def _png_info(prompt: Prompt, step: int, strength: float) -> PngImagePlugin.PngInfo:
    """A text chunk with everything, and each value in one of its own."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", _parameters(prompt))
    info.add_itxt("prompt_text", prompt.text)
    info.add_text("step", str(step))
    info.add_text("seed", str(prompt.seed))
    if strength != 1:
        info.add_text("lora_strength", f"{strength:g}")
    return info
