"""The parts of report.html. Whatever comes from outside (captions, prompts, names, messages) passes `text`."""

from __future__ import annotations

import datetime
import html
import importlib.metadata
import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from entrypoint.report import usage
from entrypoint.report.charts import Chart, Line, Point, smoothed
from entrypoint.report.gather import NO_STEP, Gathered, LoraFile, Sample
from entrypoint.report.samples import data_address, thumbnail
from trainer import __version__
from trainer.spec.log_lines import escaped
from trainer.spec.messages.secrets import without_secrets
from trainer.spec.plan import AUTO, Plan
from trainer.storage.atomic import human_size

MOST_STEPS = 12  # of samples, as columns: more are chosen evenly
MOST_ROWS = 200  # of images in the table; dataset-report.csv has all
MOST_CAPTION = 400  # characters
WIDTHS = ((40, 320), (90, 224), (10**9, 144))  # up to so many samples: pixels of each
MOST_EMBEDDED = 6 * 2**20  # bytes of JPEG in all
PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


def text(value: object) -> str:
    """For people, inside HTML: nothing in it is markup, acts on a terminal, or looks like a secret."""
    return html.escape(without_secrets(escaped(str(value))))


def clock(seconds: float) -> str:
    """Seconds in words: "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def pairs(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values, without the rows that have none."""
    lines = [f"<tr><th scope=row>{text(name)}<td>{text(value)}" for name, value in rows if value not in ("", None)]
    return f"<div class=wide><table class=pairs>{''.join(lines)}</table></div>" if lines else ""


# ---- the beginning


def headline(run: Gathered, *, price: float | None) -> str:
    """What was trained, how it ended, and the numbers that people look for first."""
    rows: list[tuple[str, object]] = []
    if run.final:
        rows.append(("LoRA", f"{run.final.path.name}, {human_size(run.final.bytes)}"))
    if run.triggers:
        rows.append(("Trigger word", ", ".join(run.triggers)))
    rows.append(("Steps", f"{run.done:,} of {run.total:,}" if run.total else f"{run.done:,}" if run.done else ""))
    seconds = run.start_seconds()
    rows.append(("Time", clock(seconds) if seconds else ""))
    if price and seconds:
        rows.append(("Cost", f"{price * seconds / 3600:.2f} at {price:g} an hour"))
    losses = [(row["step"], row["loss"]) for row in run.steps if "loss" in row]
    if losses:
        rows.append(("Loss, smoothed", f"{smoothed(losses)[-1][1]:.4f}"))
    if run.validations:
        step, least = min(run.validations, key=lambda pair: pair[1])
        rows.append(("Validation loss", f"{run.validations[-1][1]:.4f}; least {least:.4f} at step {step:,}"))
    cells = [f"<div><dt>{text(name)}<dd>{text(value)}</div>" for name, value in rows if value]
    return f"<h1>{text(run.name)}</h1>{_ending(run)}<dl class=facts>{''.join(cells)}</dl>"


def _ending(run: Gathered) -> str:
    model = run.base_repository or run.base_name
    rank = run.header.get("ss_network_dim") or (run.plan.lora.rank if run.plan else "")
    what = f"A LoRA{f' of rank {rank}' if rank else ''} for {model}." if model else "A LoRA."
    phase = run.status.get("phase")
    message = str(run.status.get("message", ""))
    if phase == "done":
        badge, words = "good", "Finished"
    elif phase == "stopped":
        badge, words = "odd", f"Stopped after step {run.done:,}"
    elif phase == "failed":
        badge, words = "bad", f"Failed after step {run.done:,}" if run.done else "Failed before the first step"
    else:
        badge, words = "odd", f"Not finished: {phase}" if phase else "Not finished"
    why = f"<p class=message>{text(message)}</p>" if message and phase != "done" else ""
    saved = run.status.get("saved_step")
    if phase in ("stopped", "failed") and saved:
        why += f"<p>The state of step {text(saved)} is saved: the same command goes on from there.</p>"
    return f"<p><span class='badge {badge}'>{text(words)}</span> {text(what)}</p>{why}"


