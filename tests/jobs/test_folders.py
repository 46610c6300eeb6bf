"""Folders as people bring them, through whole jobs: kohya's, and one that the job itself writes into."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest


def header(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"]


@pytest.fixture
def kohya(tmp_path: Path, photographs: Path) -> Path:
    """Real photographs, as kohya's GUI lays them out."""
    folder = tmp_path / "kohya"
    for name, source in {"img/10_ohwx dog": "dog", "img/5_zot style": "can", "reg/1_pot": "teapot"}.items():
        (folder / name).mkdir(parents=True)
        for image in sorted((photographs / source).glob("*.jpg"))[:2]:
            shutil.copy(image, folder / name)
    (folder / "img/5_zot style/00.txt").write_text("a can")
    return folder


def test_kohyas_folders_through_a_whole_job(job, kohya):
    code, printed = job.run(DATASET_NAME=str(kohya), TRIGGER_WORD="ohwx", PARAMS_MAX_STEPS="2")
    assert code == 0, printed
    assert "folder img/10_ohwx dog: 10 repeats, caption 'ohwx dog' where an image has none; 2 images" in printed
    assert "6 images × repeats = 60 examples an epoch" in printed
    folders = json.loads(header(job.out / "x.safetensors")["ss_dataset_dirs"])
    assert folders == {
        "10_ohwx dog": {"n_repeats": 10, "img_count": 2},
        "5_zot style": {"n_repeats": 5, "img_count": 2},
        "1_pot": {"n_repeats": 1, "img_count": 2},
    }
    table = (job.out / "dataset-report.csv").read_text(encoding="utf-8-sig")
    assert '"reg/1_pot/00.jpg","0.3","used","regularisation image"' in table
    assert '"ohwx dog","ohwx dog"' in table and '"a can","ohwx, a can"' in table and '"pot","pot"' in table


def test_the_check_reads_kohyas_folders_as_the_job_does(job, kohya):
    code, printed = job.run("--check", DATASET_NAME=str(kohya / "img"), PARAMS_NUM_REPEATS="2", PARAMS_MAX_STEPS="2")
    assert code == 0, printed
    assert "WARNING" in printed and "num_repeats 2 is set, and wins over 10 in its name" in printed
    code, printed = job.run("--check", DATASET_NAME=str(kohya / "img/10_ohwx dog"), PARAMS_MAX_STEPS="2")
    assert code == 0 and "folder 10_ohwx dog: 10 repeats" in printed, printed


@pytest.mark.parametrize("output", ["output", "."])
def test_a_job_that_writes_into_its_datasets_folder_resumes(job, images, output):
    folder = job.folder / "mine"
    shutil.copytree(images, folder)
    inside = {
        "DATASET_NAME": str(folder),
        "OUTPUT_PATH": str(folder / output),
        "CACHE_PATH": str(folder / "cache"),
        "PARAMS_SAMPLE_EVERY_N_STEPS": "2",
    }
    job.environment |= inside
    process = job.start(PARAMS_MAX_STEPS="400")
    job.wait_for_step(process, 6)
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 143, printed
    assert list((job.out / "sample").glob("*.png"))
    step = job.metrics()[-1]["step"]
    process = job.start(PARAMS_MAX_STEPS="400")
    job.wait_for_step(process, step + 2)
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 143, printed
    assert "Images: 6 found, 6 used, 0 skipped." in printed and "Resumed at step" in printed
    assert "cache (the CACHE_PATH of this job)" in (job.out / "dataset-report.txt").read_text()


def test_a_folder_without_a_readable_image_is_refused_by_the_check(job):
    folder = job.folder / "phone"
    folder.mkdir()
    for i in range(5):
        (folder / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    code, printed = job.run("--check", DATASET_NAME=str(folder))
    assert code == 65, printed
    assert "IMG_0.HEIC: format .HEIC is not read: save it as PNG or JPEG" in printed and "IMG_4.HEIC" in printed
    assert "Traceback" not in printed and not job.out.exists()
