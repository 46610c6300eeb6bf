"""The parts of report.html."""

from __future__ import annotations

import datetime
import html
import importlib.metadata
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from entrypoint.report import usage
from entrypoint.report.charts import Chart, Line, Point, smoothed
from entrypoint.report.elements import bullets, clock_if_known, number, pairs, quiet, table, text
from entrypoint.report.gather import NO_STEP, Gathered, LoraFile, Sample
from entrypoint.report.samples import data_address, thumbnail
from trainer import __version__
from trainer.spec.messages import noise_bands
from trainer.spec.messages.usage import prompting
from trainer.spec.plan import AUTO, Plan
from trainer.storage.atomic import human_size

MOST_STEPS = 12  # of samples, as columns: more are chosen evenly
MOST_ROWS = 200  # of images in the table; dataset-report.csv has all
MOST_CAPTION = 400  # characters
WIDTHS = ((40, 320), (90, 224), (10**9, 144))  # up to so many samples: pixels of each
MOST_EMBEDDED = 6 * 2**20  # bytes of JPEG in all
SMALL_WIDTH = 96  # pixels of a sample beside its LoRA file
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


# ---- the beginning


def headline(run: Gathered, *, price: float | None) -> str:
    """What was trained, how it ended, and the numbers that people look for first."""
    cells = []
    for name, value in _first_facts(run, price=price):
        if value:
            cells.append(f"<div><dt>{text(name)}<dd>{text(value)}</div>")
    return f"<h1>{text(run.name)}</h1>{_ending(run)}<dl class=facts>{''.join(cells)}</dl>"


def _first_facts(run: Gathered, *, price: float | None) -> list[tuple[str, str]]:
    rows = []
    if run.final:
        rows.append(("LoRA", f"{run.final.path.name}, {human_size(run.final.bytes)}"))
    if run.triggers:
        rows.append(("Trigger word", ", ".join(run.triggers)))
    if run.total:
        rows.append(("Steps", f"{run.done:,} of {run.total:,}"))
    elif run.done:
        rows.append(("Steps", f"{run.done:,}"))
    seconds = run.start_seconds()
    rows.append(("Time", clock_if_known(seconds)))
    if price and seconds:
        rows.append(("Cost", f"{price * seconds / 3600:.2f} at {price:g} an hour"))
    losses = _column(run, "loss")
    if losses:
        _, last = smoothed(losses)[-1]
        found = run.risen()
        rows.append(("Loss, smoothed", f"{last:.4f}; {found}" if found else f"{last:.4f}"))
    if run.validations:
        _, newest = run.validations[-1]
        step, least = min(run.validations, key=lambda validation: validation[1])
        rows.append(("Validation loss", f"{newest:.4f}; least {least:.4f} at step {step:,}"))
    return rows


def _ending(run: Gathered) -> str:
    """A badge, what was trained, and where it did not end well the reason."""
    badge, words = _badge(run)
    parts = [f"<p><span class='badge {badge}'>{text(words)}</span> {text(_subject(run))}</p>"]
    phase = run.status.get("phase")
    message = str(run.status.get("message", ""))
    if message and phase != "done":
        parts.append(f"<p class=message>{text(message)}</p>")
    saved = run.status.get("saved_step")
    if phase in ("stopped", "failed") and saved:
        parts.append(f"<p>The state of step {text(saved)} is saved: the same command goes on from there.</p>")
    return "".join(parts)


def _badge(run: Gathered) -> tuple[str, str]:
    """The class of the page and the words for how it ended."""
    phase = run.status.get("phase")
    if phase == "done":
        return "good", "Finished"
    if phase == "stopped":
        return "odd", f"Stopped after step {run.done:,}"
    if phase == "failed" and run.done:
        return "bad", f"Failed after step {run.done:,}"
    if phase == "failed":
        return "bad", "Failed before the first step"
    if phase:
        return "odd", f"Not finished: {phase}"
    return "odd", "Not finished"


