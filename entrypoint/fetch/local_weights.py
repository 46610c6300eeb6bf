"""The tokenizers of models whose weights are all local files, fetched for a job (`trainer.base_model.without_weights`).

The repositories are open: no token is sent.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from entrypoint.fetch import hub
from entrypoint.fetch.http import RetryPolicy
from trainer.base_model import without_weights
from trainer.base_model.without_weights import Vocabulary
from trainer.spec.errors import GatedError, SettingsError, UnreachableError
from trainer.spec.family import Published, base_models
from trainer.spec.plan import ModelPlan
from trainer.storage.atomic import human_size

logger = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_S = 10.0  # for a Hub that is silent: a few files are no reason to wait long


def describe(
    vocabularies: list[Vocabulary], *, hub_cache: Path | None, retries: RetryPolicy
) -> list[tuple[hub.Repo, hub.Listing, list[hub.RemoteFile]]]:
    """The files to fetch, with their sizes. Raises UnreachableError and others with what else would help."""
    found = []
    for vocabulary in vocabularies:
        tokenizer = vocabulary.tokenizer
        # Without a token: the repositories are open, and the Hub would refuse a token that has expired.
        repo = hub.Repo(
            *("model", tokenizer.repository, f"{tokenizer.name}'s tokenizer"),
            cache=hub_cache,
            retries=replace(retries, budget=min(PATIENCE_S, retries.budget)),
        )
        listing = _advised(vocabularies, partial(hub.describe, repo))
        files = [file for file in listing.files if file.name in tokenizer.files]
        if len(files) < len(tokenizer.files):
            way_out = without_weights.way_out(vocabularies)
            raise SettingsError(f"{repo.page} lacks one of {', '.join(tokenizer.files)}. {way_out}")
        found.append((repo, listing, files))
    return found


def _advised(vocabularies: list[Vocabulary], ask: Callable[[], T]) -> T:
    """`ask`; its error says which tokenizers are missing, and how to bring them by hand."""
    try:
        return ask()
    except (UnreachableError, GatedError, SettingsError) as problem:
        what = without_weights.what_is_missing(vocabularies)
        raise type(problem)(f"{what} {problem} {without_weights.way_out(vocabularies)}") from problem


def bake(place: Path, *, hub_cache: Path, retries: RetryPolicy) -> None:
    """Put the vocabularies of all base models below `place`, where jobs in the image find them."""
    for _, model in base_models().values():
        for folder, tokenizer in model.published.tokenizers.items() if model.published else ():
            target = place / tokenizer.repository.replace("/", "--")
            if target.is_dir():
                continue
            found = describe([Vocabulary(tokenizer, (folder,))], hub_cache=hub_cache, retries=retries)
            for repo, listing, files in found:
                source = hub.bring(repo, listing, files)
                target.mkdir(parents=True)
                for file in files:
                    shutil.copyfile(source / file.name, target / file.name)


def log_downloads(downloads: list[tuple[hub.Repo, hub.Listing, list[hub.RemoteFile]]]) -> None:
    """Say what will be fetched, or that nothing will."""
    if not downloads:
        logger.info("To fetch for the model: nothing. Its weights are local files, and its tokenizers are here.")
    for repo, _, files in downloads:
        size = human_size(sum(file.size for file in files))
        logger.info("To fetch: %s from %s, %s. It needs no token.", repo.variable, repo.name, size)


def assemble(model: ModelPlan, facts: Published, *, hub_cache: Path | None, retries: RetryPolicy) -> Path:
    """The folder of the model without weights, in HF_HOME; fetches the tokenizers that are missing.

    Raises UnreachableError and others with what to do without a network, StorageError.
    """
    wanted = without_weights.missing(model, facts, hub_cache=hub_cache)
    for repo, listing, remote in describe(wanted, hub_cache=hub_cache, retries=retries):
        _advised(wanted, partial(hub.bring, repo, listing, remote))
    return without_weights.assemble(model, facts, hub_cache=hub_cache)
