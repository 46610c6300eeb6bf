"""Full-size models as users have them, in real layouts: read whole, in little of the host's memory, and never twice."""

import pytest
import torch

from bench import full_size, layouts
from trainer.base_model import single_file
from trainer.spec.family import get_family

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["file", "shards"])
@pytest.mark.parametrize("name", full_size.FULL)
def test_a_full_size_model_takes_two_gib_of_the_host_at_most(name, layout, dtype, tmp_path):
    plan = layouts.write_model(tmp_path, name, layout, changes=full_size.FULL[name], dtype=dtype)
    torch.cuda.reset_peak_memory_stats()
    denoiser, row = layouts.measure(plan, tmp_path / "cache", device="cuda")
    print(name, layout, dtype, row)
    assert row["assembled_own_gib"] < 2 and row["placed_own_gib"] < 2
    there = sum(t.nbytes for t in (*denoiser.parameters(), *denoiser.buffers())) / layouts.GIB
    assert row["device_peak_gib"] < 1.1 * there + 1
    folder = single_file.convert_single_files(plan, tmp_path / "cache") / get_family(name).FACTS.parts["denoiser"]
    assert layouts.wrong_weights(folder) == []
