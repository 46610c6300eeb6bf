"""The variables that may name a file by an address, and the settings with local paths in their place."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from entrypoint.fetch import http
from entrypoint.fetch.doors import files, service
from entrypoint.fetch.doors.files import Arrival
from entrypoint.fetch.doors.keys import Keys
from entrypoint.fetch.http import RetryPolicy
from entrypoint.settings import Settings
from entrypoint.settings.checks import is_file, raise_together
from entrypoint.settings.variables import section_rows
from trainer.network import addresses
from trainer.spec.errors import KilnError, SettingsError

PARALLEL_FILES = 4
WHOLE = "PARAMS_RESUME_FROM"  # of a LoRA file, which is small, the plan reads numbers too: alpha and scales
_REPOSITORY_PAGE = re.compile(r"(?i)https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?")
_HUB_FILE = re.compile(r"(?i)hf://([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/(.+\.safetensors)")


def fields() -> list[tuple[str, str, str]]:
    """Section, field and variable of all that may name a file of weights."""
    found = [("adapter", "resume_from", WHOLE)]
    for field, row in section_rows("model").items():
        if row.kind == "text" and row.name.endswith("_PATH") and row.name != "MODEL_CONFIG_PATH":
            found.append(("model", field, row.name))
    return found


def arrive(
    settings: Settings, environ: Mapping[str, str], *, retries: RetryPolicy
) -> tuple[Settings, tuple[Arrival, ...]]:
    """The settings with a path for each address, and the files on their way to these paths.

    Only headers are downloaded, and the LoRA file to start from. Raises one error with the problems of all:
    SettingsError, GatedError, UnreachableError, StorageError.
    """
    keys, cache = Keys.of(settings, environ), settings.data.cache_path
    asked: dict[tuple[str, str], concurrent.futures.Future[Arrival]] = {}
    changed: dict[str, dict[str, Any]] = {"model": {}, "adapter": {}}
    problems: list[KilnError] = []
    with concurrent.futures.ThreadPoolExecutor(PARALLEL_FILES) as pool:
        for section, field, variable in fields():
            text = getattr(getattr(settings, section), field)
            if text is None:
                continue
            text = _usual(text)
            is_web = text.lower().startswith(("http://", "https://"))
            if is_web and (problem := addresses.problem_of(text)):
                problems.append(SettingsError(f"{variable}={addresses.shown(text)}: {problem}. Correct the address."))
            elif service.is_address(text):
                named = f"{variable}={addresses.shown(text)}"
                job = pool.submit(_announced, variable, named, text, keys, cache, retries)
                asked[section, field] = job
            elif is_file(text) and files.is_outline(Path(text).expanduser()):
                problems.append(SettingsError(f"{variable}={text}: it was never downloaded. Name its address again."))
            else:
                changed[section][field] = text
    arrivals = []
    for (section, field), job in asked.items():
        try:
            arrival = job.result()
        except KilnError as problem:
            problems.append(problem)
            continue
        changed[section][field] = str(arrival.path)
        arrivals.append(arrival)
    raise_together(problems)
    model = dataclasses.replace(settings.model, **changed["model"])
    adapter = dataclasses.replace(settings.adapter, **changed["adapter"])
    reasons = tuple(f"{arrival.named} is kept as {arrival.path}" for arrival in arrivals)
    settings = dataclasses.replace(settings, model=model, adapter=adapter, reasons=(*settings.reasons, *reasons))
    return settings, tuple(arrivals)


def _announced(variable: str, named: str, text: str, keys: Keys, cache: Path, retries: RetryPolicy) -> Arrival:
    arrival = files.announce(variable, named, text, keys, cache=cache, retries=retries)
    if variable != WHOLE:
        return arrival
    files.bring(arrival, retries=retries)
    return dataclasses.replace(arrival, offer=None)


def bring_all(arrivals: tuple[Arrival, ...], *, retries: RetryPolicy) -> None:
    """Download what is missing, at the same time. Raises what `files.bring` raises."""
    assert retries.cancelled is not None
    once = {arrival.path: arrival for arrival in arrivals}
    jobs = [partial(files.bring, arrival, retries=retries) for arrival in once.values()]
    http.in_parallel(jobs, workers=PARALLEL_FILES, cancelled=retries.cancelled)


def _usual(text: str) -> str:
    """The page of a repository as its name, and a file of one as an address that gives the file."""
    if page := _REPOSITORY_PAGE.fullmatch(text):
        return page[1]
    if file := _HUB_FILE.fullmatch(text):
        return f"{addresses.hub_endpoint(os.environ)}/{file[1]}/resolve/{file[2] or 'main'}/{file[3]}"
    if re.match(r"(?i)https?://(www\.)?(huggingface\.co|hf\.co)/[^?]+/blob/", text):
        return text.replace("/blob/", "/resolve/", 1)
    return text
