"""A batch that no memory mode can train is refused before anything is downloaded, with the largest that fits."""

import dataclasses
import json
import re

import pytest

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from tests.support.machines import HOME, LARGE_GPU, NOW, SMALL_GPU
from trainer.spec.errors import SettingsError


def planned(base, on, config=None, **variables):
    settings = read_settings({"BASE_MODEL": base, "DATASET_NAME": "org/images", **variables})
    return make_plan(settings, read_manifest(json.dumps(config) if config else None, None), on, now=NOW)


def refusal(*arguments, **options):
    with pytest.raises(SettingsError) as caught:
        planned(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("base", ["flux", "sdxl", "sd3"])
def test_the_largest_batch_that_is_named_fits_and_the_next_sizes_do_not(base):
    message = refusal(base, SMALL_GPU, PARAMS_BATCH_SIZE="256")
    assert "PARAMS_BATCH_SIZE=256" in message and "24 GiB" in message
    largest = int(re.search(r"largest batch that fits is (\d+)", message)[1])
    planned(base, SMALL_GPU, PARAMS_BATCH_SIZE=str(largest))
    assert "largest batch" in refusal(base, SMALL_GPU, PARAMS_BATCH_SIZE=str(round(1.3 * largest)))
    batch, accumulation = re.search(
        r"PARAMS_BATCH_SIZE=(\d+) with PARAMS_GRADIENT_ACCUMULATION=(\d+)", message
    ).groups()
    assert int(batch) <= largest and 256 <= int(batch) * int(accumulation) < 256 + int(accumulation)


def test_a_batch_from_dataset_json_is_named_as_such():
    config = {"datasets": [{"resolution": 1024, "batch_size": 200, "subsets": [{}]}]}
    assert "batch_size of dataset.json=200" in refusal("flux", SMALL_GPU, config)


def test_a_rank_or_resolution_that_does_not_fit_is_refused_with_one_that_does():
    message = refusal("flux", HOME, PARAMS_NETWORK_DIM="1024")
    rank = re.search(r"PARAMS_NETWORK_DIM=(\d+)", message)[1]
    planned("flux", HOME, PARAMS_NETWORK_DIM=rank)
    assert "PARAMS_RESOLUTION=1024" in refusal("sdxl", HOME, PARAMS_RESOLUTION="8192")


def test_a_precision_that_alone_does_not_fit_is_named():
    options = {"PARAMS_BATCH_SIZE": "8", "PARAMS_PRECISION": "bf16"}
    assert "With PARAMS_PRECISION=auto instead of bf16 it fits." in refusal("flux", SMALL_GPU, **options)


def test_a_limit_of_memory_counts():
    assert "5 GiB" in refusal("flux", LARGE_GPU, MEMORY_LIMIT_GIB="5", PARAMS_BATCH_SIZE="16")


@pytest.mark.parametrize(("base", "gib"), [("sdxl", 5.0), ("sd3", 8.0), ("flux", 8.0), ("flux", 5.0)])
def test_jobs_that_ran_under_a_cap_are_not_refused(base, gib):
    """docs/performance.md has the whole jobs that ran under these caps."""
    planned(base, dataclasses.replace(HOME, memory_gib=gib))