def _subject(run: Gathered) -> str:
    model = run.base_repository or run.base_name
    if not model:
        return "A LoRA."
    rank: object = run.header.get("ss_network_dim")
    if not rank and run.plan:
        rank = run.plan.lora.rank
    if not rank:
        return f"A LoRA for {model}."
    return f"A LoRA of rank {rank} for {model}."


def how_to_use(run: Gathered) -> str:
    """Where the LoRA goes in each program."""
    if run.final is None:
        return ""
    name = run.final.path.name
    lines = [
        f"<p>{text(prompting(run.triggers))}</p>",
        f"<p><b>ComfyUI:</b> copy <code>{text(name)}</code> to <code>models/loras</code>. "
        f"<b>Forge, A1111:</b> to <code>models/Lora</code>, and write "
        f"<code>&lt;lora:{text(run.final.path.stem)}:1&gt;</code> into the prompt.</p>",
    ]
    code = usage.diffusers_code(run, place=".")
    if code:
        lines.append(f"<p><b>diffusers</b>, in the folder of the file:</p><pre><code>{text(code)}</code></pre>")
    if run.base and run.base.licence:
        licence = run.base.licence
        link = f'<a rel="noopener noreferrer" href="{html.escape(licence.link)}">{text(licence.name)}</a>'
        lines.append(f"<p><b>Licence of the base model:</b> {link}. {text(licence.allows)}</p>")
    return "".join(lines)


# ---- samples


def sample_grid(run: Gathered) -> str:
    """A row for each prompt, a column for each step, and after them the strengths."""
    if not run.samples:
        return ""
    every = {sample.step for sample in run.samples}
    steps = chosen_steps(every)
    rows = _by_prompt(run, steps)
    width = _width(sum(len(row) for row in rows))
    left = MOST_EMBEDDED
    parts = []
    for row in rows:
        cells = []
        for sample in row:
            jpeg = thumbnail(sample.path, width)
            left -= len(jpeg)
            if left <= 0:
                jpeg = b""
            cells.append(_sample_cell(sample, jpeg))
        parts.append(
            f"<section class=prompt><h3>{text(row[0].prompt)}</h3>{quiet(text(row[0].settings))}"
            f"<div class=strip tabindex=0>{''.join(cells)}</div></section>"
        )
    if len(every) > len(steps):
        parts.append(quiet(f"{len(steps)} of {len(every)} steps are shown; sample/ has all of them."))
    return "".join(parts)


def _by_prompt(run: Gathered, steps: Sequence[int]) -> list[list[Sample]]:
    """The samples of these steps: by prompt, and then by step; then those of other strengths, the weakest first."""
    shown: dict[int, list[Sample]] = {}
    for sample in sorted(run.samples, key=lambda sample: sample.step):
        if sample.step in steps:
            shown.setdefault(sample.number, []).append(sample)
    for sample in sorted(run.at_strengths, key=lambda sample: sample.strength):
        if sample.number in shown:
            shown[sample.number].append(sample)
    return [shown[number_of_prompt] for number_of_prompt in sorted(shown)]


def _width(count: int) -> int:
    """Pixels of each sample, of so many."""
    for most, pixels in WIDTHS:
        if count <= most:
            return pixels
    raise AssertionError("WIDTHS has a row for every number of samples")


def _sample_cell(sample: Sample, jpeg: bytes) -> str:
    label = "before training"
    if sample.step > 0:
        label = f"step {sample.step:,}"
    if sample.strength != 1:
        label += f", strength {sample.strength:g}"
    image = f"<span class=missing>{text(sample.path.name)}</span>"
    if jpeg:
        alternative = f"{label}: {sample.prompt}"
        image = f'<img alt="{text(alternative)}" src="{data_address(jpeg)}">'
    return f"<figure>{image}<figcaption>{text(label)}</figcaption></figure>"


