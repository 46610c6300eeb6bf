"""Sharded weights: the same bits as with all weights on each device, of which each process keeps its part alone.

In most tests the processes are threads, which map each other's parts as processes do.
"""

import copy
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from entrypoint.system.environment import child_environment
from tests.support.streamed_models import fetched_again, model, step
from trainer.engine.execution import Engine
from trainer.engine.memory import checkpointing, sharding
from trainer.engine.memory.sharding import Peers, Shards, unreachable
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.spec.errors import KilnError, SettingsError
from trainer.spec.family import get_family
from trainer.spec.plan import EnginePlan


@pytest.fixture(autouse=True)
def roomy_weights(monkeypatch):
    """Adapters ride in the products of narrow layers as well."""
    monkeypatch.setattr("trainer.spec.adapter_columns.MIN_SIDE_PER_COLUMN", 0)


WAIT_S = 60


def wait_for(path):
    until = time.monotonic() + WAIT_S
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.001)


def together(folder, count, task):
    """What `task` returns for the peers of each process, all at once."""
    answers, meeting = {}, threading.Barrier(count)

    def all_agree(answer):
        answers.setdefault(threading.get_ident(), []).append(answer)
        meeting.wait(60)
        agreed = all(given[-1] for given in answers.values())
        meeting.wait(60)
        return agreed

    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(task, Peers(n, count, folder, wait_for, all_agree)) for n in range(count)]
        return [each.result() for each in running]


def sharded_models(folder, count, name, precision, *, fused=False):
    """Of each process: its denoiser and streamer. A model is made by one thread at a time, for the seeds are global."""
    kind = get_family(name)
    placing = threading.Lock()

    def place(peers):
        class Later(Shards):
            def connect(self, slot):  # by all at once, when all models are made
                pass

        with placing:
            denoiser, streamer = model(name, precision, shards=Later(peers, "cpu"), fused=fused)
        Shards.connect(streamer.shards, streamer.slots[0])
        assert streamer.shards.gb_per_s > 0
        return kind.regions(denoiser), denoiser, streamer

    return together(folder, count, place)


CASES = [  # fused: by our own forward passes of blocks
    *(("flux", "fused", policy) for policy in checkpointing.POLICIES),
    *((name, "fused", "none") for name in ("flux2", "sd3", "z_image", "qwen_image", "krea2")),
    ("flux2", "fused", "products"),
    ("flux", "fp8", "none"),
    *(("flux2", "bf16", policy) for policy in ("none", "attention")),
    ("sdxl", "bf16", "products"),
    ("sd3", "int8", "none"),
    ("z_image", "nf4", "all"),
    ("qwen_image", "fp8", "products"),
    ("krea2", "fp8", "none"),
]


@pytest.mark.parametrize(("name", "precision", "policy"), CASES)
def test_a_step_has_the_same_bits_with_sharded_weights(tmp_path, name, precision, policy):
    """Each process runs as many passes as it likes, of what it likes."""
    fused = precision == "fused"
    precision = "fp8" if fused else precision
    alone, _ = model(name, precision, fused=fused)
    regions = get_family(name).regions(alone)
    checkpointing.apply(regions, [policy] * len(regions), compiled=False)
    wanted = [step(name, alone, None, seed) for seed in (3, 4)]
    for number, (own_regions, denoiser, streamer) in enumerate(
        sharded_models(tmp_path, 2, name, precision, fused=fused)
    ):
        engine = Engine(denoiser, own_regions, EnginePlan(recompute=policy, offload="shards"), streamer)
        for seed in range(3, 4 + number):
            with engine.forward_backward():
                found = step(name, denoiser, engine.saved_tensors, seed)
            assert len(found) > 10 and all(torch.equal(a, b) for a, b in zip(found, wanted[seed - 3], strict=True))
            assert streamer.occupants == [None, None]  # nothing for a captured pass to find, or to be found of it


@pytest.mark.parametrize("count", [2, 3, 8])
def test_each_process_keeps_its_share_of_the_bytes(tmp_path, count):
    whole, _ = model("flux", "fp8")
    regions = get_family("flux").regions(whole)
    frozen = [t for r in regions for t in (*r.parameters(), *r.buffers()) if not t.requires_grad]
    of_regions = sum(t.nbytes for t in frozen)
    for _, denoiser, streamer in sharded_models(tmp_path, count, "flux", "fp8"):
        kept = {}  # all memory that the denoiser and its streamer hold, each piece once
        for tensor in (*denoiser.parameters(), *denoiser.buffers(), *streamer.slots, *streamer.shards.own):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        all_of_it = sum(t.untyped_storage().nbytes() for t in {*whole.parameters(), *whole.buffers()})
        in_slots = sum(slot.nbytes for slot in streamer.slots)
        fill = len(streamer.regions) * count * 256 + 256 * len(frozen)  # alignment
        assert sum(kept.values()) <= all_of_it - of_regions + of_regions / count + in_slots + fill
        assert streamer.shards.own_bytes <= of_regions / count + fill
        assert in_slots == 2 * max(streamer.sizes)