def how_to_use(run: Gathered) -> str:
    """Where the LoRA goes in each program."""
    if run.final is None:
        return ""
    name = run.final.path.name
    lines = [
        f"<p>{text(usage.prompting(run))}</p>",
        f"<p><b>ComfyUI:</b> copy <code>{text(name)}</code> to <code>models/loras</code>. "
        f"<b>Forge, A1111:</b> to <code>models/Lora</code>, and write "
        f"<code>&lt;lora:{text(run.final.path.stem)}:1&gt;</code> into the prompt.</p>",
    ]
    code = usage.diffusers_code(run, place=".")
    if code:
        lines.append(f"<p><b>diffusers</b>, in the folder of the file:</p><pre><code>{text(code)}</code></pre>")
    licence = run.base.licence if run.base else None
    if licence:
        link = f'<a rel="noopener noreferrer" href="{html.escape(licence.link)}">{text(licence.name)}</a>'
        lines.append(f"<p><b>Licence of the base model:</b> {link}. {text(licence.allows)}</p>")
    return "".join(lines)


# ---- samples


def sample_grid(run: Gathered) -> str:
    """A row for each prompt, a column for each step."""
    if not run.samples:
        return ""
    steps = chosen_steps({sample.step for sample in run.samples})
    by_place = {(sample.number, sample.step): sample for sample in run.samples if sample.step in steps}
    width = next(pixels for most, pixels in WIDTHS if len(by_place) <= most)
    left = MOST_EMBEDDED
    parts = []
    for number in sorted({number for number, _ in by_place}):
        row = [by_place[number, step] for step in steps if (number, step) in by_place]
        cells = []
        for sample in row:
            jpeg = thumbnail(sample.path, width)
            left -= len(jpeg)
            cells.append(_sample_cell(sample, jpeg if left > 0 else b""))
        parts.append(
            f"<section class=prompt><h3>{text(row[0].prompt)}</h3><p class=quiet>{text(row[0].settings)}</p>"
            f"<div class=strip tabindex=0>{''.join(cells)}</div></section>"
        )
    every = len({sample.step for sample in run.samples})
    if every > len(steps):
        parts.append(f"<p class=quiet>{len(steps)} of {every} steps are shown; sample/ has all of them.</p>")
    return "".join(parts)


def _sample_cell(sample: Sample, jpeg: bytes) -> str:
    label = "before training" if sample.step == 0 else f"step {sample.step:,}"
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


def curves(run: Gathered) -> str:
    """Loss, learning rate, size of the gradient."""

    def column(name: str) -> list[Point]:
        return [(row["step"], row[name]) for row in run.steps if name in row]

    losses = column("loss")
    saves = [file.step for file in run.loras if file.step != NO_STEP]
    loss_lines = [Line("of each step", "raw", losses), Line("smoothed", "smooth", smoothed(losses))]
    if run.validations:
        loss_lines.append(Line("validation", "held", [(float(s), v) for s, v in run.validations], dots=True))
    rates = column("lr")
    charts = [
        Chart("Loss", loss_lines, marks=saves),
        Chart("Learning rate", [Line("learning rate", "plain", rates)], logarithmic=_spans_decades(rates)),
        Chart("Size of the gradient", [Line("gradient", "plain", column("grad_norm"))]),
    ]
    parts = []
    for chart in charts:
        drawing = chart.svg()
        if drawing:
            names = [f"<span class='key {line.style}'>{text(line.name)}</span>" for line in chart.lines]
            legend = "".join(names) if len(names) > 1 else ""
            parts.append(f"<figure class=chart><figcaption>{text(chart.title)} {legend}</figcaption>{drawing}</figure>")
    if parts and saves:
        parts.append("<p class=quiet>Vertical lines: saves. The numbers of every step are in metrics.jsonl.</p>")
    skipped = max((int(row["skipped"]) for row in run.steps if "skipped" in row), default=0)
    if skipped:
        parts.append(f"<p>{skipped} steps were skipped, because their numbers were not finite or far off.</p>")
    return "".join(parts)


