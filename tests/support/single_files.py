"""Single files and folders of weights, read through the settings, the plan and the fetcher, as a job reads them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.fetch.fetch import fetch_model
from entrypoint.planning.plan import make_plan
from entrypoint.planning.single_files import file_patterns
from entrypoint.settings.read import read_settings
from tests.support.machines import CPU
from trainer.base_model import single_file
from trainer.spec.family import get_family


def model_folder(tmp_path: Path, name: str, **variables: str) -> Path:
    """The folder that a job with these variables reads its weights from."""
    (tmp_path / "pictures").mkdir(exist_ok=True)
    settings = read_settings({"BASE_MODEL": f"mini-{name}", "DATASET_NAME": str(tmp_path / "pictures"), **variables})
    manifest = read_manifest(settings.data.dataset_config, settings.output.sample_prompts)
    plan = make_plan(settings, manifest, CPU, now=datetime(2025, 1, 1, tzinfo=UTC))
    needed = file_patterns(get_family(name).FACTS, plan.model.parts)
    model = fetch_model(plan.model, patterns=needed, token=None)
    return single_file.convert_single_files(model, tmp_path / "cache")
