"""`python -m entrypoint.bake BASE_MODEL FOLDER`: put weights into an image while it is built. Jobs find them there.

`tokenizers` in place of BASE_MODEL: the tokenizers of all base models, with which local weight files train
without any network.
"""

from __future__ import annotations

from trainer.process import guard

if __name__ == "__main__":
    guard.begin()  # before everything else is imported: from here on a stop is a stop

import logging
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from entrypoint.fetch import http, local_weights
from entrypoint.fetch.fetch import fetch_model
from entrypoint.fetch.http import RetryPolicy
from trainer.base_model import model_folder
from trainer.process import streams
from trainer.spec.commands.ending import exit_code_of
from trainer.spec.commands.parser import Parser
from trainer.spec.errors import SettingsError, StorageError
from trainer.spec.family import base_models, get_family
from trainer.spec.log_lines import log_to
from trainer.spec.plan import ModelPlan
from trainer.storage import atomic
from trainer.storage.read import read_regular

log = logging.getLogger("entrypoint")
PLACE = Path("/opt/kiln-models")
TOKEN = Path("/run/secrets/hf_token")  # a build secret: it ends up in no layer
COMMIT = "kiln-commit.txt"  # beside the model's own files
TOKENIZERS = "tokenizers"
LONGEST_TOKEN = 2**16  # bytes


def main(arguments: list[str]) -> int:
    """Exit codes as in `trainer.spec.errors`; 64 for a wrong command line."""
    parser = Parser("python -m entrypoint.bake", description="Put a base model's weights into an image.")
    parser.add_argument("base_model", metavar=f"BASE_MODEL|{TOKENIZERS}")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("cache", type=Path, nargs="?", metavar="CACHE", help="for downloads (default: FOLDER)")
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    log_to(logging.StreamHandler(), "%(message)s")
    cache = (options.cache or options.folder) / "hub"
    return exit_code_of(lambda: _bake(options.base_model, options.folder, cache), log)


def _bake(name: str, place: Path, cache: Path) -> None:
    if name == TOKENIZERS:
        _make_folders(place, cache)
        local_weights.bake(place / TOKENIZERS, hub_cache=cache, retries=http.USUAL)
        return
    known = base_models().get(name)
    if known is None or Path(known[1].source).is_absolute():
        wanted = ", ".join(n for n, (_, m) in base_models().items() if not Path(m.source).is_absolute())
        raise SettingsError(f"BAKE_MODEL={name}: allowed are {TOKENIZERS}, {wanted}.")
    token = _token()
    _make_folders(place, cache)
    bake(ModelPlan(name, known[0], known[1].source), place, token=token, cache=cache)


def _make_folders(*folders: Path) -> None:
    """Before anything is downloaded. Raises StorageError where a folder cannot be made."""
    for place in folders:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise StorageError(f"{place} cannot be made: {problem.strerror}. Fix: name a folder.") from problem


def _token() -> str | None:
    """The build secret, if the build has one. Raises SettingsError for what is no text."""
    if not os.path.lexists(TOKEN):
        return None
    try:
        return read_regular(TOKEN, limit=LONGEST_TOKEN).decode("ascii").strip()
    except OSError as problem:
        raise SettingsError(f"HF_TOKEN_FILE cannot be read: {problem.strerror}.") from problem
    except UnicodeDecodeError as problem:
        raise SettingsError("HF_TOKEN_FILE is not a file that holds a token and nothing else.") from problem


def bake(model: ModelPlan, place: Path, *, token: str | None, cache: Path, retries: RetryPolicy = http.USUAL) -> Path:
    """Download the files that a job needs of `model` through `cache`, and copy them below `place`; returns the folder.

    Raises what `fetch_model` raises.
    """
    patterns = get_family(model.family).FACTS.files
    found = fetch_model(model, patterns=patterns, token=token, hub_cache=cache, retries=retries)
    source, target = Path(found.path), folder(model, place)
    names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
    for name in sorted(model_folder.wanted(names, patterns)):
        with atomic.replacing(target / name) as temporary:
            shutil.copyfile(source / name, temporary)  # the snapshot's files are links into the cache
    atomic.write_text(target / COMMIT, f"{found.commit}\n")
    return target


def with_baked(model: ModelPlan, place: Path = PLACE) -> ModelPlan:
    """`model` with the path and commit of the copy in the image, if there is one and no revision is asked for."""
    commit = folder(model, place) / COMMIT
    if model.revision is not None or model_folder.is_local(model) or not commit.is_file():
        return model
    return replace(model, path=str(commit.parent), commit=commit.read_text(encoding="utf-8").strip())


def folder(model: ModelPlan, place: Path) -> Path:
    return place / model.source.replace("/", "--")


if __name__ == "__main__":
    streams.protect()
    sys.exit(main(sys.argv[1:]))
