"""The fixtures of all folders, registered by tests/conftest.py. No torch at the top: tests of settings need none."""

import datetime
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from tests.support import drawings
from tests.support.jobs import Job
from tests.support.programs import Programs

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "dreambooth"

# ---- images


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Real photographs with sidecar captions: a folder for each of three subjects."""
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"{PHOTOGRAPHS} is not there")
    return PHOTOGRAPHS


@pytest.fixture(scope="session")
def draw() -> Callable[..., Image.Image]:
    """`draw(width, height, seed=0)`: an image that no turning or flipping leaves as it is."""
    return drawings.draw


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """`make_folder(name, count, size=(64, 48), captions=True)`: a folder of different PNG files with .txt captions."""

    def make(name: str, count: int, *, size: tuple[int, int] = (64, 48), captions: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for i in range(count):
            drawings.draw(*size, seed=i).save(folder / f"{i:02}.png")
            if captions:
                (folder / f"{i:02}.txt").write_text(f"picture {i}, a tag, another tag", encoding="utf-8")
        return folder

    return make


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six drawn images of two shapes with sidecar captions."""
    return drawings.spots(tmp_path_factory.mktemp("images"))


# ---- whole jobs


@pytest.fixture(scope="session")
def all_programs() -> Iterator[Programs]:
    started = Programs()
    yield started
    started.close()


@pytest.fixture
def programs(request: pytest.FixtureRequest, all_programs: Programs) -> Iterator[Programs]:
    """Starts programs; those that still run when the test is over are ended."""
    if not request.node.get_closest_marker("alone"):  # of these, some need none
        all_programs.is_forking()
    yield all_programs
    all_programs.end_all()


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def job(tmp_path: Path, shared_cache: Path, images: Path, programs: Programs) -> Job:
    """A short job on the miniature: 12 steps, no samples."""
    return Job(
        tmp_path,
        {
            "BASE_MODEL": "mini-flux",
            "DATASET_NAME": str(images),
            "OUTPUT_PATH": str(tmp_path / "output"),
            "CACHE_PATH": str(shared_cache),
            "HF_HOME": str(tmp_path / "hf"),
            "OUTPUT_NAME": "x",
            "PARAMS_MAX_STEPS": "12",
            "PARAMS_SAMPLE_EVERY_N_STEPS": "0",
            "PARAMS_SAVE_EVERY_N_STEPS": "4",
            "KEEP_CHECKPOINTS": "3",
            "PARAMS_NETWORK_DIM": "4",
            "SOURCE_DATE_EPOCH": "1700000000",
        },
        programs,
    )


@pytest.fixture
def job_plan(tmp_path: Path):
    """`job_plan(family, **variables)`: the plan of a short job on a miniature, with two images, as if fetched."""
    from tests.support import plans

    return partial(plans.job_plan, tmp_path)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch):
    """`pair(meet)`: what `meet(workers)` returns in the first process and in the second, a fork of this one."""
    from tests.support import pairs
    from trainer.training import distributed

    monkeypatch.setattr(distributed, "NO_TIMEOUT", datetime.timedelta(seconds=10))
    return partial(pairs.meet_in_two, tmp_path)


# ---- small models


@pytest.fixture
def flux_denoiser():
    from tests.support import models

    return models.flux_denoiser()


@pytest.fixture
def flux_vae():
    from tests.support import models

    return models.flux_vae()


@pytest.fixture
def flux_scheduler():
    from tests.support import models

    return models.flux_scheduler()


@pytest.fixture
def text():
    from tests.support import models

    return models.text()


@pytest.fixture
def flux2_denoiser():
    from tests.support import models

    return models.flux2_denoiser()


@pytest.fixture
def sd3_denoiser():
    from tests.support import models

    return models.sd3_denoiser()


@pytest.fixture
def sd3_vae():
    from tests.support import models

    return models.sd3_vae()


@pytest.fixture
def z_image_denoiser():
    from tests.support import models

    return models.z_image_denoiser()


@pytest.fixture
def qwen_image_denoiser():
    from tests.support import models

    return models.qwen_image_denoiser()


@pytest.fixture
def krea2_denoiser():
    from tests.support import models

    return models.krea2_denoiser()


@pytest.fixture
def sdxl_denoiser():
    from tests.support import models

    return models.sdxl_denoiser()


@pytest.fixture
def sdxl_vae():
    from tests.support import models

    return models.sdxl_vae()
