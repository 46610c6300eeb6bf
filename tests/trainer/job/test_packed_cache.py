"""A job whose cache is in packs trains as one whose cache is files."""

import json
import logging

from trainer.data import cache as caching
from trainer.job.run import run
from trainer.training.stop_flag import StopFlag

STEPS = 4


def trained(job_plan, folder, name, **changes):
    """Losses, and the bytes of the LoRA, of a job with folders of its own."""
    settings = {"PARAMS_MAX_STEPS": str(STEPS), "PARAMS_SAMPLE_EVERY_N_STEPS": "4", **changes}
    plan = job_plan("sdxl", OUTPUT_PATH=str(folder / name), CACHE_PATH=str(folder / f"{name} cache"), **settings)
    run(plan, StopFlag())
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], (folder / name / "x.safetensors").read_bytes()


def files_of(folder):
    return [path for kind in ("latents", "text") for path in (folder / kind).rglob("*") if path.is_file()]


def test_packs_and_files_train_alike_and_are_found_again(job_plan, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    options = {"SHUFFLE_CAPTION": "true", "FLIP_AUG": "true"}
    files = trained(job_plan, tmp_path, "files", **options)
    assert len(files_of(tmp_path / "files cache")) > 8
    monkeypatch.setattr(caching, "PACKED_FROM", 1)
    packs = trained(job_plan, tmp_path, "packs", **options)
    assert {path.suffix for path in files_of(tmp_path / "packs cache")} == {".pack", ".index"}
    assert packs[0] == files[0] and len(packs[0]) == STEPS
    caplog.clear()
    monkeypatch.undo()
    caplog.set_level(logging.INFO)
    (tmp_path / "packs cache").rename(tmp_path / "again cache")
    again = trained(job_plan, tmp_path, "again", **options)
    assert "latents are in the cache" in caplog.text and "captions are in the cache" in caplog.text
    assert again[0] == files[0]