def chosen_steps(steps: Iterable[int]) -> list[int]:
    """At most `MOST_STEPS` of them, evenly, with the first and the last."""
    ordered = sorted(steps)
    if len(ordered) <= MOST_STEPS:
        return ordered
    apart = (len(ordered) - 1) / (MOST_STEPS - 1)
    return [ordered[round(i * apart)] for i in range(MOST_STEPS)]


# ---- curves and checkpoints


def _column(run: Gathered, name: str) -> list[Point]:
    """One of the numbers of each step, where the step has it."""
    points = []
    for row in run.steps:
        if name in row:
            points.append((row["step"], row[name]))
    return points


def curves(run: Gathered) -> str:
    """Loss, learning rate, size of the gradient."""
    losses = _column(run, "loss")
    rates = _column(run, "lr")
    saves = [file.step for file in run.loras if file.step != NO_STEP]
    loss_lines = [Line("of each step", "raw", losses), Line("smoothed", "smooth", smoothed(losses))]
    if run.validations:
        validations = [(float(step), loss) for step, loss in run.validations]
        loss_lines.append(Line("validation", "held", validations, dots=True))
    charts = [
        Chart("Loss", loss_lines, marks=saves),
        Chart("Loss by noise level, smoothed", _by_noise(run), marks=saves),
        Chart("Learning rate", [Line("learning rate", "plain", rates)], logarithmic=_spans_decades(rates)),
        Chart("Size of the gradient", [Line("gradient", "plain", _column(run, "grad_norm"))]),
    ]
    parts = []
    for chart in charts:
        drawing = chart.svg()
        if drawing:
            caption = f"<figcaption>{text(chart.title)} {_legend(chart)}</figcaption>"
            parts.append(f"<figure class=chart>{caption}{drawing}</figure>")
    if parts and saves:
        parts.append(quiet("Vertical lines: saves. The numbers of every step are in metrics.jsonl."))
    skipped = max((int(count) for _, count in _column(run, "skipped")), default=0)
    if skipped:
        parts.append(f"<p>{skipped} steps were skipped, because their numbers were not finite or far off.</p>")
    return "".join(parts)


def _by_noise(run: Gathered) -> list[Line]:
    """A curve for each band of noise levels."""
    lines = []
    for place, key in enumerate(noise_bands.KEYS):
        points = _column(run, key)
        if points:
            lines.append(Line(noise_bands.label(key), f"band{place}", smoothed(points)))
    return lines


def _legend(chart: Chart) -> str:
    """The names of the lines, where there are several."""
    if len(chart.lines) < 2:
        return ""
    names = []
    for line in chart.lines:
        names.append(f"<span class='key {line.style}'>{text(line.name)}</span>")
    return "".join(names)


def _spans_decades(points: Sequence[Point]) -> bool:
    values = [value for _, value in points if value > 0]
    return bool(values) and max(values) / min(values) > 100


def checkpoints(run: Gathered) -> str:
    """Each LoRA file with what is known of its step, the least validation loss marked."""
    if not run.loras:
        return ""
    losses = dict(smoothed(_column(run, "loss")))
    held_out = dict(run.validations)
    of_files: list[float | None] = [_newest_until(held_out, _step_of(file, run)) for file in run.loras]
    least = min((loss for loss in of_files if loss is not None), default=None)
    images = _first_samples(run)
    if len(run.loras) > 2 * MOST_STEPS:
        images = {}
    lines = []
    for file, held_out_loss in zip(run.loras, of_files, strict=True):
        step = _step_of(file, run)
        style = ""
        if held_out_loss is not None and held_out_loss == least:
            style = " class=best"
        lines.append(
            f"<tr{style}><td class=number>{step:,}<td><code>{text(file.path.name)}</code><td>{human_size(file.bytes)}"
            f"<td class=number>{number(losses.get(step))}<td class=number>{number(held_out_loss)}"
            f"<td>{_small(images.get(step))}"
        )
    head = [
        *("<th class=number>step", "<th>file", "<th>size"),
        *("<th class=number>loss, smoothed", "<th class=number>validation loss", "<th>first sample"),
    ]
    shown = table(head, lines)
    if least is not None:
        shown += quiet("Coloured: the least validation loss.")
    return shown


