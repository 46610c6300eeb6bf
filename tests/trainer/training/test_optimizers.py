"""Every optimiser: its table against its class, and a state that makes the next step the same step."""

import importlib
import inspect

import pytest
import torch

from trainer.checkpoints import state_files
from trainer.engine import flat_parameters
from trainer.engine.cuda_graphs import EagerStep
from trainer.spec.memory_model import optimizer_bytes
from trainer.spec.optimizers import OPTIMIZERS, SCHEDULERS
from trainer.training import optimizers
from trainer.training.ema import Ema


def signature(name):
    module, _, cls = OPTIMIZERS[name].path.rpartition(".")
    return inspect.signature(getattr(importlib.import_module(module), cls).__init__)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_table_names_only_arguments_that_the_class_takes(name):
    spec, parameters = OPTIMIZERS[name], signature(name).parameters
    assert spec.arguments | spec.defaults.keys() <= parameters.keys()
    assert not spec.arguments & {"lr", "params", "weight_decay", "warmup_steps"}


def test_prodigy_is_as_the_interface_promises():
    group = make("prodigy", [torch.nn.Parameter(torch.ones(2))]).param_groups[0]
    assert group["decouple"] and not group["use_bias_correction"] and not group["safeguard_warmup"]
    assert tuple(group["betas"]) == (0.9, 0.999) and group["d_coef"] == 2.0 and group["lr"] == 1.0


def make(name, params, args=None):
    spec = OPTIMIZERS[name]
    given = {**spec.defaults, **(args or {})}
    optimizer = optimizers.make_optimizer(
        name, params, learning_rate=spec.learning_rate, weight_decay=0.1, args=given, warmup_steps=2
    )
    optimizers.set_training(optimizer, True)
    return optimizer


STATE_ARGUMENTS = {  # those that make a state larger
    "adamw": [{"amsgrad": True}],
    "adafactor": [{"beta1": 0.9}],
    "prodigy-schedulefree": [{"factored": False}, {"use_focus": True}, {"factored": True, "factored_fp32": False}],
}
STATES = [(name, args) for name in OPTIMIZERS for args in [{}, *STATE_ARGUMENTS.get(name, [])]]


@pytest.mark.parametrize("rank", [1, 4, 16, 128])
@pytest.mark.parametrize(("name", "args"), STATES)
def test_an_optimizer_keeps_as_many_bytes_as_the_prediction_of_memory_counts(name, args, rank):
    """Both matrices of a full-size adapter, at the end of a run: Prodigy keeps first weights of zeros as one number."""
    rows = 3072 if rank > 1 else 12288  # of as many numbers as 8-bit states need
    matrices = [torch.nn.Parameter(torch.ones(shape)) for shape in ((rank, rows), (4 * rows, rank))]
    optimizer = make(name, matrices, args)
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    kept = 0
    for matrix in matrices:
        kept += sum(value.nbytes for value in optimizer.state[matrix].values() if isinstance(value, torch.Tensor))
    numbers = sum(matrix.numel() for matrix in matrices)
    # Of 8 bits there are tables besides: scales of blocks, and once for each parameter the numbers that 8 bits mean.
    allowed = 0.1 if "8bit" in name else 0.01
    assert kept / numbers == pytest.approx(optimizer_bytes(name, args, rank), abs=allowed)


class Run:
    """A least-squares problem with matrices large enough for 8-bit states."""

    def __init__(self, name, scheduler):
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(96, 64)), torch.nn.Parameter(torch.zeros(64, 8))]
        self.optimizer = make(name, self.params)
        self.schedule = optimizers.make_schedule(
            scheduler, self.optimizer, warmup_steps=2, total_steps=12, num_cycles=2
        )
        self.ema = Ema(self.params, 0.9)

    def steps(self, numbers):
        for n in numbers:
            x = torch.randn(32, 96, generator=torch.Generator().manual_seed(n))
            (x @ self.params[0] @ self.params[1] - x[:, :8]).square().mean().backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.ema.update(self.params)

    def state(self):
        return {
            "params": [p.detach() for p in self.params],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": {"steps": self.ema.steps, "shadow": self.ema.shadow},
        }

    def restore(self, tree):
        with torch.no_grad():
            for p, v in zip(self.params, tree["params"], strict=True):
                p.copy_(v)
        optimizers.load_state(self.optimizer, tree["optimizer"])
        self.schedule.load_state_dict(tree["schedule"])
        self.ema.steps, self.ema.shadow = tree["ema"]["steps"], tree["ema"]["shadow"]


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [(n, "constant") for n in OPTIMIZERS] + [("adamw", s) for s in SCHEDULERS] + [("prodigy", "cosine_with_restarts")],
)
def test_a_resumed_run_is_bit_identical(tmp_path, name, scheduler):
    whole = Run(name, scheduler)
    whole.steps(range(1, 11))

    first = Run(name, scheduler)
    first.steps(range(1, 6))
    state_files.save(tmp_path, 5, first.state())
    second = Run(name, scheduler)
    second.restore(state_files.latest(tmp_path).tree)
    second.steps(range(6, 11))

    for a, b in zip([*whole.params, *whole.ema.shadow], [*second.params, *second.ema.shadow], strict=True):
        assert torch.equal(a, b)
    assert second.optimizer.param_groups[0].get("d") == whole.optimizer.param_groups[0].get("d")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_lowers_the_loss(name):
    run = Run(name, "constant")
    for group in run.optimizer.param_groups:
        group["lr"] = group["lr"] * (1 if OPTIMIZERS[name].prodigy else 30)
    x = torch.randn(512, 96, generator=torch.Generator().manual_seed(99))

    def loss():
        return (x @ run.params[0] @ run.params[1] - x[:, :8]).square().mean().item()

    before = loss()
    run.steps(range(1, 120))
    optimizers.set_training(run.optimizer, False)
    assert loss() < 0.9 * before


