"""All that a job needs, brought at the same time: the model, the images, files behind addresses, and the captioner."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

from entrypoint.fetch import http
from entrypoint.fetch.captioner import fetch_captioner
from entrypoint.fetch.doors import variables as doors
from entrypoint.fetch.doors.files import Arrival
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.fetch import fetch_model, fetch_source
from entrypoint.fetch.training_adapter import fetch_training_adapter
from entrypoint.settings import Settings
from trainer.base_model import model_folder
from trainer.data.folders.own_output import Written
from trainer.data.shards.stream import ShardStream
from trainer.spec.errors import SettingsError
from trainer.spec.family import facts_of
from trainer.spec.plan import Dataset, ModelPlan, Plan, Source


@dataclasses.dataclass(frozen=True)
class Access:
    """What a job fetches with, and the files that are on their way already. `token`: of the Hub."""

    token: str | None = dataclasses.field(repr=False)
    keys: Keys
    arrivals: tuple[Arrival, ...]


def fetch_all(plan: Plan, settings: Settings, access: Access) -> Plan:
    """The plan with local paths for the model, all sources and files. Raises the errors of what it fetches with."""
    hub_cache = settings.model.hf_home / "hub"
    cache = Path(plan.output.cache)
    facts = facts_of(plan.model.family, plan.model.base)
    patterns = model_folder.file_patterns(facts, plan.model.parts)
    sources: dict[Source, None] = {}  # each once, in order
    for dataset in plan.data.datasets:
        sources |= dict.fromkeys(subset.source for subset in dataset.subsets)
    cancelled = threading.Event()
    retries = dataclasses.replace(http.USUAL, cancelled=cancelled)
    common: dict[str, Any] = {"token": access.token, "hub_cache": hub_cache, "retries": retries}

    def bring_model() -> ModelPlan:
        return fetch_training_adapter(fetch_model(plan.model, patterns=patterns, **common), **common)

    def bring() -> dict[Source, Source]:
        doors.bring_all(access.arrivals, retries=retries)
        own: dict[str, Any] = {"cache": cache, "most": plan.output.max_cache_bytes, "owner": plan.output.path, **common}
        return {source: fetch_source(source, keys=access.keys, **own) for source in sources}

    model, fetched = http.both(bring_model, bring, cancelled=cancelled)

    def local(source: Source, _dataset: Dataset) -> Source:
        # Without the key that an address may hold: nobody needs it from here on.
        return dataclasses.replace(fetched[source], location=source.public)

    plan = dataclasses.replace(plan.map_sources(local), model=model)
    _check_streams(plan)
    # Only now it is known whether an image lacks a caption.
    places = {"OUTPUT_PATH": Path(plan.output.path), "CACHE_PATH": cache, "HF_HOME": hub_cache.parent}
    captioner = fetch_captioner(plan.data, cache=cache, written=Written(places), **common)
    return dataclasses.replace(plan, data=dataclasses.replace(plan.data, captioner=captioner))


def _check_streams(plan: Plan) -> None:
    """Raises SettingsError for what needs all images at once, where they come as a stream."""
    streamed = [subset.source for subset in plan.data.subsets if ShardStream.of(Path(subset.source.path))]
    if not streamed:
        return
    asked = {
        "CAPTION_WITH": plan.data.captioner is not None,
        "validation_split": any(dataset.validation_split for dataset in plan.data.datasets),
        "NODES above 1": plan.engine.nodes > 1,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise SettingsError(
                f"{name} needs all images at once, and the shards of {streamed[0].public} do not all fit CACHE_PATH. "
                f"Fix: remove it, or give CACHE_PATH a larger volume (and MAX_CACHE_GIB, where it is set)."
            )
