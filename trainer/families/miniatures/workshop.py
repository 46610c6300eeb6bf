"""Make all miniatures at the same time, in the time there is: `python -m trainer.families.miniatures.workshop`.

First the autoencoders, then the families, each a process of `make` on one of the GPUs in turn. A process that fails is
started once more without CUDA graphs, for what is left of its time. At the end each family that came through has a
sheet of samples (`--archives`: DIR/sheets.png), and its folder is in one of DIR/models-1.tar, models-2.tar and so on:

    tar -xf DIR/models-1.tar -C trainer/families/miniatures

puts it in place. The exit code is that of nothing made (1), or 0.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from trainer.families.miniatures.make import say
from trainer.families.miniatures.recipes import RECIPES

HOME = Path(__file__).parent
VAES = ("vae16", "vae4", "vae_video")
LARGEST = 15 << 20  # bytes in one archive
LEAST = 45.0  # seconds in which a second attempt can still learn something


@dataclass
class Attempt:
    """A running `make`, and what it was asked for."""

    part: str
    gpu: int
    eager: bool
    process: subprocess.Popen[bytes]


def start(part: str, flags: Sequence[str], *, gpu: int, eager: bool) -> Attempt:
    """Start `make` for one part, on one of the GPUs."""
    command = [sys.executable, "-m", "trainer.families.miniatures.make", part, *flags]
    if eager:
        command.append("--eager")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "2"}
    return Attempt(part, gpu, eager, subprocess.Popen(command, env=environment))  # noqa: S603


def run(parts: dict[str, list[str]], *, seconds: float) -> list[str]:
    """Run `make` for these parts, each with its flags, for `seconds`; return those that came through."""
    deadline = time.monotonic() + seconds
    gpus = max(torch.cuda.device_count(), 1)
    running = []
    for number, (part, flags) in enumerate(parts.items()):
        running.append(start(part, [*flags, "--seconds", str(seconds)], gpu=number % gpus, eager=False))
    made = []
    while running:
        time.sleep(0.5)
        for attempt in [some for some in running if some.process.poll() is not None]:
            running.remove(attempt)
            code = attempt.process.returncode
            left = deadline - time.monotonic()
            say(f"{attempt.part}: exit code {code}, {left:.0f} s left")
            if code == 0:
                made.append(attempt.part)
            elif not attempt.eager and left > LEAST:
                again = [*parts[attempt.part], "--seconds", str(left)]
                running.append(start(attempt.part, again, gpu=attempt.gpu, eager=True))
    return [part for part in parts if part in made]


def sheets(names: Sequence[str], out: Path, folder: Path) -> None:
    """Sample from each model and put all sheets into one image, in the order of `names`."""
    gpus = max(torch.cuda.device_count(), 1)
    running = []
    for number, name in enumerate(names):
        flags = ["--source", str(out / name), "--out", str(folder / f"{name}.png")]
        running.append(start("sheet", flags, gpu=number % gpus, eager=False))
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="workshop", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HOME, help="where the folders of the models go")
    parser.add_argument("--source", type=Path, default=HOME, help="the models there are already")
    parser.add_argument("--archives", type=Path, required=True, help="where archives and sheets go")
    parser.add_argument("--seconds", type=float, default=280.0, help="for the families")
    parser.add_argument("--vae-seconds", type=float, default=110.0, help="for the autoencoders; 0: as they are")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--resume", nargs="*", default=[], help="parts that go on from the weights in --source")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--small", action="store_true", help="little data and small batches: to see that it runs")
    chosen = parser.parse_args()
    chosen.archives.mkdir(parents=True, exist_ok=True)
    flags = ["--out", str(chosen.out), "--source", str(chosen.source), "--batch", str(chosen.batch)]
    if chosen.small:
        flags.append("--small")
    begun = time.monotonic()
    asked = {part: [*flags, *(["--resume"] if part in chosen.resume else [])] for part in (*VAES, *chosen.only)}
    if chosen.vae_seconds:
        run({part: asked[part] for part in VAES}, seconds=chosen.vae_seconds)
    made = run({name: asked[name] for name in chosen.only}, seconds=chosen.seconds)
    pack(made, chosen.out, chosen.archives)
    sheets(made, chosen.out, chosen.archives)
    say(f"made {', '.join(made) or 'nothing'} in {time.monotonic() - begun:.0f} s")
    sys.exit(0 if made else 1)


if __name__ == "__main__":
    main()
