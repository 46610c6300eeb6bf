"""A reader who types the commands of the README and the tutorial, and nothing else, gets what the pages promise."""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.document_commands import Reader, blocks, pattern
from tests.support.hub import Hub, read_folder
from tests.support.programs import ROOT, Programs
from trainer.spec.family import base_models

pytestmark = pytest.mark.timeout(900)

MINIATURE = "mini-sdxl"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub that has the miniature, as a model that must be downloaded."""
    with Hub() as running:
        running.add("model", "kiln/mini-sdxl", read_folder(Path(base_models()[MINIATURE][1].source)))
        yield running


def reader(place: Path, programs: Programs, hub: Hub, photographs: Path, **options: bool) -> Reader:
    """Somebody with sixteen photographs, a terminal in this repository, and no card."""
    found = Reader(place, programs, variables={"HF_ENDPOINT": hub.endpoint, "BACKEND": "cpu"}, **options)
    photos = found.home / "zot" / "photos"
    photos.mkdir(parents=True)
    for path in sorted(photographs.glob("*/*")):
        if path.suffix in (".jpg", ".txt"):
            shutil.copyfile(path, photos / f"{path.parent.name}-{path.name}")
    found.stand_in("make", f'exec {shutil.which("make")} -n -C "{ROOT}" "$@"')
    found.put(
        found.work / ".venv" / "bin" / "tensorboard", '#!/usr/bin/env bash\nset -e\nls "$2"/events.out.tfevents.*'
    )
    return found


def small(script: str, *, steps: int, more: int) -> str:
    """The commands with the miniature from the stand-in for the Hub in the place of SDXL, and fewer steps."""
    script = script.replace("--base sdxl", f"--base {MINIATURE}")
    script = script.replace("BASE_MODEL=sdxl", f"BASE_MODEL={MINIATURE} MODEL_PATH=kiln/mini-sdxl")
    script = re.sub(
        r"^(\S*python -m entrypoint *(#.*)?)$",
        rf"export PARAMS_MAX_STEPS={steps}\n\1",
        script,
        count=1,
        flags=re.MULTILINE,
    )
    script = script.replace("PARAMS_MAX_STEPS=2500", f"PARAMS_MAX_STEPS={more}")
    return re.sub(r"--d (\d)(\"?)( |$)", r"--d \1 --s 2\2\3", script, flags=re.MULTILINE)


def promised(document: str) -> list[str]:
    """The lines of logs that a document quotes."""
    found = []
    for block in blocks(document, "text"):
        found += [line for line in block.splitlines() if line.startswith(("INFO ", "WARNING ", "ERROR "))]
    return found


def follow_tutorial(found: Reader, *, steps: int, more: int) -> str:
    """Type all commands of the tutorial; returns what was printed."""
    code, printed = found.follow(small("\n".join(blocks("docs/tutorial.md")), steps=steps, more=more))
    assert code == 0, printed[-4000:]
    return printed


def check_results(found: Reader, printed: str, *, steps: int) -> None:
    """What the tutorial promises is there."""
    output = found.home / "zot" / "output"
    names = {path.name for path in output.iterdir()}
    assert {"zot.safetensors", f"zot-step{steps:08d}.safetensors", "zot-2.safetensors"} <= names
    assert (output / "sample" / "contact-sheet.png").is_file()
    assert (output / "runs" / "zot-2" / "sample" / "contact-sheet.png").is_file()
    assert (found.home / "zot" / "zot-comfyui.safetensors").is_file()
    assert len(list((found.home / "zot" / "drawn").glob("*.png"))) >= 1
    said = {pattern(line) for line in printed.splitlines()}
    assert [line for line in promised("docs/tutorial.md") if pattern(line) not in said] == []


def test_who_types_the_commands_of_the_tutorial_gets_a_lora(tmp_path, programs, hub, photographs):
    found = reader(tmp_path, programs, hub, photographs)
    printed = follow_tutorial(found, steps=2, more=3)
    check_results(found, printed, steps=2)
    assert hub.asked("/kiln/mini-sdxl/resolve/*/unet/*"), "the model comes from the Hub"


@pytest.mark.slow
def test_the_lora_of_the_tutorial_changes_what_is_drawn(tmp_path, programs, hub, photographs):
    """In interpreters of their own, and with enough steps that something is learnt."""
    found = reader(tmp_path, programs, hub, photographs, own_interpreter=True)
    printed = follow_tutorial(found, steps=60, more=80)
    check_results(found, printed, steps=60)
    draw = '.venv/bin/python -m trainer.sample --base mini-sdxl --prompt "zot, a photo of a dog --d 5 --s 8" --out '
    lora = "--lora ~/zot/output/zot.safetensors"
    code, printed = found.follow(f"{draw} ~/with {lora}\n{draw} ~/weak {lora}:0.0001\n")
    assert code == 0, printed
    drawn = [next((found.home / name).glob("*00.png")) for name in ("with", "weak")]
    pixels = [np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in drawn]
    assert np.abs(pixels[0] - pixels[1]).mean() > 2


# ---- README


def test_the_commands_of_the_readme(tmp_path, programs, hub, photographs):
    """`make` only says what it would do, and `docker` notes what it was asked for."""
    found = reader(tmp_path, programs, hub, photographs)
    (found.home / "zot" / "prompts.txt").write_text("zot --s 1\n", encoding="utf-8")
    found.variables["SAMPLE_PROMPTS"] = str(found.home / "zot" / "prompts.txt")
    found.stand_in("docker", 'printf "%s\\n" "$@" > "$HOME/docker.txt"')
    found.put(found.work / "build.sh", '#!/usr/bin/env bash\necho "$@" > "$HOME/build.txt"')
    script = small("\n".join(blocks("README.md")), steps=1, more=2)
    code, printed = found.follow(script)
    assert code == 0, printed[-4000:]
    assert len(list((found.home / "zot" / "output").glob("*.safetensors"))) >= 1
    words = (found.home / "docker.txt").read_text(encoding="utf-8").split("\n")
    target = (found.home / "build.txt").read_text(encoding="utf-8").strip()
    assert f"kiln:{VERSION}-{target}" in words, "docker runs the image that build.sh makes"
    mounted = words[words.index("-v") + 1].split(":")[1]
    assert f"DATASET_NAME={mounted}/photos" in words


def test_every_image_that_a_document_names_is_one_that_is_built():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for tag in re.findall(r"\bkiln(?:-worker)?:([\w.-]*\w)", path.read_text(encoding="utf-8")):
            assert re.fullmatch(rf"{re.escape(VERSION)}(-(cuda|cpu|rocm)(-flux)?)?", tag), f"{path.name}: {tag}"
