"""The model that captions images (CAPTION_WITH): looked up, and brought to a local folder where it is needed."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from entrypoint.fetch import http, hub
from entrypoint.fetch.http import RetryPolicy
from trainer.captioning import kinds, known
from trainer.data.folders.own_output import Written
from trainer.spec.errors import GatedError, SettingsError, UnreachableError
from trainer.spec.plan import CaptionerPlan, DataPlan
from trainer.spec.rules.captioners import CONFIG

logger = logging.getLogger(__name__)
SHORT_BUDGET_S = 10.0  # how long a silent server is waited for when the cache could serve instead


def captioner_repo(
    captioner: CaptionerPlan, *, token: str | None, hub_cache: Path | None, retries: RetryPolicy
) -> hub.Repo:
    """The repository of a model that is no local folder."""
    return hub.Repo(
        *("model", captioner.source, kinds.named(captioner)),
        revision=captioner.commit or captioner.revision,
        token=token,
        cache=hub_cache,
        retries=retries,
        revision_named="the revision of CAPTION_WITH",
    )


def with_known_commit(captioner: CaptionerPlan, *, token: str | None, hub_cache: Path) -> CaptionerPlan:
    """The model at the commit of its last download, so that captions which it has made then are found again."""
    if captioner.path or captioner.commit:
        return captioner
    repo = captioner_repo(captioner, token=token, hub_cache=hub_cache, retries=http.USUAL)
    commit = hub.cached_commit(repo)
    return replace(captioner, commit=commit) if commit else captioner


def wanted_files(repo: hub.Repo, listing: hub.Listing) -> list[hub.RemoteFile]:
    """The files of a model that captions. Raises SettingsError for a repository that is none."""
    names = [file.name for file in listing.files]
    if problem := kinds.problem_of_names(names):
        raise SettingsError(f"{repo.variable}: {repo.page} {problem}.")
    wanted = kinds.files_of(names)
    return [file for file in listing.files if file.name in wanted]


def cached(repo: hub.Repo) -> hub.Cached | None:
    """A complete snapshot of the model in the cache that was compared with the Hub's hashes; None if there is none."""
    found = hub.cached_snapshot(repo, kinds.files_of)
    return found if found is not None and found.is_verified else None


def fetch_captioner(
    data: DataPlan, *, cache: Path, token: str | None, hub_cache: Path, retries: RetryPolicy, written: Written
) -> CaptionerPlan | None:
    """The model in a local folder; without one, where every caption is known already. `data`: with local folders.

    Raises SettingsError, GatedError, UnreachableError, StorageError.
    """
    captioner = data.captioner
    if captioner is None:
        return None
    if captioner.path:
        kinds.kind_of(Path(captioner.path), variable=kinds.named(captioner))
        return captioner
    captioner = with_known_commit(captioner, token=token, hub_cache=hub_cache)
    if not known.may_lack_captions(replace(data, captioner=captioner), cache, written):
        logger.info("%s is not needed: every caption is there.", kinds.named(captioner))
        return captioner
    found = data.captioner
    assert found is not None
    repo = captioner_repo(found, token=token, hub_cache=hub_cache, retries=retries)
    snapshot = cached(repo)
    if snapshot is None or repo.revision != snapshot.commit:
        try:
            patient = repo
            if snapshot is not None:
                patient = replace(repo, retries=replace(retries, budget=min(SHORT_BUDGET_S, retries.budget)))
            listing = hub.describe(patient)
            if snapshot is None or listing.commit != snapshot.commit:
                snapshot = _bring(repo, listing)
        except (UnreachableError, GatedError) as problem:
            if snapshot is None:
                raise
            logger.warning("%s The cache has %s at commit %s: using that.", problem, repo.name, snapshot.commit)
    kinds.kind_of(snapshot.folder, variable=repo.variable)
    return replace(captioner, commit=snapshot.commit, path=str(snapshot.folder))


def _bring(repo: hub.Repo, listing: hub.Listing) -> hub.Cached:
    """Download the model; first its config, which may say that the gigabytes which follow are of no use."""
    files = wanted_files(repo, listing)
    configs = [file for file in files if file.name == CONFIG]
    if configs:
        folder = hub.bring(repo, listing, configs)
        kinds.kind_of_config(folder / CONFIG, variable=repo.variable)
    folder = hub.bring(repo, listing, files)
    return hub.Cached(listing.commit, folder, is_verified=True)
