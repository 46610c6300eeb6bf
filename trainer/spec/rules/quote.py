"""How long a job takes and what it costs: before it starts by prediction, after its first steps by measurement.

`--check`, a job before it downloads a model, and the trainer say it in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from trainer.spec.plan import Plan, QuotePlan

MEASURED_AFTER = 20  # steps of this start, from which the rest is measured and no longer predicted
HOUR_S = 3600.0


class Quote(NamedTuple):
    """Seconds that the rest of a job takes, by what they go to."""

    step: float  # one step of the optimiser
    start: float  # loading and encoding
    steps: float
    samples: float
    captions: float = 0.0  # by a model (CAPTION_WITH), before all else

    @property
    def total(self) -> float:
        return self.captions + self.start + self.steps + self.samples


def predict(
    plan: Plan,
    *,
    first: int,
    total: int,
    images: int,
    examples: Mapping[tuple[int, tuple[int, int]], int],
    to_caption: int = 0,
) -> Quote | None:
    """For the steps after `first` up to `total`; None where the planner knows no time of a step.

    `images`: to encode. `to_caption`: of these, by a model. `examples`: of an epoch, by dataset and size, as
    `EpochSampler.buckets` has them.
    """
    known = plan.quote
    if not known.batch_s:
        return None
    batches = seconds = 0.0
    for (dataset, _), count in examples.items():
        of_dataset = count / plan.data.datasets[dataset].batch_size
        batches += of_dataset
        seconds += of_dataset * known.batch_s[dataset]
    step = plan.train.gradient_accumulation * seconds / max(batches, 1e-9)
    rounds = rounds_left(plan, first or -1, total)  # one is drawn before the first step
    start = known.start_s + images * known.image_s
    captions = caption_seconds(known, to_caption) or 0.0
    return Quote(step, start, (total - first) * step, rounds * known.round_s, captions)


def caption_seconds(known: QuotePlan, images: int) -> float | None:
    """What a model takes to caption so many images, with loading it; None where the planner does not know."""
    if not images:
        return 0.0
    return known.captioner_s + images * known.caption_s if known.caption_s else None


def rounds_left(plan: Plan, step: int, total: int) -> float:
    """Rounds of samples after `step`: at multiples of the interval from 0 on, and at the end.

    The last counts for as many as it takes the time of: it has all strengths. With one process that is a round for
    each; several draw at once, and have idle places in fewer of them.
    """
    every = plan.output.sample_every
    if not every or not plan.prompts or step >= total:
        return 0
    processes = plan.engine.processes
    in_round = len(plan.prompts)
    in_last = in_round * (1 + len(plan.output.sample_strengths))
    last = math.ceil(in_last / processes) / math.ceil(in_round / processes)
    return (total - 1) // every - step // every + last


def next_round(plan: Plan, step: int, total: int) -> int | None:
    """The step after which the next samples are drawn, once `step` is done; None: no more are."""
    if not rounds_left(plan, step, total):
        return None
    every = plan.output.sample_every
    return min((step // every + 1) * every, total)


def describe(plan: Plan, quote: Quote | None, *, first: int, total: int, to_caption: int = 0) -> list[str]:
    """The quote in one line. `to_caption`: images for a model; where it is not known how long they take, it says so."""
    left = f"{total - first:,} steps" if total - first != 1 else "1 step"
    if quote is None:
        return [f"Quote: how long {left} take here is known after the first {min(MEASURED_AFTER, total - first)}."]
    line = f"Quote, predicted for {plan.quote.card}: {left} at {quote.step:.2f} s take {duration(quote.steps)}."
    parts = "captions, loading" if quote.captions else "loading"
    line += f" With {parts}, encoding and samples that is {duration(quote.total)}{money(plan.quote, quote.total)};"
    line += " captions and downloads" if to_caption and not quote.captions else " downloads"
    line += " come on top."
    return [line]


def limit_warning(plan: Plan, quote: Quote, *, first: int, total: int, spent: float = 0.0) -> str | None:
    """What to say where MAX_RUNTIME or MAX_COST ends the job before its last step. `spent`: seconds so far."""
    known = plan.quote
    if known.limit_hours is None or spent + quote.total <= known.limit_hours * HOUR_S:
        return None
    usable = max(0.0, known.limit_hours * HOUR_S - spent - quote.captions - quote.start)
    reached = first + int((total - first) * min(1.0, usable / max(quote.steps + quote.samples, 1e-9)))
    needs = f"about {duration(spent + quote.total)}{money(known, spent + quote.total)}"
    return (
        f"{known.limit} ends this job after {duration(known.limit_hours * HOUR_S)}, at about step {reached:,} of "
        f"{total:,}: all of it takes {needs}. What is trained by then is saved; the same command goes on from there."
    )


def measured(plan: Plan, quote: Quote, *, spent: float) -> str:
    """The quote again, with what was measured. `quote`: of what is left. `spent`: seconds of this start so far."""
    whole = spent + quote.total
    return (
        f"Quote, measured: {quote.step:.2f} s a step. About {duration(quote.total)} are left; this start takes "
        f"{duration(whole)} in all{money(plan.quote, whole)}."
    )


def money(known: QuotePlan, seconds: float) -> str:
    """What that costs, to follow a time; "" where no price is known."""
    price = known.price_per_hour
    return f" and costs {price * seconds / HOUR_S:.2f} at {price:g} an hour" if price else ""


def duration(seconds: float) -> str:
    """A time in the unit that reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / HOUR_S:.1f} h"
