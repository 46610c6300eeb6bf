"""README.md: the model card, in the form that the Hub reads and Civitai's readers know."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from urllib.parse import quote

from entrypoint.report import usage
from entrypoint.report.elements import is_blank
from entrypoint.report.gather import NO_STEP, Gathered, Sample
from entrypoint.report.sections import settings
from trainer.spec.family import Licence
from trainer.spec.log_lines import escaped
from trainer.spec.plan import Plan
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
    shown: list[Sample] = []
    if samples:
        shown = _newest(run)
    front = _front_matter(run, base=base, trigger=trigger, samples=samples or "", shown=shown)
    lines = ["---", front.strip(), "---", "", f"# {_plain(run.name)}", "", _subject(run, base)]
    if shown:
        lines += ["", "<Gallery />"]
    if trigger:
        lines += ["", "## Trigger word", "", f"Begin the prompt with `{_code(trigger)}`."]
    lines += ["", "## Use it", "", *_uses(run, place)]
    lines += ["", "## Licence", "", _licence_line(_licence(run), base=base)]
    if samples:
        lines += ["", "## Samples", "", *_sheet(samples, shown)]
    if run.plan is not None:
        lines += ["", "## Settings", "", *_settings_table(run.plan)]
    lines += ["", "Trained with Kiln.", ""]
    text = "\n".join(lines)
    return f"{text}<!-- Kiln wrote this card: {_digest(text)} -->\n"


def _subject(run: Gathered, base: str) -> str:
    """What it is, and of how much it was made. `base`: the base model's repository; "": it has none."""
    model = _plain(run.base_name or "a local model")
    if base:
        model = f"[{base}](https://huggingface.co/{base})"
    rank = run.header.get("ss_network_dim", "?")
    steps = run.header.get("ss_steps", "?")
    images = run.header.get("ss_num_train_images", "?")
    return f"A LoRA of rank {rank} for {model}: {steps} steps on {images} images, repeats included."


def _sheet(samples: str, shown: list[Sample]) -> list[str]:
    """The contact sheet, and below it a line for each sample of the newest step."""
    lines = [f"![samples by prompt and step]({quote(f'{samples}/{SHEET_NAME}')})", ""]
    for sample in shown:
        lines.append(f"{sample.number + 1}. {_plain(sample.prompt)} ({_plain(sample.settings)})")
    return lines


def _settings_table(plan: Plan) -> list[str]:
    lines = ["| setting | value |", "| --- | --- |"]
    for name, value in settings(plan):
        if not is_blank(value):
            lines.append(f"| {name} | {_plain(str(value))} |")
    return lines


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
    """What the Hub reads."""
    from huggingface_hub import ModelCardData  # late: it takes a moment, and only a card needs it

    tags = ["text-to-image", "lora", "diffusers", "template:sd-lora"]
    if run.facts:
        tags += run.facts.hub_tags
    widgets = []
    for sample in shown[:MOST_WIDGETS]:
        widgets.append({"text": sample.prompt or "-", "output": {"url": quote(f"{samples}/{sample.path.name}")}})
    licence = _licence(run)
    licence_id, licence_name, licence_link = None, None, None
    if licence:
        licence_id = licence.id
    if licence and licence.id == "other":  # one that the Hub has no word for
        licence_name, licence_link = licence.name, licence.link
    data = ModelCardData(
        base_model=base or None,
        base_model_relation="adapter" if base else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence_id,
        license_name=licence_name,
        license_link=licence_link,
        tags=tags,
        instance_prompt=trigger or None,
        widget=widgets or None,
    )
    return str(data.to_yaml())


def _licence(run: Gathered) -> Licence | None:
    """The base model's; None where nobody knows it."""
    if run.base is None:
        return None
    return run.base.licence


def _licence_line(licence: Licence | None, *, base: str) -> str:
    if licence:
        return f"The base model's applies: [{licence.name}]({licence.link}). {licence.allows}"
    if base:
        return "The base model's licence applies."
    return "The base model's licence applies to this LoRA too."


def _uses(run: Gathered, place: str) -> list[str]:
    lines = []
    if run.final is not None:
        name, stem = _code(run.final.path.name), _code(run.final.path.stem)
        lines.append(f"- **ComfyUI:** copy `{name}` to `models/loras` and load it with *Load LoRA*.")
        lines.append(f"- **Forge, A1111:** copy it to `models/Lora` and write `<lora:{stem}:1>` into the prompt.")
        lines.append("- **Strength:** start with 1, and lower it to 0.6 where the LoRA is too strong.")
    code = usage.diffusers_code(run, place=place)
    if code:
        fence = _fence(code)
        lines += ["- **diffusers:**", "", f"{fence}python", *escaped(code).splitlines(), fence]
    elif run.loras:
        file = json.dumps(usage.diffusers_file(run) or run.loras[-1].path.name, ensure_ascii=False)
        lines += ["- **diffusers:**", "", f"      pipe.load_lora_weights({json.dumps(place)}, weight_name={file})"]
    return lines


def _fence(code: str) -> str:
    """Backquotes around code: more than it has side by side, and at least three."""
    count = 3
    for ticks in re.findall("`+", code):
        count = max(count, len(ticks) + 1)
    return "`" * count


def _plain(text: str) -> str:
    """A text from outside on one line of Markdown, in which nothing of it is markup."""
    line = " ".join(escaped(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", line)


def _code(text: str) -> str:
    """For inside of backquotes."""
    return " ".join(escaped(text).split()).replace("`", "")
