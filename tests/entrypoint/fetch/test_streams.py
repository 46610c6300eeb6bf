"""Which places are streamed, and how their shards come and go."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from entrypoint.fetch import http, streams
from entrypoint.fetch.doors.keys import NO_KEYS, Keys
from entrypoint.fetch.fetch import fetch_source
from tests.support.hub import Hub
from trainer.data.shards.stream import ShardStream
from trainer.spec.errors import GatedError
from trainer.spec.plan import (
    DataPlan,
    Dataset,
    EnginePlan,
    LoraPlan,
    ModelPlan,
    OptimPlan,
    OutputPlan,
    Plan,
    Source,
    Subset,
    TrainPlan,
)

QUICK = http.RetryPolicy(budget=2.0, unreached=0.2, first_wait=0.01, longest_wait=0.02, timeout=5.0)
WHERE = "hf://buckets/me/photos"
SHARDS = {"0.tar": b"first" * 20, "deep/1.tar": b"second" * 20}
TOKEN = "hf_cAnary"


@pytest.fixture
def hub(monkeypatch):
    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        listed = [
            {"type": "file", "path": path, "size": len(data), "xetHash": f"{len(data):064x}"}
            for path, data in SHARDS.items()
        ]
        running.plain["/api/buckets/me/photos/tree"] = json.dumps(listed).encode()
        running.plain |= {f"/buckets/me/photos/resolve/{path}": data for path, data in SHARDS.items()}
        yield running


def streamed(tmp_path):
    """The plan of a job whose shards do not all fit, and their stream."""
    source = fetch_source(
        Source("bucket", WHERE), cache=tmp_path, token=TOKEN, keys=NO_KEYS, retries=QUICK, most=150, owner="out"
    )
    stream = ShardStream.of(Path(source.path))
    assert stream is not None and stream.names() == [*SHARDS]
    plan = Plan(
        model=ModelPlan("mini-flux", "flux", ""),
        data=DataPlan((Dataset((Subset(source),), (64, 64)),)),
        lora=LoraPlan(),
        optim=OptimPlan(),
        train=TrainPlan(),
        engine=EnginePlan(),
        output=OutputPlan(str(tmp_path / "out"), "x", str(tmp_path)),
    )
    return plan, stream


def test_shards_of_a_bucket_of_the_hub_come_with_the_token_and_go(hub, tmp_path):
    plan, stream = streamed(tmp_path)
    with streams.serving(plan, Keys(hub=TOKEN), retries=QUICK):
        for name in SHARDS:
            stream.want([name])
            assert stream.wait(name).read_bytes() == SHARDS[name]
        while (stream.root / "0.tar").exists():
            time.sleep(0.01)
    assert (stream.root / "deep/1.tar").exists()
    assert hub.log and all(asked.authorized for asked in hub.log)


def test_a_shard_that_is_refused_is_named_with_its_place_and_key(hub, tmp_path):
    plan, stream = streamed(tmp_path)
    hub.fault("/buckets/me/photos/resolve/0.tar", status=403)
    with streams.serving(plan, Keys(hub=TOKEN), retries=QUICK):
        stream.want(["0.tar"])
        with pytest.raises(GatedError, match=f"{WHERE}: 0.tar: .*HF_TOKEN"):
            stream.wait("0.tar")


def test_a_place_that_does_not_say_all_sizes_is_not_streamed(tmp_path):
    rows = [("0.tar", 100, "a"), ("1.tar", 100, "b")]
    assert streams.are_needed(rows, tmp_path, most=150)
    assert not streams.are_needed(rows, tmp_path, most=200)
    assert not streams.are_needed([*rows, ("2.tar", -1, "c")], tmp_path, most=150)
