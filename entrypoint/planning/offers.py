"""`python -m entrypoint quote`: what a job takes on each GPU that can be rented, by the planner of `--check --gpu`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from entrypoint.planning import summary
from entrypoint.planning.captions import captioner
from entrypoint.settings.variables.finish import FinishSettings
from entrypoint.system import prices
from entrypoint.system.cards import hardware_of
from entrypoint.system.hardware import IMAGE_KERNELS, Hardware, check_kernels
from entrypoint.system.prices import Offer
from trainer.data.records import Scan
from trainer.spec.errors import SettingsError
from trainer.spec.plan import Plan
from trainer.spec.rules import quote
from trainer.spec.strategies import described
from trainer.spec.values import some

ASSUMED_STEPS = 1000  # where the images, which decide how many steps a job has, are not on this machine
LONGEST_REASON = 60  # characters


class Row(NamedTuple):
    """One GPU in the table. None: not known, or no plan fits."""

    offer: Offer
    memory_gib: float
    way: str = ""  # weights and memory mode
    why_not: str = ""  # this GPU cannot do it
    batch: int | None = None
    steps: int | None = None
    step_s: float | None = None
    total_s: float | None = None
    captions: float | None = 0.0  # seconds of `total_s` in which a model captions images
    machines: int = 1  # NODES: each costs the price of the offer

    @property
    def cost(self) -> float | None:
        """Of all machines together."""
        return None if self.total_s is None else self.machines * self.offer.per_hour * self.total_s / quote.HOUR_S


class Table(NamedTuple):
    """All rows, the cheapest first. `assumed_steps`: the images are not here. `finish`: with the limits to mark."""

    rows: tuple[Row, ...]
    assumed_steps: bool
    finish: FinishSettings

    def marks(self, row: Row) -> list[str]:
        """What is special about a row, in words."""
        marks = [name for name, best in (("cheapest", self.cheapest), ("fastest", self.fastest)) if best is row]
        max_cost, max_hours = self.finish.max_cost, self.finish.max_runtime
        if max_cost is not None and row.cost is not None and row.cost > max_cost * row.machines:  # each ends at its own
            marks.append(f"above MAX_COST={max_cost:g}")
        if max_hours is not None and row.total_s is not None and row.total_s > max_hours * quote.HOUR_S:
            marks.append(f"above MAX_RUNTIME={max_hours:g}")
        return marks

    @property
    def cheapest(self) -> Row | None:
        return min((row for row in self.rows if row.cost is not None), key=lambda row: row.cost or 0.0, default=None)

    @property
    def fastest(self) -> Row | None:
        return min((row for row in self.rows if row.total_s), key=lambda row: row.total_s or 0.0, default=None)


def make_table(
    offers: Sequence[Offer],
    make_plan: Callable[[Hardware], Plan],
    *,
    finish: FinishSettings,
    token: str | None,
    hub_cache: Path,
) -> Table:
    """A row for each offer, by its price of the whole job. Raises SettingsError where no GPU can do it.

    `make_plan`: the plan for a machine; raises SettingsError where it cannot be done there.
    """
    planned: list[tuple[Row, Plan | None]] = []
    problems: list[SettingsError] = []
    for offer in offers:
        hardware = hardware_of(offer.card)
        row = Row(offer, hardware.memory_gib)
        try:
            check_kernels(hardware, IMAGE_KERNELS)
            planned.append((row, make_plan(hardware)))
        except SettingsError as problem:
            problems.append(problem)
            planned.append((row._replace(why_not=_reason(problem)), None))
    plans = [plan for _, plan in planned if plan is not None]
    if not plans:
        raise problems[0]
    found = summary.scan_here(plans[0], token=token, hub_cache=hub_cache)
    to_caption = 0
    if found is not None:
        to_caption = captioner.outlook(*found, token=token, hub_cache=hub_cache).missing
    rows: list[Row] = []
    for row, plan in planned:
        rows.append(row if plan is None else _with_quote(row, plan, found, to_caption))
    rows.sort(key=_order)
    return Table(tuple(rows), found is None, finish)


def together(tables: Sequence[Table]) -> Table:
    """What several jobs take, one after another, on each GPU that can do all of them."""
    if len(tables) == 1:
        return tables[0]
    rows: list[Row] = []
    for first in tables[0].rows:
        own = [next(row for row in table.rows if row.offer == first.offer) for table in tables]
        refused = [row.why_not for row in own if row.why_not]
        row = Row(first.offer, first.memory_gib, f"{len(own)} jobs", refused[0] if refused else "")
        if not refused:
            row = row._replace(
                steps=sum(one.steps or 0 for one in own),
                total_s=_sum([one.total_s for one in own]),
                captions=_sum([one.captions for one in own]),
            )
        rows.append(row)
    rows.sort(key=_order)
    return Table(tuple(rows), any(table.assumed_steps for table in tables), tables[0].finish)


def _sum(seconds: Sequence[float | None]) -> float | None:
    """None where one of them is not known."""
    known = [time for time in seconds if time is not None]
    return sum(known) if len(known) == len(seconds) else None


def _order(row: Row) -> tuple[bool, bool, float]:
    return bool(row.why_not), row.cost is None, row.cost or row.offer.per_hour


def _with_quote(row: Row, plan: Plan, found: tuple[Plan, Scan] | None, to_caption: int) -> Row:
    """The row with the plan's way and what it takes. `to_caption`: images, by a model."""
    engine = plan.engine
    way = f"{engine.precision}, {described(engine.recompute, engine.kept_blocks, engine.offload)}"
    row = row._replace(way=way, batch=plan.data.datasets[0].batch_size, machines=engine.nodes)
    if found is None:
        steps = plan.train.max_steps or ASSUMED_STEPS
        plan = dataclasses.replace(plan, output=dataclasses.replace(plan.output, sample_every=0))
        predicted = quote.predict(
            plan, first=0, total=steps, images=0, examples={(0, plan.data.datasets[0].resolution): 1}
        )
    else:
        local, scanned = found
        datasets = []
        for here, own in zip(local.data.datasets, plan.data.datasets, strict=True):
            datasets.append(dataclasses.replace(here, batch_size=own.batch_size))
        plan = dataclasses.replace(plan, data=dataclasses.replace(local.data, datasets=tuple(datasets)))
        sampler = summary.make_sampler(plan, scanned)
        plan, steps, predicted = summary.predicted_quote(
            plan, sampler, images=len(scanned.images), to_caption=to_caption
        )
        row = row._replace(captions=quote.caption_seconds(plan.quote, to_caption))
    row = row._replace(steps=steps)
    return row if predicted is None else row._replace(step_s=predicted.step, total_s=predicted.total)


