"""The ladder that a job goes down where memory runs out."""

import logging

import pytest
import torch

from trainer import recompute
from trainer.engine import Engine, rungs
from trainer.errors import SettingsError
from trainer.memory import OFFLOADS
from trainer.plan import EnginePlan

ORDER = {"none": 0, "products": 1, "attention": 2, "all": 3}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("kept", [0, 7])
@pytest.mark.parametrize("policy", ["none", "products", "attention", "all"])
def test_every_rung_takes_less_and_the_last_takes_least(policy, kept, offload):
    ladder = rungs(policy, kept, offload)
    assert ladder[0] == (policy, kept, offload) and ladder[-1][0] == "all" and ladder[-1][2] == "weights"
    costs = [(list(OFFLOADS).index(where), ORDER[p], -k) for p, k, where in ladder]
    assert costs == sorted(set(costs))


def test_each_rung_is_told_and_the_last_is_refused(monkeypatch, caplog):
    monkeypatch.setattr(recompute, "Offload", lambda model, stream: "host")  # which needs an accelerator's streams
    caplog.set_level(logging.WARNING)
    regions = [torch.nn.Linear(4, 4) for _ in range(3)]
    engine = Engine(torch.nn.Sequential(*regions), regions, EnginePlan(recompute="attention", kept_blocks=1))
    recomputed = ["forward" in region.__dict__ for region in regions]
    assert recomputed == [False, True, True] and engine.offload is None
    engine.lower("It does not fit.")
    assert all("forward" in region.__dict__ for region in regions) and engine.offload is None
    engine.lower("It does not fit.")
    assert engine.offload is None and engine.rungs[0] == ("all", 0, "none")
    engine.lower("It does not fit.")
    assert engine.offload == "host" and engine.stream is None
    engine.lower("It does not fit.")
    engine.lower("It does not fit.")
    assert engine.stream is not None and engine.stream.regions == regions
    with pytest.raises(SettingsError, match=r"It does not fit\. Fix: lower PARAMS_BATCH_SIZE"):
        engine.lower("It does not fit.")
    assert len(caplog.records) == 5 and "1 blocks kept whole" in caplog.text


@pytest.mark.parametrize(("host_gib", "last"), [(None, "weights"), (1.0, "weights"), (0.0, "activations")])
def test_weights_go_where_there_is_room_for_them_alone(host_gib, last):
    regions = [torch.nn.Linear(4, 4).requires_grad_(False)]
    assert Engine(regions[0], regions, EnginePlan(host_gib=host_gib)).rungs[-1][2] == last


def test_a_model_with_fewer_regions_than_the_plan_keeps():
    regions = [torch.nn.Linear(4, 4)]
    Engine(regions[0], regions, EnginePlan(recompute="attention", kept_blocks=9))
    assert "forward" not in regions[0].__dict__