def _step_of(file: LoraFile, run: Gathered) -> int:
    if file.step == NO_STEP:
        return run.done
    return file.step


def _newest_until(held_out: Mapping[int, float], step: int) -> float | None:
    """The last validation up to a step."""
    before = [known for known in held_out if known <= step]
    if not before:
        return None
    return held_out[max(before)]


def _first_samples(run: Gathered) -> dict[int, Sample]:
    """By step, the sample of the first prompt."""
    first = min((sample.number for sample in run.samples), default=0)
    found = {}
    for sample in run.samples:
        if sample.number == first:
            found[sample.step] = sample
    return found


def _small(sample: Sample | None) -> str:
    if sample is None:
        return ""
    jpeg = thumbnail(sample.path, SMALL_WIDTH)
    if not jpeg:
        return ""
    return f'<img class=small alt="" src="{data_address(jpeg)}">'


# ---- dataset, plan, versions


def dataset(run: Gathered) -> str:
    """What became of the images: the counts and notes, what was skipped or cut, and a table."""
    if not run.images and not run.dataset_lines:
        return ""
    lines = [without_places(run, line) for line in run.dataset_lines]
    counts = "".join(lines[:1])
    parts = [f"<p>{text(counts)}</p>", bullets(line.strip() for line in lines[1:])]
    odd, others = _by_oddity(run.images)
    shown = [*odd, *others][:MOST_ROWS]
    rows = []
    for place, row in enumerate(shown):
        rows.append(_image_row(row, is_odd=place < len(odd)))
    if rows:
        head = ("image", "status", "size", "trained at", "repeats", "caption as trained", "note")
        parts.append(table([f"<th>{name}" for name in head], rows))
    more = len(run.images) - len(shown)
    if more:
        parts.append(quiet(f"{more:,} more are in dataset-report.csv."))
    return "".join(parts)


