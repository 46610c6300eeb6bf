"""A folder of shards as DATASET_NAME."""

from __future__ import annotations

from tests.support import shards


def test_a_folder_of_shards_trains(job, tmp_path):
    folder = shards.make(tmp_path / "shards", 2, 3)
    code, printed = job.run(DATASET_NAME=str(folder), PARAMS_MAX_STEPS="2", CACHE_PATH=str(tmp_path / "cache"))
    assert code == 0, printed
    assert "6 images, 6 captions" in printed and "2 shards (WebDataset)" in printed
    assert (job.out / "x.safetensors").is_file()
    assert not (tmp_path / "cache" / "datasets").exists()  # nothing is unpacked
