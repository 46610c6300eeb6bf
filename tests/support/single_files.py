"""Single files and folders of weights, read through the settings, the plan and the fetcher, as a job reads them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.fetch.fetch import fetch_model
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from tests.support.machines import CPU
from trainer.base_model import single_file
from trainer.base_model.model_folder import file_patterns
from trainer.spec.family import facts_of
from trainer.spec.plan import ModelPlan


def planned(environment: Mapping[str, str]) -> ModelPlan:
    """The plan's section for the model. Raises SettingsError."""
    settings = read_settings(environment)
    manifest = read_manifest(settings.data.dataset_config, settings.output.sample_prompts)
    return make_plan(settings, manifest, CPU, now=datetime(2025, 1, 1, tzinfo=UTC)).model


def model_folder(tmp_path: Path, name: str, **variables: str) -> Path:
    """The folder that a job with these variables reads its weights from. `name`: of a family, whose miniature it is."""
    (tmp_path / "pictures").mkdir(exist_ok=True)
    base = f"mini-{name.replace('_', '-')}"
    plan = planned({"BASE_MODEL": base, "DATASET_NAME": str(tmp_path / "pictures"), **variables})
    needed = file_patterns(facts_of(plan.family, plan.base), plan.parts)
    model = fetch_model(plan, patterns=needed, token=None)
    return single_file.convert_single_files(model, tmp_path / "cache")
