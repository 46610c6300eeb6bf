"""`python -m entrypoint.bake BASE_MODEL FOLDER`: put weights into an image while it is built. Jobs find them there.

`tokenizers` in place of BASE_MODEL: the tokenizers of all base models, a few MB, with which local weight files train
without any network.
"""

from __future__ import annotations

from trainer.process import guard

if __name__ == "__main__":
    guard.begin()  # before everything else is imported: from here on a stop is a stop

import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from entrypoint.fetch import http, local_weights
from entrypoint.fetch.fetch import fetch_model
from entrypoint.fetch.http import RetryPolicy
from trainer.base_model import model_folder
from trainer.process import streams
from trainer.spec.errors import KilnError, SettingsError
from trainer.spec.family import base_models, get_family
from trainer.spec.log_lines import log_to
from trainer.spec.plan import ModelPlan

PLACE = Path("/opt/kiln-models")
TOKEN = Path("/run/secrets/hf_token")  # a build secret: it ends up in no layer
COMMIT = "kiln-commit.txt"  # beside the model's own files
TOKENIZERS = "tokenizers"
USAGE = f"usage: python -m entrypoint.bake BASE_MODEL|{TOKENIZERS} FOLDER [CACHE]"


def main(arguments: list[str]) -> int:
    """Exit codes as in `trainer.spec.errors`; 64 for a wrong command line."""
    log_to(logging.StreamHandler(), "%(message)s")
    if len(arguments) not in (2, 3):
        print(USAGE, file=sys.stderr)  # noqa: T201
        return 64
    token = TOKEN.read_text(encoding="utf-8").strip() if TOKEN.is_file() else None
    try:
        if arguments[0] == TOKENIZERS:
            cache = Path(arguments[-1]) / "hub"
            local_weights.bake(Path(arguments[1]) / TOKENIZERS, hub_cache=cache, retries=http.USUAL)
            return 0
        known = base_models().get(arguments[0])
        if known is None or Path(known[1].source).is_absolute():
            wanted = ", ".join(n for n, (_, m) in base_models().items() if not Path(m.source).is_absolute())
            raise SettingsError(f"BAKE_MODEL={arguments[0]}: allowed are {TOKENIZERS}, {wanted}.")
        model = ModelPlan(arguments[0], known[0], known[1].source)
        bake(model, Path(arguments[1]), token=token, cache=Path(arguments[-1]) / "hub")
    except KilnError as problem:
        logging.error("%s", problem)
        return problem.exit_code
    return 0


def bake(model: ModelPlan, place: Path, *, token: str | None, cache: Path, retries: RetryPolicy = http.USUAL) -> Path:
    """Download the files that a job needs of `model` through `cache`, and copy them below `place`; returns the folder.

    Raises what `fetch_model` raises.
    """
    patterns = get_family(model.family).FACTS.files
    found = fetch_model(model, patterns=patterns, token=token, hub_cache=cache, retries=retries)
    source, target = Path(found.path), folder(model, place)
    names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
    for name in sorted(model_folder.wanted(names, patterns)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)  # the snapshot's files are links into the cache
    (target / COMMIT).write_text(f"{found.commit}\n", encoding="utf-8")
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
