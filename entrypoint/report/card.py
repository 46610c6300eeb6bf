"""README.md: the model card, in the form that the Hub reads and Civitai's readers know."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from urllib.parse import quote

from entrypoint.report import usage
from entrypoint.report.gather import NO_STEP, Gathered, Sample
from entrypoint.report.sections import settings
from trainer.spec.family import Licence
from trainer.spec.log_lines import escaped
from trainer.storage.own_files import SHEET_NAME
from trainer.storage.read import read_text

NAME = "README.md"
MOST_WIDGETS = 8  # images in the Hub's gallery
LARGEST = 1 << 24  # bytes
# The last line: with it a card is told from one that somebody has edited, which is never replaced.
SEAL = re.compile(r"<!-- Kiln wrote this card: ([0-9a-f]{16}) -->\n\Z")


def card(run: Gathered, *, samples: str | None, base: str = "", place: str = ".") -> str:
    """The whole file. `samples`: the folder of the samples, seen from the card; None: it has none. `base`: the base
    model's repository on the Hub, where the files do not say it. `place`: what diffusers loads the file from.
    """
    base = base or run.base_repository
    trigger = ", ".join(run.triggers)
    shown = _newest(run) if samples else []
    lines = ["---", _front_matter(run, base=base, trigger=trigger, samples=samples or "", shown=shown).strip(), "---"]
    lines += ["", f"# {_plain(run.name)}", ""]
    model = f"[{base}](https://huggingface.co/{base})" if base else _plain(run.base_name or "a local model")
    rank, steps, images = (run.header.get(key, "?") for key in ("ss_network_dim", "ss_steps", "ss_num_train_images"))
    lines.append(f"A LoRA of rank {rank} for {model}: {steps} steps on {images} images, repeats included.")
    if shown:
        lines += ["", "<Gallery />"]
    if trigger:
        lines += ["", "## Trigger word", "", f"Begin the prompt with `{_code(trigger)}`."]
    lines += ["", "## Use it", "", *_uses(run, place)]
    licence = run.base.licence if run.base else None
    lines += ["", "## Licence", "", _licence_line(licence, base=base)]
    if samples:
        lines += ["", "## Samples", "", f"![samples by prompt and step]({quote(f'{samples}/{SHEET_NAME}')})", ""]
        lines += [f"{sample.number + 1}. {_plain(sample.prompt)} ({_plain(sample.settings)})" for sample in shown]
    if run.plan is not None:
        rows = [(name, value) for name, value in settings(run.plan) if value not in ("", None)]
        lines += ["", "## Settings", "", "| setting | value |", "| --- | --- |"]
        lines += [f"| {name} | {_plain(str(value))} |" for name, value in rows]
    lines += ["", "Trained with Kiln.", ""]
    text = "\n".join(lines)
    return f"{text}<!-- Kiln wrote this card: {_digest(text)} -->\n"


def is_own(path: Path) -> bool:
    """Whether a file is a card that Kiln wrote and nobody has edited."""
    try:
        text = read_text(path, limit=LARGEST)
    except (OSError, ValueError):
        return False
    seal = SEAL.search(text)
    return seal is not None and seal[1] == _digest(text[: seal.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _newest(run: Gathered) -> list[Sample]:
    """The samples of the newest step."""
    last = max((sample.step for sample in run.samples), default=NO_STEP)
    return [sample for sample in run.samples if sample.step == last]


def _front_matter(run: Gathered, *, base: str, trigger: str, samples: str, shown: list[Sample]) -> str:
    from huggingface_hub import ModelCardData  # late: it takes a moment, and only a card needs it

    licence = run.base.licence if run.base else None
    tags = ["text-to-image", "lora", "diffusers", "template:sd-lora"]
    widgets = []
    for sample in shown[:MOST_WIDGETS]:
        widgets.append({"text": sample.prompt or "-", "output": {"url": quote(f"{samples}/{sample.path.name}")}})
    data = ModelCardData(
        base_model=base or None,
        base_model_relation="adapter" if base else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence.id if licence else None,
        license_name=licence.name if licence and licence.id == "other" else None,
        license_link=licence.link if licence and licence.id == "other" else None,
        tags=[*tags, *(run.facts.hub_tags if run.facts else ())],
        instance_prompt=trigger or None,
        widget=widgets or None,
    )
    return str(data.to_yaml())


def _licence_line(licence: Licence | None, *, base: str) -> str:
    if licence:
        return f"The base model's applies: [{licence.name}]({licence.link}). {licence.allows}"
    return "The base model's licence applies." if base else "The base model's licence applies to this LoRA too."


def _uses(run: Gathered, place: str) -> list[str]:
    lines = []
    if run.final is not None:
        name, stem = _code(run.final.path.name), _code(run.final.path.stem)
        lines.append(f"- **ComfyUI:** copy `{name}` to `models/loras` and load it with *Load LoRA*.")
        lines.append(f"- **Forge, A1111:** copy it to `models/Lora` and write `<lora:{stem}:1>` into the prompt.")
        lines.append("- **Strength:** start with 1, and lower it to 0.6 where the LoRA is too strong.")
    code = usage.diffusers_code(run, place=place)
    if code:
        fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall("`+", code)), default=0))
        lines += ["- **diffusers:**", "", f"{fence}python", *escaped(code).splitlines(), fence]
    elif run.loras:
        file = json.dumps(usage.diffusers_file(run) or run.loras[-1].path.name, ensure_ascii=False)
        lines += ["- **diffusers:**", "", f"      pipe.load_lora_weights({json.dumps(place)}, weight_name={file})"]
    return lines


def _plain(text: str) -> str:
    """A text from outside on one line of Markdown, in which nothing of it is markup."""
    line = " ".join(escaped(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", line)


def _code(text: str) -> str:
    """For inside of backquotes."""
    return " ".join(escaped(text).split()).replace("`", "")