def test_any_number_of_processes_share_regions_of_any_size(tmp_path):
    x_MK = torch.randn(3, 17)
    layers = [torch.nn.Linear(17, 5 + n).requires_grad_(False) for n in range(4)]
    wanted = [layers[n](x_MK) for n in (0, 1, 2, 3, 3, 0, 2)] + [x_MK]
    for count in (1, 2, 5):
        folder = tmp_path / str(count)
        folder.mkdir()

        def outputs(peers):
            streamer = WeightStreamer("cpu", shards=Shards(peers, "cpu"))
            regions = [*copy.deepcopy(layers), torch.nn.Identity()]
            for region in regions:
                streamer.add_region(region)
            streamer.allocate_slots()
            streamer.attach()
            return [regions[n](x_MK) for n in (0, 1, 2, 3, 3, 0, 2)] + [regions[4](x_MK)]

        for found in together(folder, count, outputs):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_others_weights_come_from_them(tmp_path):
    """What a process reads is what the other one has at that moment: there is no second copy."""
    (_, _, first), (_, _, second) = sharded_models(tmp_path, 2, "flux", "bf16")
    size = first.shards.own[0].nbytes
    before = first.load(0)[: 2 * size].clone()
    second.shards.own[0].fill_(7)
    first.forget()
    after = first.load(0)[: 2 * size]
    assert torch.equal(after[:size], before[:size]) and (after[size:] == 7).all() and (before[size:] != 7).any()


def test_processes_that_stored_other_weights_are_noticed(tmp_path):
    def differing(peers):
        shards = Shards(peers, "cpu")
        shards.keep(torch.full((shards.size_of(1000),), peers.number, dtype=torch.uint8))
        with pytest.raises(KilnError, match=r"reads other weights .* Fix: set PARAMS_OFFLOAD=weights\."):
            shards.connect(torch.empty(shards.size_of(1000), dtype=torch.uint8))

    together(tmp_path, 2, differing)


def test_whether_memory_can_be_read_is_tried_and_all_agree(tmp_path, monkeypatch):
    assert together(tmp_path, 3, lambda peers: unreachable(peers, "cpu", against_host=True)) == ["", "", ""]
    opened = Shards._open

    def refused(self, handle, size):
        if self.peers.number == 1:
            raise RuntimeError("CUDA error: peer access is not supported\nmore")
        return opened(self, handle, size)

    folder = tmp_path / "again"
    folder.mkdir()
    monkeypatch.setattr(Shards, "_open", refused)
    found = together(folder, 2, lambda peers: unreachable(peers, "cpu"))
    why = "process 1: CUDA error: peer access is not supported"
    assert found == [f"the GPUs cannot read each other's memory ({why})"] * 2


def test_a_process_of_another_machine_may_be_the_one_that_cannot(tmp_path):
    def alone(peers):
        """Two machines with one process each, of which the second cannot."""
        here = Peers(0, 1, tmp_path / str(peers.number), wait_for, peers.all_agree)
        here.folder.mkdir()
        return sharding._said_by_any(here, "broken" if peers.number else "")

    assert together(tmp_path, 2, alone) == ["says a process of another machine", "broken"]


def test_a_process_without_memory_for_the_trial_keeps_no_other_waiting(tmp_path, monkeypatch):
    """It fails before the first exchange, in which the others would wait for it."""
    keep = Shards.keep

    def full(self, region_N):
        if self.peers.number == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        keep(self, region_N)

    monkeypatch.setattr(Shards, "keep", full)
    monkeypatch.setattr(sys.modules[__name__], "WAIT_S", 5)
    found = together(tmp_path, 2, lambda peers: unreachable(peers, "cpu"))
    assert found == ["the GPUs cannot read each other's memory (process 1: CUDA out of memory.)"] * 2


@pytest.mark.parametrize(("host", "count", "is_slow"), [(30.0, 2, False), (50.0, 2, True), (50.0, 1, False)])
def test_memory_that_is_read_far_slower_than_the_hosts_is_not_worth_it(tmp_path, monkeypatch, host, count, is_slow):
    """Half of the weights at 10 GB/s, or all of them from the host. One process that finds it slow decides for all."""
    monkeypatch.setattr(sharding, "_host_gb_per_s", lambda device: host)
    check = Shards._check

    def measured(self, slot):
        check(self, slot)
        self.gb_per_s = 10.0 if self.peers.number == 0 else 1000.0

    monkeypatch.setattr(Shards, "_check", measured)
    found = together(tmp_path, count, lambda peers: unreachable(peers, "cpu", against_host=True))
    if not is_slow:
        assert found == [""] * count
        return
    assert found[0] == "the GPUs read each other's memory at 10.0 GB/s, and the host's at 50.0 GB/s"
    folder = tmp_path / "again"
    folder.mkdir()
    assert together(folder, count, lambda peers: unreachable(peers, "cpu")) == ["", ""]


