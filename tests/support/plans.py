"""The plans of short jobs."""

import dataclasses
from datetime import UTC, datetime

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from entrypoint.system.hardware import Hardware
from tests.support.drawings import draw
from tests.support.miniatures import base


def job_plan(folder, family, **variables):
    """The plan of a short job on a miniature, with two images, as if fetched; all of it below `folder`."""
    images = folder / "pictures"
    images.mkdir(exist_ok=True)
    for i, caption in enumerate(("a red circle", "a blue square on a green background")):
        draw(128, 128, seed=i).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(caption)
    asked = {
        "BASE_MODEL": base(family), "DATASET_NAME": str(images), "OUTPUT_PATH": str(folder / "out"),
        "CACHE_PATH": str(folder / "cache"), "OUTPUT_NAME": "x", "BACKEND": "cpu",
        "PARAMS_SAMPLE_EVERY_N_STEPS": "0", "PARAMS_SAVE_EVERY_N_STEPS": "0", "PARAMS_MAX_EPOCHS": "5",
    } | variables  # fmt: skip
    made = make_plan(
        read_settings(asked),
        read_manifest(asked.get("DATASET_CONFIG"), None),
        Hardware("cpu", "x86_64", 8.0, 0, "", 8.0, 2),
        now=datetime(2026, 1, 2, tzinfo=UTC),
    )
    sources = [[dataclasses.replace(s, source=dataclasses.replace(s.source, path=s.source.location))
                for s in d.subsets] for d in made.data.datasets]  # fmt: skip
    datasets = [dataclasses.replace(d, subsets=tuple(s)) for d, s in zip(made.data.datasets, sources, strict=True)]
    model = dataclasses.replace(made.model, path=made.model.source)
    return dataclasses.replace(made, model=model, data=dataclasses.replace(made.data, datasets=tuple(datasets)))
