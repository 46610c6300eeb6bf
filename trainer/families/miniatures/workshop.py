"""Make all miniatures at the same time, in the time there is: `python -m trainer.families.miniatures.workshop`.

All parts begin at once: the autoencoders, the scenes, and the families, which wait for the scenes. Where an autoencoder
is a new one, its families begin after it; where it goes on, only its decoder changes, and none waits. Each part is a
process of `make` on one of the GPUs in turn. One that fails is started once more without compiling, and then without
CUDA graphs, for what is left of its time. At the end each family that came through has a sheet of samples
(`--archives`: DIR/sheets.png), and its folder is in one of DIR/models-1.tar, models-2.tar and so on:

    tar -xf DIR/models-1.tar -C trainer/families/miniatures

puts it in place. The exit code is that of nothing made (1), or 0.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from trainer.families.miniatures.make import VAE_OF, VAES, VIDEO, say, scenes_in
from trainer.families.miniatures.recipes import RECIPES

HOME = Path(__file__).parent
SCENES = "scenes"
LARGEST = 15 << 20  # bytes in one archive
LEAST = 45.0  # seconds in which another attempt can still learn something
ATTEMPTS = ((), ("--uncompiled",), ("--uncompiled", "--eager"))  # the flags of each


@dataclass(frozen=True)
class Task:
    """One part to make: its flags, the parts that it waits for, and its deadline on the monotonic clock."""

    part: str
    flags: tuple[str, ...]
    needs: tuple[str, ...]
    deadline: float


@dataclass(frozen=True)
class Attempt:
    """A running `make` for a task, the first, second or third (`number` 0 to 2)."""

    task: Task
    gpu: int
    number: int
    process: subprocess.Popen[bytes]


def gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` may be, one for each GPU; without one, a name that hides nothing."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named:
        return named.split(",")
    return [str(number) for number in range(max(torch.cuda.device_count(), 1))]


def start(task: Task, *, gpu: int, number: int = 0) -> Attempt:
    """Start `make` for a task, on one of the GPUs."""
    seconds = task.deadline - time.monotonic()
    command = [
        sys.executable,
        "-m",
        "trainer.families.miniatures.make",
        task.part,
        *task.flags,
        "--seconds",
        str(seconds),
        *ATTEMPTS[number],
    ]
    known = gpus()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": known[gpu % len(known)], "OMP_NUM_THREADS": "2"}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "2"  # all families compile at the same time
    return Attempt(task, gpu, number, subprocess.Popen(command, env=environment))  # noqa: S603


def run(tasks: Sequence[Task]) -> list[str]:
    """Run all tasks, each once what it needs has ended; return those that came through, in their order."""
    waiting = list(enumerate(tasks))
    running: list[Attempt] = []
    made: list[str] = []
    while waiting or running:
        busy = {attempt.task.part for attempt in running} | {task.part for _, task in waiting}
        for number, task in [entry for entry in waiting if busy.isdisjoint(entry[1].needs)]:
            waiting.remove((number, task))
            running.append(start(task, gpu=number))
        time.sleep(0.2)
        for attempt in [some for some in running if some.process.poll() is not None]:
            running.remove(attempt)
            code = attempt.process.returncode
            left = attempt.task.deadline - time.monotonic()
            say(f"{attempt.task.part}: exit code {code}, {left:.0f} s left")
            if code == 0:
                made.append(attempt.task.part)
            elif attempt.number + 1 < len(ATTEMPTS) and left > LEAST:
                running.append(start(attempt.task, gpu=attempt.gpu, number=attempt.number + 1))
    return [task.part for task in tasks if task.part in made]


def sheets(names: Sequence[str], out: Path, folder: Path) -> None:
    """Sample from each model and put all sheets into one image, in the order of `names`."""
    running = []
    for number, name in enumerate(names):
        flags = ("--source", str(out / name), "--out", str(folder / f"{name}.png"))
        running.append(start(Task("sheet", flags, (), 0.0), gpu=number))
    codes = [attempt.process.wait() for attempt in running]
    pages = [folder / f"{name}.png" for name, code in zip(names, codes, strict=True) if code == 0]
    if not pages:
        return
    images = [Image.open(page).convert("RGB") for page in pages]
    whole = Image.new("RGB", (images[0].width, sum(image.height for image in images)))
    for row, image in enumerate(images):
        whole.paste(image, (0, row * image.height))
    whole.save(folder / "sheets.png")
    for page in pages:
        page.unlink()


def pack(names: Sequence[str], out: Path, folder: Path) -> None:
    """Put the families' folders into as few archives of at most `LARGEST` bytes as their order allows."""
    number = 0
    room = 0
    for name in names:
        size = sum(file.stat().st_size for file in (out / name).rglob("*") if file.is_file())
        if number == 0 or size > room:
            number += 1
            room = LARGEST
        room -= size
        with tarfile.open(folder / f"models-{number}.tar", "a", dereference=True) as archive:
            archive.add(out / name, arcname=name)


def needed(name: str, new: Sequence[str]) -> tuple[str, ...]:
    """The new autoencoder that a family waits for, if any: the one of videos has the latents of `vae16`."""
    vae = VAE_OF.get(name, "vae16")
    if vae == VIDEO:
        vae = "vae16"
    return (vae,) if vae in new else ()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="workshop", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HOME, help="where the folders of the models go")
    parser.add_argument("--source", type=Path, default=HOME, help="the models there are already")
    parser.add_argument("--archives", type=Path, required=True, help="where archives and sheets go")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all, but for writing it and the sheets")
    parser.add_argument("--vae-seconds", type=float, default=200.0, help="of them for the autoencoders")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="families")
    parser.add_argument("--vaes", nargs="*", choices=list(VAES), default=list(VAES), help="autoencoders")
    parser.add_argument("--resume", nargs="*", default=[], help="parts that go on from the weights in --source")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--small", action="store_true", help="little data and small batches: to see that it runs")
    chosen = parser.parse_args()
    chosen.archives.mkdir(parents=True, exist_ok=True)
    flags = ["--out", str(chosen.out), "--source", str(chosen.source), "--batch", str(chosen.batch)]
    if chosen.small:
        flags.append("--small")
    begun = time.monotonic()
    shutil.rmtree(scenes_in(chosen.out), ignore_errors=True)  # of a run before

    def task(part: str, needs: tuple[str, ...], deadline: float) -> Task:
        own = [*flags, "--resume"] if part in chosen.resume else flags
        return Task(part, tuple(own), needs, deadline)

    tasks = [task(SCENES, (), begun + chosen.seconds)]
    tasks += [task(vae, (), begun + chosen.vae_seconds) for vae in chosen.vaes]
    new = [vae for vae in chosen.vaes if vae not in chosen.resume]
    for name in chosen.only:
        family = task(name, needed(name, new), begun + chosen.seconds)
        tasks.append(replace(family, flags=(*family.flags, "--wait")))
    made = [part for part in run(tasks) if part in chosen.only]
    pack(made, chosen.out, chosen.archives)
    sheets(made, chosen.out, chosen.archives)
    say(f"made {', '.join(made) or 'nothing'} in {time.monotonic() - begun:.0f} s")
    sys.exit(0 if made else 1)


if __name__ == "__main__":
    main()