def _spans_decades(points: Sequence[Point]) -> bool:
    values = [value for _, value in points if value > 0]
    return bool(values) and max(values) / min(values) > 100


def checkpoints(run: Gathered) -> str:
    """Each LoRA file with what is known of its step, the least validation loss marked."""
    if not run.loras:
        return ""
    losses = [(row["step"], row["loss"]) for row in run.steps if "loss" in row]
    smooth = dict(smoothed(losses))
    held_out = dict(run.validations)
    shown = {file: _nearest(held_out, _step_of(file, run)) for file in run.loras}
    least = min((value for value in shown.values() if value is not None), default=None)
    first = min((sample.number for sample in run.samples), default=0)
    images = {sample.step: sample for sample in run.samples if sample.number == first}
    lines = []
    for file in run.loras:
        step = _step_of(file, run)
        loss = smooth.get(step)
        image = _small(images.get(step)) if len(run.loras) <= 2 * MOST_STEPS else ""
        best = " class=best" if shown[file] is not None and shown[file] == least else ""
        lines.append(
            f"<tr{best}><td class=number>{step:,}<td><code>{text(file.path.name)}</code><td>{human_size(file.bytes)}"
            f"<td class=number>{_number(loss)}<td class=number>{_number(shown[file])}<td>{image}"
        )
    head = "<tr><th class=number>step<th>file<th>size"
    head += "<th class=number>loss, smoothed<th class=number>validation loss<th>first sample"
    note = "<p class=quiet>Coloured: the least validation loss.</p>" if least is not None else ""
    return f"<div class=wide><table><thead>{head}<tbody>{''.join(lines)}</table></div>{note}"


def _step_of(file: LoraFile, run: Gathered) -> int:
    return run.done if file.step == NO_STEP else file.step


def _nearest(held_out: Mapping[int, float], step: int) -> float | None:
    """The last validation up to a step."""
    before = [known for known in held_out if known <= step]
    return held_out[max(before)] if before else None


def _small(sample: Sample | None) -> str:
    jpeg = thumbnail(sample.path, 96) if sample else b""
    return f'<img class=small alt="" src="{data_address(jpeg)}">' if jpeg else ""


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "–"


# ---- dataset, plan, versions


def dataset(run: Gathered) -> str:
    """What became of the images: the counts and notes, what was skipped or cut, and a table."""
    if not run.images and not run.dataset_lines:
        return ""
    lines = [without_places(run, line) for line in run.dataset_lines]
    listed = "".join(f"<li>{text(line.strip())}" for line in lines[1:])
    parts = [f"<p>{text(lines[0]) if lines else ''}</p>", f"<ul>{listed}</ul>" if listed else ""]
    skipped = [row for row in run.images if row.get("status") == "skipped"]
    cut = [row for row in run.images if row.get("cut_at")]
    rest = [row for row in run.images if row not in skipped and row not in cut]
    ordered = [*skipped, *cut, *rest]
    rows = []
    for row in ordered[:MOST_ROWS]:
        size = f"{row.get('width')}×{row.get('height')}" if row.get("width") else ""
        caption = row.get("trained caption") or row.get("caption") or ""
        if len(caption) > MOST_CAPTION:
            caption = f"{caption[:MOST_CAPTION]}…"
        why = row.get("reason", "")
        if row.get("cut_at"):
            why = f"{why}; not read from “{row['cut_at']}” on".removeprefix("; ")
        style = " class=odd" if row in skipped or row in cut else ""
        rows.append(
            f"<tr{style}><td>{text(row.get('file', ''))}<td>{text(row.get('status', ''))}<td>{text(size)}"
            f"<td>{text(row.get('bucket', ''))}<td>{text(row.get('repeats', ''))}"
            f"<td class=long>{text(caption)}<td class=long>{text(why)}"
        )
    head = "<tr><th>image<th>status<th>size<th>trained at<th>repeats<th>caption as trained<th>note"
    parts.append(f"<div class=wide><table><thead>{head}<tbody>{''.join(rows)}</table></div>" if rows else "")
    if len(ordered) > MOST_ROWS:
        parts.append(f"<p class=quiet>{len(ordered) - MOST_ROWS:,} more are in dataset-report.csv.</p>")
    return "".join(parts)