def _by_oddity(images: Iterable[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """What was skipped, and after it what was cut; and all others."""
    skipped, cut, others = [], [], []
    for row in images:
        if row.get("status") == "skipped":
            skipped.append(row)
        elif row.get("cut_at"):
            cut.append(row)
        else:
            others.append(row)
    return [*skipped, *cut], others


def _image_row(row: Mapping[str, str], *, is_odd: bool) -> str:
    size = ""
    if row.get("width"):
        size = f"{row.get('width')}×{row.get('height')}"
    caption = row.get("trained caption") or row.get("caption") or ""
    if len(caption) > MOST_CAPTION:
        caption = f"{caption[:MOST_CAPTION]}…"
    notes = []
    if row.get("reason"):
        notes.append(row["reason"])
    if row.get("cut_at"):
        notes.append(f"not read from “{row['cut_at']}” on")
    style = ""
    if is_odd:
        style = " class=odd"
    return (
        f"<tr{style}><td>{text(row.get('file', ''))}<td>{text(row.get('status', ''))}<td>{text(size)}"
        f"<td>{text(row.get('bucket', ''))}<td>{text(row.get('repeats', ''))}"
        f"<td class=long>{text(caption)}<td class=long>{text('; '.join(notes))}"
    )


def _places(run: Gathered) -> list[str]:
    """Folders of this machine, the longest first: whoever gets the report need not know them."""
    found = {str(run.out)}
    if run.plan:
        found |= {run.plan.output.path, run.plan.output.cache}
        for subset in run.plan.data.subsets:
            found |= {subset.source.location, subset.source.path}
    places = [place for place in found if place.startswith("/") and len(place) > 1]
    return sorted(places, key=len, reverse=True)


def without_places(run: Gathered, line: str) -> str:
    """A line for people elsewhere: of each folder of the job, its last name."""
    for place in _places(run):
        line = re.sub(rf"{re.escape(place)}(?=[/\s:,;.)]|$)", Path(place).name.replace("\\", ""), line)
    return line


def plan(run: Gathered) -> str:
    """What was decided and why, and the settings."""
    if run.plan is None:
        return ""
    parts = []
    for title, sentences in (("Warnings", run.plan.warnings), ("Reasons", run.plan.reasons)):
        if sentences:
            parts.append(f"<h3>{title}</h3>{bullets(without_places(run, sentence) for sentence in sentences)}")
    parts.append(f"<h3>Settings</h3>{pairs(settings(run.plan))}")
    if run.plan.given:
        parts.append(quiet(f"Set by hand: {text(', '.join(sorted(run.plan.given)))}."))
    return "".join(parts)


def _batch_size(size: int, accumulated: int, processes: int) -> str:
    """Images of a micro-batch, and what makes a step of several."""
    words = str(size)
    if accumulated > 1:
        words += f", {accumulated} times a step"
    if processes > 1:
        words += f", on each of {processes} GPUs"
    return words


def settings(plan: Plan) -> list[tuple[str, object]]:
    """The settings that people compare, by words for them; "" or None where one is off."""
    optim, train, lora, engine = plan.optim, plan.train, plan.lora, plan.engine
    dataset = plan.data.datasets[0]
    epochs: object = train.max_epochs
    if train.max_steps or train.max_epochs == AUTO:
        epochs = ""
    rates = [f"{name} ({rate:g})" for name, rate in optim.text_encoders.items()]
    return [
        ("Base model", plan.model.base),
        ("Type", lora.kind),
        ("Rank, alpha", f"{lora.rank}, {lora.alpha:g}"),
        ("Optimiser", optim.name),
        ("Learning rate", f"{optim.learning_rate:g}"),
        ("Schedule", f"{optim.scheduler}, {optim.warmup_steps} steps of warm-up"),
        ("Weight decay", f"{optim.weight_decay:g}"),
        ("Steps", train.max_steps or ""),
        ("Epochs", epochs),
        ("Batch size", _batch_size(dataset.batch_size, train.gradient_accumulation, engine.processes)),
        ("Resolution", f"{dataset.resolution[0]}×{dataset.resolution[1]}"),
        ("Timesteps", train.timestep_sampling),
        ("Noise offset", f"{train.noise_offset:g}"),
        ("Caption dropout", _unless_zero(train.caption_dropout_rate)),
        ("EMA", _unless_zero(train.ema_decay)),
        ("Seed", train.seed),
        ("Precision of the base", engine.precision),
        ("Text encoders that train", ", ".join(rates)),
    ]


def _unless_zero(value: float) -> str:
    if not value:
        return ""
    return f"{value:g}"


def versions(run: Gathered, *, price: float | None) -> str:
    """What made it, when, and what it cost."""
    rows: list[tuple[str, object]] = [("Kiln", run.header.get("kiln_version", __version__))]
    rows.append(("Device", run.made_by.get("device", "")))
    for name in PACKAGES:
        rows.append((name, run.made_by.get(name) or _installed(name)))
    rows.append(("Python", platform.python_version()))
    began = run.status.get("started")
    if isinstance(began, int | float):
        rows.append(("Started", f"{datetime.datetime.fromtimestamp(began, datetime.UTC):%Y-%m-%d %H:%M} UTC"))
    seconds = run.start_seconds()
    training = run.training_seconds()
    rows.append(("This start", clock_if_known(seconds)))
    rows.append(("Steps of all starts", clock_if_known(training)))
    if training and run.done > 1:
        rows.append(("A step", f"{training / (run.done - 1):.2f} s, with saves and samples"))
    if price:
        rows.append(("Price", f"{price:g} an hour: {price * seconds / 3600:.2f} for this start"))
    if price and training:
        rows.append(("Cost of all steps", f"{price * training / 3600:.2f}"))
    return pairs(rows)


def _installed(package: str) -> str:
    """Its version; "" where the report is made on a machine without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
