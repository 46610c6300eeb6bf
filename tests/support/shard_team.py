"""One of two processes that keep a half of a model's frozen weights each.

    python -m tests.support.shard_team NUMBER FOLDER DEVICE

It writes to FOLDER/NUMBER.json whether training steps (on a GPU captured, of two sizes in turn), validation and samples
between them have the bits of the same model with all weights on the device, and how much memory the weights take.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

from trainer.engine.cuda_graphs import EagerStep, GraphStep
from trainer.engine.execution import Engine
from trainer.engine.memory.sharding import Peers, Shards, unreachable
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.spec.plan import EnginePlan

LAYERS = 12


class Layer(torch.nn.Module):
    """A residual MLP with an adapter beside it."""

    def __init__(self, width):
        super().__init__()
        self.up = torch.nn.Linear(width, 4 * width).bfloat16().requires_grad_(False)
        self.down = torch.nn.Linear(4 * width, width).bfloat16().requires_grad_(False)
        self.a = torch.nn.Parameter(torch.randn(8, width) / width)
        self.b = torch.nn.Parameter(torch.randn(width, 8) / 8)

    def forward(self, x):
        term = x @ self.a.to(x.dtype).t() @ self.b.to(x.dtype).t()
        return x + self.down(functional.gelu(self.up(x))) + term


class Decoder(torch.nn.Module):
    """Stands for the VAE of samples."""

    def decode(self, x):
        return x


def model_on(device, width):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Layer(width) for _ in range(LAYERS))).to(device)


def results(engine, model, device, rounds, width):
    """Losses, gradients and outputs, and how many sizes of steps have been captured."""
    params = [p for p in model.parameters() if p.requires_grad]
    kind = GraphStep if device == "cuda" else EagerStep
    runner = kind(params, pass_context=engine.forward_backward)

    def step(inputs):
        with engine.saved_tensors():
            out = model(inputs["x"])
        losses_B = out.float().square().mean(1)
        return losses_B, losses_B.sum()

    found = []
    for turn in range(rounds):
        for rows in (64, 32):
            x = torch.randn(rows, width, generator=torch.Generator().manual_seed(turn)).bfloat16().to(device)
            found.append(runner(step, {"x": x}).clone())
            found.append(runner.flat_grad.clone())
            runner.clear()
            with torch.no_grad(), engine.saved_tensors():
                found.append(model(x))
        with torch.no_grad(), runner.sampling(model, Decoder()):
            found += [model(x).clone() for _ in range(3)]
    sizes = len(runner.captured) if device == "cuda" and runner.capturing else 0
    runner.release()
    return found, sizes


def told(peers, device):
    """What is written of all this."""
    problem = unreachable(peers, device)
    if problem:
        return {"unreachable": problem}
    width = 1024 if device == "cuda" else 64
    answer = {"same": [], "captured": []}
    for policy in ("none", "all"):
        whole = model_on(device, width)
        options = {"device": device, "recompute": policy}
        engine = Engine(whole, list(whole), EnginePlan(**options))
        wanted, _ = results(engine, whole, device, 2 + peers.number, width)
        model = model_on(device, width)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        streamer = WeightStreamer(device, shards=Shards(peers, device))
        for layer in model:
            streamer.add_region(layer)
        streamer.allocate_slots()
        if device == "cuda":
            answer["freed"] = before - torch.cuda.memory_allocated()
        answer["whole"] = sum(p.nbytes for p in whole.parameters() if not p.requires_grad)
        answer["own"] = streamer.shards.own_bytes
        answer["slots"] = sum(slot.nbytes for slot in streamer.slots)
        engine = Engine(model, list(model), EnginePlan(**options, offload="shards", num_gpus=2), streamer)
        found, sizes = results(engine, model, device, 2 + peers.number, width)
        answer["same"] += [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)]
        answer["captured"].append(sizes)
        answer["gb_per_s"] = streamer.shards.gb_per_s
        peers.exchange("done")  # before what the other one reads is gone
    return answer


def wait_for(path):
    until = time.monotonic() + 120
    while not path.exists():
        if time.monotonic() > until:
            raise TimeoutError(str(path))
        time.sleep(0.001)


def main():
    number, folder, device = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    peers = Peers(number, 2, folder, wait_for, lambda answer: all(peers.exchange(answer)))
    (folder / f"{number}.json").write_text(json.dumps(told(peers, device)))


if __name__ == "__main__":
    main()
