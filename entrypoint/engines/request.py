"""What is asked of an engine: the job's variables, apart from its secrets; the GPUs that fit; where the files are."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from entrypoint.planning import offers
from entrypoint.planning.plan import make_plan
from entrypoint.queue.jobs import expand, whole_limits
from entrypoint.runpod import request as pod_request
from entrypoint.settings import Settings, read_settings
from entrypoint.system import cards, prices, secrets
from entrypoint.system.prices import Offer
from trainer.process.guard import KILLED_EXIT_CODE
from trainer.spec.errors import SettingsError
from trainer.spec.rules.quote import HOUR_S
from trainer.spec.values import nearest, some

STOPPED_EXIT_CODE = 143
MOST_CARDS = 4  # in an engine's list of what will do
SPARE = 2.0  # a limit of time is this many times the predicted time, and an hour for downloads
LEAST_HOURS = 2.0
USUAL_HOURS = 24.0  # where no time can be predicted


class Choice(NamedTuple):
    """A GPU on which the planner finds that the job fits."""

    card: str
    memory_mib: int
    way: str
    hours: float | None  # predicted


@dataclass(frozen=True)
class Request:
    """A job for an engine. `variables` are shown, `secrets` are names alone; `cards` come best first.

    `count`: GPUs of each of the `nodes`, which find each other by what NODES among the variables says.
    `again`: the exit codes after which the same job is to be started again. `hours`: after which the engine may end it.
    `storage`: what the engine mounts at /workspace, by its own name or address; "" for nothing that lasts.
    """

    name: str
    image: str
    variables: Mapping[str, str]
    secrets: tuple[str, ...]
    cards: tuple[Choice, ...]
    count: int
    nodes: int
    hours: float
    again: tuple[int, ...]
    storage: str
    spot: bool
    disk_gb: int

    @property
    def page(self) -> int:
        """The port of the monitor page; 0: none."""
        return int(self.variables.get("MONITOR_PORT", "8675"))

    @property
    def least_memory_mib(self) -> int:
        return min(choice.memory_mib for choice in self.cards)


def read_request(
    options: argparse.Namespace, environ: Mapping[str, str], names: Mapping[str, object]
) -> tuple[Request, dict[str, str]]:
    """The request, and the values of its secrets. `names`: the cards that the engine has.

    Raises SettingsError for variables that cannot be used, for a path that only this machine has, and where no GPU of
    the engine can do the job.
    """
    given = pod_request.job_variables(environ, env=options.env)
    if options.count:
        given["NUM_GPUS"] = str(options.count)
    shown = secrets.shown(given)
    hidden = {name: value for name, value in given.items() if shown[name] != value}
    variables = {name: value for name, value in given.items() if name not in hidden}
    queued = expand(given)
    each = [job.environ for job in queued] or [given]
    settings = read_settings({**each[0], **whole_limits(given)})
    engines = [read_settings(own).engine for own in each]
    for engine in engines:
        if engine.backend not in ("auto", "cuda"):
            raise SettingsError(f"BACKEND={engine.backend}: jobs for engines are for CUDA alone. Fix: unset it.")
    nodes = settings.engine.nodes
    if nodes == 0:
        raise SettingsError("NODES=auto: an engine must be told how many machines. Fix: a number, such as NODES=2.")
    if nodes > 1:  # each engine says it to the machines that it starts
        variables["NODES"] = "auto"
    gpus = [engine.num_gpus or 1 for engine in engines]
    count = options.count or max(gpus)
    planned = [{**own, "NUM_GPUS": str(number)} for own, number in zip(each, gpus, strict=True)]
    choices = choose_cards(planned, options, names, count=count)
    limited = settings.finish.max_cost is not None or settings.finish.max_runtime is not None
    request = Request(
        name=options.name,
        image=pod_request.with_backend(options.image, "cuda"),
        variables=variables,
        secrets=tuple(hidden),
        cards=choices,
        count=count,
        nodes=nodes,
        hours=options.hours or _hours(settings, choices),
        # A job that has reached MAX_COST ends with 143 as well, and must not begin to cost again.
        again=(KILLED_EXIT_CODE,) if limited else (KILLED_EXIT_CODE, STOPPED_EXIT_CODE),
        storage=options.storage or "",
        spot=options.spot,
        disk_gb=options.disk,
    )
    return request, hidden


def choose_cards(
    jobs: Sequence[Mapping[str, str]], options: argparse.Namespace, names: Mapping[str, object], *, count: int
) -> tuple[Choice, ...]:
    """The GPUs of an engine that fit all jobs: the one of --gpu, else by the predicted cost of the whole.

    The costs are RunPod's, or those of --prices: they only order what the engine is asked for.
    """
    offered = _offered(options, names, count=count)
    table = offers.together([_table(variables, offered) for variables in jobs])
    found: list[Choice] = []
    for row in table.rows:
        if row.why_not or len(found) == MOST_CARDS:
            continue
        hardware = cards.hardware_of(row.offer.card)
        hours = None if row.total_s is None else row.total_s / HOUR_S
        memory_mib = round(hardware.memory_gib * 1024)
        if hardware.name not in [choice.card for choice in found]:
            found.append(Choice(hardware.name, memory_mib, row.way, hours))
    return tuple(found)


def _table(variables: Mapping[str, str], offered: Sequence[Offer]) -> offers.Table:
    settings, manifest = pod_request.plannable(variables)
    now = datetime.datetime.now(datetime.UTC)
    return offers.make_table(
        offered,
        lambda hardware: make_plan(settings, manifest, hardware, now=now),
        finish=settings.finish,
        token=None,
        hub_cache=Path(settings.model.hf_home) / "hub",
    )


def _offered(options: argparse.Namespace, names: Mapping[str, object], *, count: int) -> Sequence[Offer]:
    """The GPUs to plan for, by the names that `names` has."""
    prefix = f"{count} x " if count > 1 else ""
    if options.gpu:
        name = cards.card_of(cards.hardware_of(options.gpu))
        if name is None or (names and name not in names):
            guess = nearest(options.gpu, names)
            fix = f"did you mean {guess}?" if guess else f"{some(list(names))}."
            raise SettingsError(f"--gpu {options.gpu}: this engine is not known to have it. Fix: {fix}")
        return (Offer(f"{prefix}{name}", 1.0),)
    prices_of, _ = prices.read_offers(options.prices) if options.prices else (prices.OFFERS, [])
    offered = []
    for offer in prices_of:
        name = cards.card_of(cards.hardware_of(offer.card))
        if name is not None and (not names or name in names):
            offered.append(Offer(f"{prefix}{name}", offer.per_hour * count))
    return tuple(dict.fromkeys(offered))


def _hours(settings: Settings, choices: Sequence[Choice]) -> float:
    """When an engine may end the job: after MAX_RUNTIME and time to save, or a multiple of what is predicted."""
    if settings.finish.max_runtime is not None:
        return settings.finish.max_runtime + 0.5
    longest = max((choice.hours for choice in choices if choice.hours is not None), default=None)
    if longest is None:
        return USUAL_HOURS
    return max(LEAST_HOURS, longest * SPARE + 1)