def _places(run: Gathered) -> list[str]:
    """Folders of this machine, the longest first: whoever gets the report need not know them."""
    found = {str(run.out)}
    if run.plan:
        found |= {run.plan.output.path, run.plan.output.cache}
        for subset in run.plan.data.subsets:
            found |= {subset.source.location, subset.source.path}
    return sorted((place for place in found if place.startswith("/") and len(place) > 1), key=len, reverse=True)


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
            items = "".join(f"<li>{text(without_places(run, sentence))}" for sentence in sentences)
            parts.append(f"<h3>{title}</h3><ul>{items}</ul>")
    parts.append(f"<h3>Settings</h3>{pairs(settings(run.plan))}")
    if run.plan.given:
        parts.append(f"<p class=quiet>Set by hand: {text(', '.join(sorted(run.plan.given)))}.</p>")
    return "".join(parts)


def settings(plan: Plan) -> list[tuple[str, object]]:
    """The settings that people compare, by words for them."""
    optim, train, lora, engine = plan.optim, plan.train, plan.lora, plan.engine
    dataset = plan.data.datasets[0]
    rows: list[tuple[str, object]] = [
        ("Base model", plan.model.base),
        ("Type", lora.kind),
        ("Rank, alpha", f"{lora.rank}, {lora.alpha:g}"),
        ("Optimiser", optim.name),
        ("Learning rate", f"{optim.learning_rate:g}"),
        ("Schedule", f"{optim.scheduler}, {optim.warmup_steps} steps of warm-up"),
        ("Weight decay", f"{optim.weight_decay:g}"),
        ("Steps", train.max_steps or ""),
        ("Epochs", "" if train.max_steps or train.max_epochs == AUTO else train.max_epochs),
        ("Batch size", f"{dataset.batch_size} × {train.gradient_accumulation} × {engine.num_gpus}"),
        ("Resolution", f"{dataset.resolution[0]}×{dataset.resolution[1]}"),
        ("Timesteps", train.timestep_sampling),
        ("Noise offset", f"{train.noise_offset:g}"),
        ("Caption dropout", f"{train.caption_dropout_rate:g}" if train.caption_dropout_rate else ""),
        ("EMA", f"{train.ema_decay:g}" if train.ema_decay else ""),
        ("Seed", train.seed),
        ("Precision of the base", engine.precision),
        ("Text encoders that train", ", ".join(f"{name} ({rate:g})" for name, rate in optim.text_encoders.items())),
    ]
    return rows


def versions(run: Gathered, *, price: float | None) -> str:
    """What made it, when, and what it cost."""
    rows: list[tuple[str, object]] = [("Kiln", run.header.get("kiln_version", __version__))]
    rows.append(("Device", run.made_by.get("device", "")))
    for name in PACKAGES:
        try:
            rows.append((name, run.made_by.get(name) or importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:  # the report is made on another machine
            continue
    rows.append(("Python", platform.python_version()))
    began = run.status.get("started")
    if isinstance(began, int | float):
        rows.append(("Started", f"{datetime.datetime.fromtimestamp(began, datetime.UTC):%Y-%m-%d %H:%M} UTC"))
    seconds, training = run.start_seconds(), run.training_seconds()
    rows.append(("This start", clock(seconds) if seconds else ""))
    rows.append(("Steps of all starts", clock(training) if training else ""))
    if training and run.done > 1:
        rows.append(("A step", f"{training / (run.done - 1):.2f} s, with saves and samples"))
    if price:
        rows.append(("Price", f"{price:g} an hour: {price * seconds / 3600:.2f} for this start"))
        rows.append(("Cost of all steps", f"{price * training / 3600:.2f}" if training else ""))
    return pairs(rows)
