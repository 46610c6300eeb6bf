"""Files of the Hub for `python -m trainer.sample`, by huggingface_hub's own download and in its cache.

A job fetches by `entrypoint.fetch` instead, which goes on after a kill and compares every file with its hash.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trainer.base_model import model_folder, without_weights
from trainer.base_model.without_weights import Vocabulary
from trainer.network import addresses
from trainer.network.errors import HopelessError, TransientError
from trainer.spec.errors import GatedError, SettingsError, StorageError, UnreachableError
from trainer.spec.family import OPTIONAL, BaseModel, Facts
from trainer.storage import atomic
from trainer.storage.read import files_below

log = logging.getLogger(__name__)


def bring_model(model: BaseModel, facts: Facts, patterns: Sequence[str], *, where: str) -> Path:
    """The folder of the model. Downloads the files by `patterns` that the Hub's cache lacks.

    `where`: the option that chose it, for messages. Raises GatedError, UnreachableError, StorageError or SettingsError,
    as a job does.
    """
    if Path(model.source).is_absolute():
        return Path(model.source)
    page = f"{addresses.hub_endpoint(os.environ)}/{model.source}"
    from huggingface_hub import snapshot_download

    log.info("%s: fetching from %s what is not here yet.", where, page)
    plain = [pattern.removeprefix(OPTIONAL) for pattern in patterns]
    with _named_errors(model.source, where=where):
        folder = Path(snapshot_download(model.source, allow_patterns=plain))
    names = {path.relative_to(folder).as_posix() for path in files_below(folder)}
    if missing := model_folder.problems(names, patterns):
        raise UnreachableError(f"{_unreachable(where, page)} Of what is here: {'; '.join(missing)}.")
    model_folder.check_folder(where, folder, patterns, facts)
    return folder


def bring_vocabularies(vocabularies: Sequence[Vocabulary], *, option: str) -> None:
    """Download the tokenizers into the Hub's cache. They are open: no token is sent.

    `option`: how a folder of tokenizers is named. Raises UnreachableError and others with what else would help.
    """
    if not vocabularies:
        return
    addresses.hub_endpoint(os.environ)
    from huggingface_hub import hf_hub_download

    try:
        for vocabulary in vocabularies:
            tokenizer = vocabulary.tokenizer
            log.info("Fetching the tokenizer of %s from %s. It needs no token.", tokenizer.name, tokenizer.repository)
            with _named_errors(tokenizer.repository, where=f"{tokenizer.name}'s tokenizer"):
                for name in tokenizer.files:
                    hf_hub_download(tokenizer.repository, name, token=False)
    except (UnreachableError, GatedError, SettingsError) as problem:
        what = without_weights.what_is_missing(vocabularies)
        way_out = without_weights.way_out(vocabularies, option=option)
        raise type(problem)(f"{what} {problem} {way_out}") from problem


@contextlib.contextmanager
def advised(missing_parts: Callable[[], list[str]]) -> Iterator[None]:
    """Errors of a download say which local files would make it needless."""
    try:
        yield
    except (GatedError, UnreachableError) as problem:
        parts = missing_parts()
        if not parts:
            raise
        raise type(problem)(
            f"{problem} Or use local files, which need neither a token nor this repository: add {', '.join(parts)}."
        ) from problem


@contextlib.contextmanager
def _named_errors(repository: str, *, where: str) -> Iterator[None]:
    """The errors of huggingface_hub, by what they mean for the command. Inside, it speaks through our client."""
    import httpx
    from huggingface_hub import constants, errors, set_client_factory

    from trainer.network.client import open_library_client

    set_client_factory(open_library_client)
    constants.HF_HUB_DISABLE_XET = True  # which would speak through a client of its own
    page = f"{constants.ENDPOINT}/{repository}"
    unreachable = functools.partial(UnreachableError, _unreachable(where, page))
    try:
        yield
    except errors.GatedRepoError as problem:
        raise GatedError(
            f"{where}: the Hub guards {repository} by a licence. Open {page}, accept the conditions, and set "
            "HF_TOKEN to a token of the same account."
        ) from problem
    except errors.RepositoryNotFoundError as problem:
        raise SettingsError(
            f"{where}: the Hub knows no {repository}, or does not show it. Fix: set HF_TOKEN to a token that may "
            f"read {page}."
        ) from problem
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as problem:
        raise unreachable() from problem
    except (httpx.RequestError, TransientError) as problem:
        raise unreachable() from problem
    except HopelessError as problem:
        raise problem.about(where) from problem
    except OSError as problem:
        if problem.errno not in atomic.VOLUME_ERRORS:
            raise unreachable() from problem
        raise StorageError(f"HF_HOME cannot take {repository}: {problem.strerror}.") from problem


def _unreachable(where: str, page: str) -> str:
    return (
        f"{where} is not downloaded yet, and {page} cannot be reached. Fix: check the network and HF_HUB_OFFLINE, or "
        "name a folder or file that is here."
    )
