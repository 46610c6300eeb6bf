"""CAPTION_WITH and its companions → `CaptionerPlan`: which model captions images that have no caption, and how.

Then the checks before a download, and what a check says of captions.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from entrypoint.dataset_config.sources import HUB_ID
from entrypoint.fetch import captioner as fetching
from entrypoint.fetch import fetch, hub
from entrypoint.fetch.http import RetryPolicy
from entrypoint.settings.checks import Notes, absolute, is_folder
from entrypoint.settings.variables.data import DataSettings
from trainer.captioning import kinds, known
from trainer.data.captions import own_trigger
from trainer.data.folders.own_output import Written
from trainer.data.records import Scan
from trainer.spec.family import CLIP_TOKENS, Facts
from trainer.spec.plan import CaptionerPlan, DataPlan, Dataset, Plan, QuotePlan, Source, Subset
from trainer.spec.rules import captioners, quote
from trainer.spec.values import many, show, some
from trainer.storage.atomic import human_size

logger = logging.getLogger(__name__)

MOST_TOKENS = 256  # of a caption, where CAPTION_MAX_TOKENS is not set: a long paragraph


def captioner_plan(
    settings: DataSettings, datasets: Sequence[Dataset], facts: Facts, *, max_tokens: str, notes: Notes
) -> CaptionerPlan | None:
    """The model that captions; None where CAPTION_WITH is not set. `max_tokens`: PARAMS_MAX_TOKEN_LENGTH.

    Problems and choices go to `notes`.
    """
    subsets = []
    for dataset in datasets:
        subsets += [s for s in dataset.subsets if s.auto_caption and s.source.kind != "generated"]
    if settings.caption_with is None:
        _refuse_companions(settings, notes)
        return None
    try:
        named = captioners.read_name(settings.caption_with)
        source = _checked_source(named.source)
    except ValueError as problem:
        notes.add(f"CAPTION_WITH={show(settings.caption_with)} {problem}.")
        return None
    _check_prompts(subsets, notes)
    if settings.caption_write:
        _check_places(subsets, notes)
    reads = max(tokens for _, tokens in facts.text_readers.values())
    if int(max_tokens) > CLIP_TOKENS and reads == CLIP_TOKENS:
        reads = int(max_tokens)
    limit = settings.caption_max_tokens
    if limit is None:
        limit = min(MOST_TOKENS, reads)
        notes.chose("CAPTION_MAX_TOKENS", limit, f"the text encoder reads {reads}")
    if source != settings.caption_with:
        notes.chose("CAPTION_WITH", source, f"that is {settings.caption_with}")
    plan = CaptionerPlan(
        source,
        revision=named.revision,
        max_tokens=limit,
        words=captioners.most_words(min(limit, reads)),
        overwrite=settings.caption_overwrite,
        write=settings.caption_write,
    )
    return dataclasses.replace(plan, path=source) if is_folder(source) else plan


def _refuse_companions(settings: DataSettings, notes: Notes) -> None:
    """Settings that do nothing without CAPTION_WITH."""
    companions = {
        "CAPTION_PROMPT": settings.caption_prompt,
        "CAPTION_MAX_TOKENS": settings.caption_max_tokens,
        "CAPTION_OVERWRITE": settings.caption_overwrite,
        "CAPTION_WRITE": settings.caption_write,
    }
    for variable, value in companions.items():
        if value:
            shown = str(value).lower() if isinstance(value, bool) else show(value)
            fix = "Fix: set CAPTION_WITH, florence-2 for example, or remove it"
            notes.add(f"{variable}={shown} belongs to CAPTION_WITH, which is not set. {fix}.")


def _checked_source(source: str) -> str:
    """A repository of the Hub, or the whole path of a folder. Raises ValueError, as the rest of a sentence."""
    if is_folder(source):
        return absolute(source)
    allowed = f"Allowed: {', '.join(captioners.SHORT_NAMES)}, a Hub repository like owner/name, or a folder"
    if source.startswith(("/", ".", "~")):
        raise ValueError(f"is not an existing folder. {allowed}")
    if not HUB_ID.fullmatch(source) or "/" not in source:
        raise ValueError(f"is neither a folder nor the name of a repository. {allowed}")
    return source


def _check_prompts(subsets: Sequence[Subset], notes: Notes) -> None:
    """Refuse a prompt that names the trigger word, where there is none."""
    for subset in subsets:
        prompt = subset.caption_prompt
        if prompt is None or subset.is_reg or own_trigger(subset):
            continue
        if prompt == captioners.SUBJECT or captioners.TRIGGER in prompt:
            notes.add(
                f"CAPTION_PROMPT={show(prompt)} speaks of the trigger word, and there is none. Fix: set TRIGGER_WORD, "
                "or CAPTION_PROMPT=plain."
            )
            return


def _check_places(subsets: Sequence[Subset], notes: Notes) -> None:
    """Refuse to write beside images that are unpacked into the cache, where nobody would find the captions."""
    others = [subset.source.public for subset in subsets if subset.source.kind not in ("folder", "")]
    if others:
        notes.add(
            f"CAPTION_WRITE=true: {some(list(dict.fromkeys(others)))}: these images are unpacked into CACHE_PATH, and "
            "captions beside them would be lost there. Fix: remove it (dataset-report.csv has the captions), or name a "
            "folder."
        )


# ---- before a download


def check(plan: Plan, *, written: Written, token: str | None, hub_cache: Path, retries: RetryPolicy) -> int:
    """Check the model that captions; returns the bytes to download, 0 where it is not needed or here already.

    Raises SettingsError, GatedError, UnreachableError.
    """
    captioner = plan.data.captioner
    if captioner is None:
        return 0
    variable = kinds.named(captioner)
    if captioner.path:
        kinds.kind_of(Path(captioner.path), variable=variable)
        logger.info("To fetch for captions: nothing. %s is here.", captioner.path)
        return 0
    here = _with_folders(plan)
    found = fetching.with_known_commit(captioner, token=token, hub_cache=hub_cache)
    cache = Path(plan.output.cache)
    if here is not None:
        data = dataclasses.replace(here, captioner=found)
        if not known.may_lack_captions(data, cache, written):
            logger.info("To fetch for captions: nothing. Every image has one.")
            return 0
    repo = fetching.captioner_repo(captioner, token=token, hub_cache=hub_cache, retries=retries)
    snapshot = fetching.cached(repo)
    if snapshot is not None:
        logger.info("To fetch for captions: nothing. HF_HOME has %s at commit %s.", repo.name, snapshot.commit[:12])
        return 0
    listing = hub.describe(repo)
    files = fetching.wanted_files(repo, listing)
    hub.check_access(repo, listing, files[0].name)
    size = human_size(sum(file.size for file in files))
    licence = f"licence {listing.licence}" if listing.licence else "its page names no licence"
    when = "" if here is not None else ", if an image has no caption"
    logger.info("To fetch for captions%s: %s, %s, %s.", when, repo.name, size, licence)
    return hub.missing_bytes(repo, files)


def _with_folders(plan: Plan) -> DataPlan | None:
    """The data with the folders of its images; None where some are not in folders, and not looked at here."""
    sources = [subset.source for subset in plan.data.subsets if subset.source.kind != "generated"]
    if any(source.kind != "folder" for source in sources):
        return None

    def local(source: Source, _dataset: Dataset) -> Source:
        if source.kind != "folder":
            return source
        return dataclasses.replace(source, path=str(fetch.local_folder(source)))

    return plan.map_sources(local).data


# ---- what a check says


@dataclasses.dataclass(frozen=True)
class Outlook:
    """A scan with the captions that a model has made already, and how many it has still to make."""

    scanned: Scan
    missing: int = 0
    captioner: CaptionerPlan | None = None

    def lines(self, known: QuotePlan) -> list[str]:
        """What the model has to do, and how long that takes as far as it is known."""
        if self.captioner is None:
            return []
        name, total = self.captioner.name, many(len(self.scanned.images), "image")
        made = sum(1 for image in self.scanned.images if image.captioned_by)
        if self.missing:
            line = f"Captions: {name} captions {self.missing} of {total} before training"
            line += f", in at most {self.captioner.max_tokens} tokens each."
            taken = quote.caption_seconds(known, self.missing)
            if taken is None:
                return [f"{line} How long that takes here is known after the first of them."]
            return [f"{line} That takes about {quote.duration(taken)}, predicted."]
        if made:
            return [f"Captions: {many(made, 'image')} of {len(self.scanned.images)} have one of {name} already."]
        return [f"Captions: {name} has nothing to do, each image has a caption."]


def outlook(plan: Plan, scanned: Scan, *, token: str | None, hub_cache: Path) -> Outlook:
    """`plan`: with local folders, and the subsets of the scan."""
    captioner = plan.data.captioner
    if captioner is None:
        return Outlook(scanned)
    captioner = fetching.with_known_commit(captioner, token=token, hub_cache=hub_cache)
    data = dataclasses.replace(plan.data, captioner=captioner)
    answers = known.find_answers(scanned, data, Path(plan.output.cache))
    return Outlook(known.with_captions(scanned, answers, captioner), len(answers.missing), captioner)
