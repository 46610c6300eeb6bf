"""Which memory mode a job takes whose weights are to be sharded over GPUs."""

import dataclasses
from types import SimpleNamespace

import pytest

from tests.support.machines import FULL
from trainer.engine.memory import sharding
from trainer.job.build import with_reachable_shards
from trainer.spec.errors import SettingsError
from trainer.spec.family import base_models
from trainer.spec.memory_model import weights_gib

PEERS = object()
WORKERS = SimpleNamespace(peers=lambda: PEERS)


def asked(job_plan, *, automatic=("PARAMS_OFFLOAD",), host_gib=None, base=None, offload="shards"):
    plan = job_plan("flux", NUM_GPUS="2")
    engine = dataclasses.replace(plan.engine, offload=offload, precision="fp8", recompute="none", host_gib=host_gib)
    model = dataclasses.replace(plan.model, base=base or plan.model.base)
    return dataclasses.replace(plan, engine=engine, model=model, automatic=automatic)


@pytest.fixture
def apart(monkeypatch):
    """Adds to the list whether the host's memory was compared."""
    compared = []

    def unreachable(peers, device, *, against_host):
        compared.append(against_host)
        return "the GPUs cannot read each other's memory (no)"

    monkeypatch.setattr(sharding, "unreachable", unreachable)
    return compared


def test_weights_are_sharded_where_gpus_reach_each_other(job_plan, monkeypatch):
    monkeypatch.setattr(sharding, "unreachable", lambda peers, device, against_host: "" if peers is PEERS else "no")
    plan = asked(job_plan)
    assert with_reachable_shards(plan, WORKERS) == (plan, PEERS)


def test_other_plans_are_left_alone(job_plan, apart):
    plan = asked(job_plan, offload="activations")
    assert with_reachable_shards(plan, WORKERS) == (plan, None)


def test_auto_streams_the_weights_from_the_host_where_gpus_do_not_reach_each_other(job_plan, apart, caplog):
    plan, peers = with_reachable_shards(asked(job_plan), WORKERS)
    assert (plan.engine.recompute, plan.engine.offload, peers) == ("all", "weights", None)
    assert "PARAMS_OFFLOAD=weights instead of shards: the GPUs cannot read each other's memory (no)." in caplog.text
    assert apart == [True]


def test_what_was_asked_for_is_not_replaced(job_plan, apart):
    with pytest.raises(SettingsError, match=r"PARAMS_OFFLOAD=shards: .* Fix: set PARAMS_OFFLOAD=auto or weights\."):
        with_reachable_shards(asked(job_plan, automatic=()), WORKERS)
    assert apart == [False]


@pytest.mark.parametrize(("share", "fits"), [(1.01, True), (0.99, False)])
def test_the_host_must_have_the_memory(job_plan, apart, share, fits):
    footprint = base_models()[FULL][1].footprint
    needed = weights_gib(footprint, asked(job_plan).lora.rank, "fp8")
    plan = asked(job_plan, host_gib=needed * share, base=FULL)
    if fits:
        assert with_reachable_shards(plan, WORKERS)[0].engine.offload == "weights"
        return
    fix = r"NUM_GPUS=2: the GPUs .* each process may take .* Fix: take larger cards, or cards with NVLink\.$"
    with pytest.raises(SettingsError, match=fix):
        with_reachable_shards(plan, WORKERS)
    in_4_bits = fix.replace("take larger", "set PARAMS_PRECISION=nf4, take larger")
    plan = dataclasses.replace(plan, automatic=("PARAMS_OFFLOAD", "PARAMS_PRECISION"))
    with pytest.raises(SettingsError, match=in_4_bits):
        with_reachable_shards(plan, WORKERS)
    plan = dataclasses.replace(plan, engine=dataclasses.replace(plan.engine, precision="nf4", host_gib=0.0))
    with pytest.raises(SettingsError, match=fix):
        with_reachable_shards(plan, WORKERS)