def test_schedules_end_where_their_names_say():
    def rates(name):
        run = Run("adamw", name)
        out = []
        for n in range(1, 13):
            run.steps([n])
            out.append(run.optimizer.param_groups[0]["lr"] / 1e-4)
        return out

    assert rates("constant") == [1.0] * 12
    assert rates("constant_with_warmup")[:3] == [0.5, 1.0, 1.0]
    assert rates("linear")[-1] == 0 and rates("linear")[6] == pytest.approx(0.5)
    assert rates("cosine")[-1] == pytest.approx(0, abs=1e-9) and rates("cosine")[6] == pytest.approx(0.5)
    assert rates("cosine_with_restarts")[6] == pytest.approx(1.0)  # two cycles: back at the top in the middle
    assert rates("polynomial")[-1] == pytest.approx(1e-7 / 1e-4, rel=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flat_parameters_train_as_separate_ones_do(name, monkeypatch):
    """Of optimisers that look at shapes none are; 8-bit states are quantised in blocks that now reach over a border."""
    monkeypatch.setattr(
        flat_parameters, "MAX_PIECE_ELEMENTS", 96 * 64 + 64 * 72
    )  # the first two, and the third by itself
    found = []
    for joining in (False, True):
        torch.manual_seed(0)
        shapes = ((96, 64), (64, 72), (72, 8))
        params = [torch.nn.Parameter(torch.randn(*shape) / shape[0] ** 0.5) for shape in shapes]
        begin = [p.detach().clone() for p in params]
        trained = flat_parameters.flatten_parameters(name, params) if joining else params
        assert len(trained) == (2 if joining and not OPTIMIZERS[name].by_shape else 3)
        assert all(torch.equal(p, b) for p, b in zip(params, begin, strict=True))
        optimizer, runner = make(name, trained), EagerStep(params, trained)

        def work(given, params=params):
            made = given["x"] @ params[0] @ params[1] @ params[2]
            return made, (made - given["x"][:, :8]).square().mean()

        for n in range(30):
            runner(work, {"x": torch.randn(32, 96, generator=torch.Generator().manual_seed(n))})
            optimizer.step()
            runner.clear()
        found.append([p.detach() - b for p, b in zip(params, begin, strict=True)])
    for apart, joined in zip(*found, strict=True):
        assert apart.norm() > 0
        assert (joined - apart).norm() < (0.05 if name in ("adamw8bit", "lion") else 1e-4) * apart.norm()


def test_neighbours_share_a_piece_as_far_as_it_goes(monkeypatch):
    monkeypatch.setattr(flat_parameters, "MAX_PIECE_ELEMENTS", 10)
    assert flat_parameters.split_into_pieces([4, 6, 1, 30, 5, 5, 5]) == [[0, 1], [2], [3], [4, 5], [6]]
    assert flat_parameters.split_into_pieces([4, 2, 5, 5], separate=lambda size: size < 3) == [[0], [1], [2, 3]]
    assert flat_parameters.split_into_pieces([]) == []


def test_settings_of_groups_are_put_back_after_a_restore():
    """What the plan sets, and nothing that a step computes; each group has its own."""
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))]},
        {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5},
    ]
    optimizer = optimizers.make_optimizer("adamw", groups, learning_rate=0.25, weight_decay=0.125, args={})
    schedule = optimizers.make_schedule("constant", optimizer, warmup_steps=0, total_steps=9, num_cycles=1)
    settings = optimizers.group_settings(optimizer)
    for group, rate in zip(settings, (0.25, 0.5), strict=True):
        assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (
            rate,
            rate,
            0.125,
        ) and "params" not in group
    for group in optimizer.param_groups:
        group.update(lr=9.0, initial_lr=9.0, weight_decay=9.0)
    optimizers.renew(optimizer, schedule, settings)
    found = [[group[key] for key in ("lr", "initial_lr", "weight_decay")] for group in optimizer.param_groups]
    assert found == [[0.25, 0.25, 0.125], [0.5, 0.5, 0.125]] and schedule.get_last_lr() == [0.25, 0.5]
    with pytest.raises(ValueError):
        optimizers.renew(optimizer, schedule, settings[:1])
    plain = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for group in optimizer.param_groups:
        group["lr"] = 9.0
    optimizers.renew(optimizer, plain, settings)  # of another kind: it has its own course
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