def _reason(problem: SettingsError) -> str:
    """The first problem, as far as it fits into a table."""
    lines = [line.removeprefix("- ") for line in str(problem).splitlines() if line.startswith("- ")]
    text = (lines or [str(problem)])[0]
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON].rstrip()} …"


# ---- for people


def as_text(table: Table, unknown: Sequence[str]) -> str:
    """The table with columns under each other, and what its figures are. `unknown`: names that no card has."""
    head = ("GPU", "GiB", "weights and memory mode", "batch", "s a step", "time", "an hour", "money", "")
    lines = [head]
    for row in table.rows:
        price = f"{row.offer.per_hour:.2f}"
        if row.offer.seen:
            price += f" ({row.offer.seen})"
        if row.why_not:
            lines.append((row.offer.card, f"{row.memory_gib:.0f}", f"no: {row.why_not}", "", "", "", price, "", ""))
            continue
        step = "" if row.step_s is None else f"{row.step_s:.2f}"
        time = "" if row.total_s is None else quote.duration(row.total_s)
        money = "" if row.cost is None else f"{row.cost:.2f}"
        batch = "" if row.batch is None else str(row.batch)
        cells = (row.offer.card, f"{row.memory_gib:.0f}", row.way, batch, step, time, price, money)
        lines.append((*cells, ", ".join(table.marks(row))))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, "", *_notes(table, unknown)])


def _notes(table: Table, unknown: Sequence[str]) -> list[str]:
    notes = ["Times are predicted from steps that were measured on another card, and are without downloads."]
    if table.fastest is None:
        notes = ["No times: no step of this model was measured."]
    if any(row.captions is None for row in table.rows):
        notes.append("Captions by a model (CAPTION_WITH) come on top: no speed of this one is known.")
    elif any(row.captions for row in table.rows):
        notes.append("Times are with the captions that a model is to write (CAPTION_WITH).")
    if table.assumed_steps:
        steps = next(row.steps for row in table.rows if row.steps is not None)
        notes.append(f"The images are not on this machine: time and money are for {steps:,} steps without samples.")
    machines = max(row.machines for row in table.rows)
    if machines > 1:
        notes.append(f"Time and money are those of {machines} machines together (NODES); the price is that of one.")
    if any(row.offer.seen for row in table.rows):
        notes.append(
            f"Prices are approximate: US dollars of {prices.SOURCE}, as seen in the month beside them. Today's: python "
            "-m entrypoint.runpod gpus --json > prices.json, and --prices prices.json."
        )
    if unknown:
        notes.append(f"Not known as cards, and left out: {some(list(unknown))}.")
    return notes


# ---- for programs


def as_json(table: Table, unknown: Sequence[str]) -> str:
    """The rows as a JSON object (docs/agents.md)."""
    rows = []
    for row in table.rows:
        rows.append(
            {
                "gpu": row.offer.card,
                "memory_gib": round(row.memory_gib, 1),
                "fits": not row.why_not,
                "why_not": row.why_not or None,
                "way": row.way or None,
                "batch_size": row.batch,
                "steps": row.steps,
                "step_seconds": None if row.step_s is None else round(row.step_s, 3),
                "seconds": None if row.total_s is None else round(row.total_s),
                "caption_seconds": None if row.captions is None else round(row.captions),
                "price_per_hour": row.offer.per_hour,
                "machines": row.machines,
                "price_seen": row.offer.seen or None,
                "cost": None if row.cost is None else round(row.cost, 2),
                "marks": table.marks(row),
            }
        )
    found = {"gpus": rows, "assumed_steps": table.assumed_steps, "unknown": list(unknown)}
    return json.dumps(found, indent=2, ensure_ascii=False)