def test_a_process_that_cannot_share_its_memory_keeps_no_other_waiting(tmp_path, monkeypatch):
    handles = Shards._handles

    def failing(self):
        if self.peers.number == 0:
            self.device = torch.device("cuda")  # a part on a CPU cannot be shared as one of a GPU
        return handles(self)

    def no_device():
        raise RuntimeError("no such call\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", no_device)
    monkeypatch.setattr(Shards, "_handles", failing)
    found = together(tmp_path, 2, lambda peers: unreachable(peers, "cpu"))
    why = "process 0 cannot share its memory: no such call"
    assert found == [f"the GPUs cannot read each other's memory ({why})"] * 2


def test_a_model_that_cannot_be_shared_out_when_it_is_loaded_names_the_remedy(tmp_path, monkeypatch):
    """What the trial could do may fail with the whole model: it is no bug of the program."""

    def refused(self, handle, size):
        raise RuntimeError("CUDA error: out of mappings\nmore")

    monkeypatch.setattr(Shards, "_open", refused)

    def load(peers):
        streamer = WeightStreamer("cpu", shards=Shards(peers, "cpu"))
        streamer.add_region(torch.nn.Linear(8, 8).requires_grad_(False))
        with pytest.raises(SettingsError, match=r"process \d: CUDA error: out of mappings\)\. Fix: .*=weights\.$"):
            streamer.allocate_slots()

    together(tmp_path, 2, load)


def test_the_device_has_read_everything_before_the_others_may_free_it(tmp_path, monkeypatch):
    """The region after the last that was loaded is fetched ahead, on a stream of its own."""
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("read"))
    peers = Peers(0, 1, tmp_path, wait_for, lambda answer: events.append("agreed"))
    streamer = WeightStreamer("cpu", shards=Shards(peers, "cpu"))
    streamer.add_region(torch.nn.Linear(8, 8).requires_grad_(False))
    streamer.allocate_slots()
    streamer.device = torch.device("cuda")
    streamer.move_to_host()
    assert events == ["read", "agreed"] and streamer.shards is None


def test_the_last_fallback_streams_the_weights_from_the_host(tmp_path, monkeypatch, caplog):
    """All processes step down together; then each has all weights in its host's memory, with the same bits."""
    monkeypatch.setattr("trainer.engine.execution.ActivationOffload", lambda model, **_: None)
    alone, _ = model("flux", "fp8")
    regions = get_family("flux").regions(alone)
    checkpointing.apply(regions, ["all"] * len(regions), compiled=False)
    wanted = step("flux", alone, None, 3)
    shards = sharded_models(tmp_path, 2, "flux", "fp8")
    engines = []
    for own_regions, denoiser, streamer in shards:
        engines.append(Engine(denoiser, own_regions, EnginePlan(recompute="attention", offload="shards"), streamer))

    def step_down(peers):
        engine = engines[peers.number]
        engine.weight_streamer.shards.peers = peers
        assert engine.can_capture() and engine.can_capture(1) and not engine.can_capture(2)
        for _ in range(2):
            engine.step_down("It does not fit.")
        return engine

    for (_, denoiser, streamer), engine in zip(shards, together(tmp_path, 2, step_down), strict=True):
        assert engine.fallbacks == [("all", 0, "weights")] and not engine.is_sharded and streamer.shards is None
        found = step("flux", denoiser, fetched_again(streamer), 3)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert (
        "Instead of all recomputed, weights sharded over the GPUs: all recomputed, activations offloaded" in caplog.text
    )


def test_memory_for_other_processes_does_not_grow(monkeypatch):
    """Where segments grow, the allocator is told to leave that for the parts alone."""
    told = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(OSError, match="x"), sharding._fixed_segments():
        assert told == ["expandable_segments:False"]
        raise OSError("x")
    assert told == ["expandable_segments:False", "expandable_segments:True"]
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    with sharding._fixed_segments():
        pass
    assert len(told) == 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_train_validate_and_draw_with_the_bits_of_all_weights_on_their_device(tmp_path, device):
    """With `-m gpu` on two GPUs, or both on one; each process does it another number of times."""
    gpus = torch.cuda.device_count()
    if device == "cuda" and not gpus:
        pytest.skip("needs a GPU")
    started = []
    for number in range(2):
        visible = {"CUDA_VISIBLE_DEVICES": str(number % gpus)} if device == "cuda" else {}
        command = [sys.executable, "-m", "tests.support.shard_team", str(number), str(tmp_path), device]
        environment = {**child_environment(os.environ), **visible}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    for number in range(2):
        told = json.loads((tmp_path / f"{number}.json").read_text())
        if "unreachable" in told:
            pytest.skip(f"these GPUs do not read each other's memory: {told['unreachable']}")
        print(f"Reads {told['gb_per_s']:.1f} GB/s.")
        assert all(told["same"]) and len(told["same"]) == 2 * (2 + number) * 9
        assert told["captured"] == ([2, 2] if device == "cuda" else [0, 0])
        assert told["own"] <= 0.51 * told["whole"] and told["slots"] <= told["whole"] / 6 * 1.02
        if device == "cuda":
            assert told["freed"] >= 0.3 * told["whole"]
