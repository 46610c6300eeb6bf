"""The memory modes that a job falls back to when memory runs out."""

import logging

import pytest
import torch

from trainer.engine import execution
from trainer.engine.execution import Engine
from trainer.spec.errors import SettingsError
from trainer.spec.plan import EnginePlan
from trainer.spec.strategies import OFFLOADS, fallbacks

ORDER = {"none": 0, "products": 1, "attention": 2, "all": 3}


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("kept", [0, 7])
@pytest.mark.parametrize("policy", ["none", "products", "attention", "all"])
@pytest.mark.parametrize("compiled", [False, True])
def test_every_fallback_takes_less_memory_and_the_last_takes_least(compiled, policy, kept, offload):
    modes = fallbacks(policy, kept, offload, compiled=compiled)
    assert modes[0] == (policy, kept, offload) and modes[-1][0] == "all" and modes[-1][2] == "weights"
    # Full recompute takes more of the device than the offload before it, but no host memory, which may be missing.
    spare = ("all", 0, "none") if compiled and offload == "none" and policy != "all" else None
    costs = [(list(OFFLOADS).index(where), ORDER[p], -k) for p, k, where in modes if (p, k, where) != spare]
    assert costs == sorted(set(costs)) and (spare is None or spare in modes)


def test_each_fallback_is_logged_and_after_the_last_the_job_is_refused(monkeypatch, caplog):
    # The real one needs an accelerator's streams.
    monkeypatch.setattr(execution, "ActivationOffload", lambda model, weight_streamer, limit_gib: "host")
    caplog.set_level(logging.WARNING)
    regions = [torch.nn.Linear(4, 4) for _ in range(3)]
    plan = EnginePlan(recompute="attention", kept_blocks=1, compile=False)
    one = Engine(torch.nn.Sequential(*regions), regions, plan)
    recomputed = ["forward" in region.__dict__ for region in regions]
    assert recomputed == [False, True, True] and one.offload is None
    one.step_down("It does not fit.")
    assert all("forward" in region.__dict__ for region in regions) and one.offload is None
    one.step_down("It does not fit.")
    assert one.offload is None and one.fallbacks[0] == ("all", 0, "none") and one.can_capture(1)
    one.step_down("It does not fit.")
    assert one.offload == "host" and one.weight_streamer is None and one.can_capture() and not one.can_capture(1)
    one.step_down("It does not fit.")
    assert one.weight_streamer is not None and one.weight_streamer.regions == regions and not one.can_capture()
    with pytest.raises(SettingsError, match=r"It does not fit\. Fix: lower PARAMS_BATCH_SIZE"):
        one.step_down("It does not fit.")
    assert len(caplog.records) == 4 and "except in 1 blocks" in caplog.text


@pytest.mark.parametrize(("host_gib", "last"), [(None, "weights"), (1.0, "weights"), (0.0, "activations")])
def test_weights_are_streamed_only_if_host_memory_holds_them(host_gib, last):
    regions = [torch.nn.Linear(4, 4).requires_grad_(False)]
    assert Engine(regions[0], regions, EnginePlan(host_gib=host_gib)).fallbacks[-1][2] == last


def test_a_plan_with_sharded_weights_needs_a_model_that_is():
    with pytest.raises(AssertionError, match="sharded when they are loaded"):
        Engine(torch.nn.Linear(4, 4), [torch.nn.Linear(4, 4)], EnginePlan(offload="shards", num_gpus=2))


def test_a_model_may_have_fewer_regions_than_the_plan_exempts_from_recompute():
    regions = [torch.nn.Linear(4, 4)]
    Engine(regions[0], regions, EnginePlan(recompute="attention", kept_blocks=9))
    assert "forward" not in regions[0].__dict__
