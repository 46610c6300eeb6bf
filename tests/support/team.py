"""One of several processes that train a small model together: `python -m tests.support.team CASE`, told its place by
the environment as the trainer is. Without one, and by the tests, all of it in a single process."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from trainer.data.batches import MicroBatch
from trainer.engine import flat_parameters
from trainer.engine.cuda_graphs import EagerStep
from trainer.engine.execution import Engine
from trainer.engine.memory.sharding import Shards
from trainer.engine.memory.weight_streaming import WeightStreamer
from trainer.spec.plan import EnginePlan
from trainer.training import distributed
from trainer.training.loop import train
from trainer.training.objective import FlowMatching
from trainer.training.step_guard import StepGuard
from trainer.training.stop_flag import StopFlag

SIZES = [(3, 1), (2, 2), (1, 3), (2,), (3, 2), (1,)]  # pictures of the micro-batches of each step
STEPS = 3 * SIZES
BAD = 3  # the step with a picture that is not finite, in its second micro-batch


def micro_batch(number, count, *, bad=False):
    generator = torch.Generator().manual_seed(number)
    moments = torch.randn(count, 8, 4, 4, generator=generator).abs()
    if bad:
        moments[0, 0] = float("nan")
    text = {"tokens": torch.randn(count, 1, 64, generator=generator), "rare": torch.full((count,), count == 3)}
    names = tuple(f"{number}-{i}.png" for i in range(count))
    return MicroBatch(moments, text, torch.zeros(count, 6), None, torch.ones(count), names)


class Model(torch.nn.Module):
    """Of its weights `rare` are used by micro-batches of three pictures alone, and `never` by none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(64, 9), torch.nn.Linear(9, 64)
        self.rare, self.never = torch.nn.Linear(64, 64), torch.nn.Linear(5, 5)
        self.fails = 0  # times that more than one picture does not fit

    def forward(self, noisy, t, batch):
        x = noisy.flatten(1)
        if self.fails and len(x) > 1:
            self.fails -= 1
            raise torch.OutOfMemoryError("made up")
        out = self.b(torch.tanh(self.a(x + batch.text["tokens"][:, 0]) + t[:, None]))
        return (out + self.rare(x) if batch.text["rare"].all() else out).view_as(noisy)


class Deep(Model):
    """With frozen layers, through which the gradient of the others goes."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.ModuleList(torch.nn.Linear(64, 64).requires_grad_(False) for _ in range(4))

    def forward(self, noisy, t, batch):
        out = super().forward(noisy, t, batch)
        for layer in self.frozen:
            out = out + torch.tanh(layer(out.flatten(1))).view_as(out)
        return out


def sharded(model, workers):
    """The engine of a model whose frozen layers are shared out among the processes."""
    streamer = WeightStreamer("cpu", shards=Shards(workers.peers(), "cpu"))
    for layer in model.frozen:
        streamer.add_region(layer)
    streamer.allocate_slots()
    return Engine(model, [*model.frozen], EnginePlan(offload="shards", num_gpus=workers.size), streamer)


def trained(workers, case):
    """The steps, and the weights after them. In cases that begin with "joined", these are views of a longer one."""
    model, number = Deep() if case.startswith(("frozen", "sharded")) else Model(), 0
    engine = sharded(model, workers) if case.startswith("sharded") else Engine(model, [], EnginePlan())
    model.fails = 2 if case.endswith("memory") and workers.process_rank == workers.size - 1 else 0

    def predict(*given):
        with engine.saved_tensors():
            return model(*given)

    groups = []
    for i, sizes in enumerate(STEPS, 1):
        every = []
        for at, count in enumerate(sizes):
            number += 1
            every.append(micro_batch(number, count, bad=case == "bad" and i == BAD and at == 1))
        groups.append((1, every[workers.process_rank :: workers.size]))
    params = [p for p in model.parameters() if p.requires_grad]
    wholes = flat_parameters.flatten_parameters("adamw", params) if case.startswith("joined") else params
    optimizer = torch.optim.AdamW(wholes, lr=0.02, weight_decay=0.5)
    guard, runner = StepGuard(), EagerStep(params, wholes, engine.forward_backward)
    steps = []
    for step in train(
        groups,
        predict=predict,
        objective=FlowMatching(),
        params=wholes,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        max_grad_norm=1.0,
        guard=guard,
        device="cpu",
        seed=7,
        first_step=1,
        runner=runner,
        workers=workers,
    ):
        assert all(p.grad is grad for p, grad in runner.owners)
        steps.append([step.loss, step.grad_norm, step.images, step.skipped, workers.stopping])
        if case == "stop" and workers.is_first and step.number == 2:
            workers._stop.signal = 15
        if workers.stopping:
            break
    workers.check_same(wholes)
    if case == "apart":
        with torch.no_grad():
            params[0][0, 0] += workers.process_rank
        workers.check_same(wholes)
    return steps, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, guard.state()


def main():
    torch.set_num_threads(1)
    workers = distributed.workers_from_environment(2, os.environ, StopFlag())
    workers.connect("cpu")
    for case in sys.argv[1:]:
        steps, weights, guard = trained(workers, case)
        path = Path(os.environ["RESULTS"]) / f"{case}-{workers.process_rank}"
        save_file(weights, f"{path}.safetensors")
        path.with_suffix(".json").write_text(json.dumps({"steps": steps, "guard": guard}))
    workers.disconnect()


if __name__ == "__main__":
    main()
