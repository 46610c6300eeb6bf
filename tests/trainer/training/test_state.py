"""Restoring: every value of a saved state matters to what follows, but for those that are named here with the reason.

A small model with real adapters trains for some steps, is saved to disk, and goes on; then each number and each tensor
of the saved state is changed, one at a time, and what follows must differ.
"""

import copy
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from diffusers.loaders import PeftAdapterMixin

from trainer.checkpoints import state_files
from trainer.checkpoints.snapshots import Snapshots
from trainer.engine import adapters
from trainer.spec.errors import SettingsError
from trainer.spec.family import get_family
from trainer.spec.optimizers import OPTIMIZERS
from trainer.training import optimizers, random_state
from trainer.training.ema import Ema
from trainer.training.state import TrainingState
from trainer.training.step_guard import StepGuard
from trainer.training.text_encoders import Encoder, TextEncoders

SAVED_AFTER, TOTAL = 3, 7


class Tiny(torch.nn.Module, PeftAdapterMixin):
    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.block = torch.nn.ModuleDict({"first": torch.nn.Linear(6, 5), "second": torch.nn.Linear(5, 4)})
        self.requires_grad_(False)

    def forward(self, x):
        return self.block["second"](torch.tanh(self.block["first"](x)))


def adapted(seed):
    model = Tiny(seed)
    settings = {"targets": ("first", "second"), "fused": {}, "rank": 2, "alpha": 2.0, "seed": seed}
    return model, adapters.add_adapters(model, [("block", model.block)], **settings)


def new_state(name="adamw", *, decay=0.9, args=None, total=TOTAL, rate=0.05):
    denoiser, params = adapted(1)
    encoder, more = adapted(2)
    groups = [{"params": params}, {"params": more}]
    if not name.startswith("prodigy"):  # which has one rate for all
        groups[1]["lr"] = rate / 2
    new = partial(
        optimizers.make_optimizer, name, groups, learning_rate=rate, weight_decay=0.1,
        args=args or OPTIMIZERS[name].defaults,
    )  # fmt: skip
    optimizer = new()
    schedule = optimizers.make_schedule("cosine", optimizer, warmup_steps=2, total_steps=total, num_cycles=1)
    texts = TextEncoders(get_family("flux"), {"text_encoder": Encoder(encoder, None)})
    both = [*params, *more]
    ema = Ema(both, decay) if decay else None
    return TrainingState(denoiser, texts, both, both, optimizer, new, schedule, ema, StepGuard(spike=2.0, scale=4.0))


def train(one, steps):
    """Takes the steps; everything that can be seen of them, and of the random generators afterwards."""
    seen = []
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        text = one.texts.models["text_encoder"](x)
        loss = (one.denoiser(x) + text - x[:, :4]).square().mean()
        loss.backward()
        seen += [optimizers.step_size(one.optimizer), one.optimizer.param_groups[1]["lr"]]
        overflow = one.guard.overflows(loss.item(), math.inf if step == 2 else 1.0)
        if not overflow and one.guard.objection(loss.item(), 1.0) is None:
            one.optimizer.step()
            if one.ema:
                one.ema.update(one.optimizer_params)
        elif not overflow:
            seen.append(one.guard.skip())
        one.schedule.step()
        one.optimizer.zero_grad()
        seen += [loss.item(), *(p.detach().clone() for p in one.optimizer_params)]
    if one.ema:
        seen += [one.ema.steps, *(shadow.clone() for shadow in one.ema.shadow)]
    seen.append(one.guard.state())
    with one.inference_weights():
        seen += [p.detach().clone() for p in one.optimizer_params]
    return [*seen, random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), torch.rand(3)]


def same(first, second):
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor) and not torch.equal(a, b):
            return False
        if not isinstance(a, torch.Tensor) and a != b:
            return False
    return True


@pytest.fixture
def saved(tmp_path):
    """`saved(name)`: what follows a state of that optimiser, and the state as it is on disk."""

    def make(name="adamw", **values):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(7)
        random.gauss(0, 1)  # Python's and NumPy's keep a second number for the next call
        np.random.standard_normal()
        one = new_state(name, **values)
        train(one, range(1, SAVED_AFTER + 1))
        random.gauss(0, 1)
        state_files.save(tmp_path / name, SAVED_AFTER, Snapshots(one.optimizer, "cpu").copy(one.state()))
        after = train(one, range(SAVED_AFTER + 1, TOTAL + 1))
        return after, state_files.latest(tmp_path / name).tree

    return make


def goes_on(tree, name="adamw", **values):
    one = new_state(name, **values)
    one.restore(copy.deepcopy(tree))
    return train(one, range(SAVED_AFTER + 1, TOTAL + 1))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_goes_on_as_if_nothing_had_happened(saved, name):
    expected, tree = saved(name)
    assert same(goes_on(tree, name), expected)


def leaves(value, path=()):
    """The path of every number, flag and tensor in a tree."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from leaves(child, (*path, key))
    elif isinstance(value, (list, tuple)) and len(value) < 100:
        for i, child in enumerate(value):
            yield from leaves(child, (*path, i))
    elif isinstance(value, (list, tuple)):
        yield from ((*path, i) for i in (0, len(value) // 2, len(value) - 1))
    elif value is not None and not isinstance(value, str):
        yield path


def changed(tree, path):
    """A copy of the tree with another value at `path`."""
    tree = copy.deepcopy(tree)
    parents = [tree]
    for key in path[:-1]:
        parents.append(parents[-1][key])
    value, at = parents[-1][path[-1]], path[-1]
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
        new = torch.Generator().manual_seed(99).get_state()
    elif isinstance(value, torch.Tensor):
        new = value + 1
    elif isinstance(value, bool):
        new = not value
    else:
        new = value + 1
    holder = parents[-1]
    if isinstance(holder, tuple):  # of betas
        parents[-2][path[-2]] = tuple(new if i == at else old for i, old in enumerate(holder))
    else:
        holder[at] = new
    return tree


# Ends of paths → why a change of the value changes nothing.
WITHOUT_EFFECT = {
    "schedule._step_count": "torch warns by it when steps are taken in the wrong order, and nothing else",
    "schedule._last_lr": "what the schedule reports; the rates are in the optimiser's groups",
    "schedule._is_initial": "only true while a schedule is made",
    "schedule._get_lr_called_within_step": "only for a warning",
    "schedule.verbose": "of older versions of torch",
    "amsgrad": "would need a tensor that no step has made",
    "foreach": "how torch computes a step, not what",
    "fused": "how torch computes a step, not what",
    "capturable": "how torch computes a step, not what",
    "differentiable": "how torch computes a step, not what",
    "decoupled_weight_decay": "AdamW sets it when a step is taken",
    "optimizer.param_groups.params": "torch reads only how many there are",
    "optimizer.param_groups.initial_lr": "the schedule has read it when it was made (base_lrs)",
}


def matters(path):
    words = ".".join(str(key) for key in path if not isinstance(key, int))
    return not any(words == end or words.endswith(f".{end}") for end in WITHOUT_EFFECT)


def test_every_value_of_a_state_decides_what_follows(saved):
    expected, tree = saved()
    paths = [path for path in leaves(tree) if matters(path) and path[0] != "random"]
    assert {path[0] for path in paths} == tree.keys() - {"random"}
    idle = []
    for path in paths:
        try:
            if same(goes_on(changed(tree, path)), expected):
                idle.append(path)
        except (SettingsError, ValueError, RuntimeError, TypeError, IndexError, OverflowError, AttributeError):
            continue  # refused: noticed
    assert idle == []


def test_every_value_of_the_random_generators_is_put_back(saved):
    """Not by what they draw next: most of their keys are only used much later."""
    _, tree = saved()
    for path in leaves({"random": tree["random"]}):
        other = changed(tree, path)["random"]
        try:
            random_state.set_random_state(other)
        except ValueError:  # a place behind the end of the keys
            continue
        found = random_state.random_state()
        assert all(same([found[name]], [other[name]]) for name in ("python", "numpy", "torch")), path
        assert not same([found[path[1]]], [tree["random"][path[1]]])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_generator_of_a_gpu_is_left_out_where_there_is_none(saved):
    _, tree = saved()
    assert "cuda" not in tree["random"]
    random_state.set_random_state({**tree["random"], "cuda": torch.zeros(16, dtype=torch.uint8)})
    assert torch.equal(torch.get_rng_state(), tree["random"]["torch"])


def test_a_piece_that_is_missing_is_refused(saved):
    _, tree = saved()
    for piece in ("adapters", "optimizer", "schedule", "text_encoders", "ema"):
        without = {key: value for key, value in tree.items() if key != piece}
        with pytest.raises(SettingsError, match="does not fit this plan"):
            new_state().restore(without)
    other = copy.deepcopy(tree)
    other["adapters"].popitem()
    with pytest.raises(SettingsError, match="does not fit this plan"):
        new_state().restore(other)
    short = copy.deepcopy(tree)
    short["ema"]["shadow"].pop()
    with pytest.raises(SettingsError, match="does not fit this plan"):
        new_state().restore(short)


def test_an_average_that_the_state_lacks_begins_at_its_weights(saved):
    _, tree = saved(decay=0.0)
    one = new_state(decay=0.9)
    one.adapter_params = []  # the average is of what the optimiser trains, which may be longer parameters
    one.restore(tree)
    assert one.ema.steps == 0 and one.ema.decay == 0.9
    assert all(torch.equal(a, b) for a, b in zip(one.ema.shadow, one.optimizer_params, strict=True))
    assert tree["ema"] is None and not new_state(decay=0.0).has_averaged_weights and one.has_averaged_weights
    with_average = saved(decay=0.9)[1]
    plain = new_state(decay=0.0)
    plain.restore(with_average)
    assert plain.ema is None
    again = new_state(decay=0.9)
    again.adapter_params = []
    again.restore(with_average)
    assert again.ema.steps == with_average["ema"]["steps"] > 0
    assert all(torch.equal(a, b) for a, b in zip(again.ema.shadow, with_average["ema"]["shadow"], strict=True))
    plain.restore(tree)  # neither has one
    assert plain.ema is None


def test_with_renew_the_next_steps_follow_the_new_rates_and_the_new_length(saved):
    """By hand: warm-up over 2 steps, then half a cosine over the rest."""
    _, tree = saved()
    one = new_state(rate=0.2, total=12)
    one.restore(tree, renew=True)
    x = torch.randn(8, 6)
    for step in range(SAVED_AFTER, 12):
        course = 0.5 * (1 + math.cos(math.pi * (step - 2) / 10))
        assert one.optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * course)
        assert one.optimizer.param_groups[1]["lr"] == pytest.approx(0.1 * course)
        assert one.schedule.get_last_lr() == pytest.approx([0.2 * course, 0.1 * course])
        one.denoiser(x).square().mean().backward()
        one.optimizer.step()
        one.schedule.step()


def test_inference_weights_are_the_average_and_leave_no_trace():
    one = new_state()
    train(one, [1, 3, 4])
    before = [p.detach().clone() for p in one.optimizer_params]
    with pytest.raises(ZeroDivisionError), one.inference_weights():
        assert all(map(torch.equal, one.optimizer_params, one.ema.shadow))
        assert not all(map(torch.equal, one.optimizer_params, before))
        raise ZeroDivisionError
    assert all(map(torch.equal, one.optimizer_params, before))
    plain = new_state(decay=0.0)
    with plain.inference_weights():
        assert all(p.requires_grad for p in plain.optimizer_params)


@pytest.mark.parametrize(("name", "args"), [("adamw-schedulefree", {}), ("prodigy-schedulefree", {"d0": 0.1})])
def test_inference_weights_of_a_schedule_free_optimiser_are_its_average(name, args):
    """It trains at y = 0.9 x + 0.1 z (arXiv:2405.15682, with its beta of 0.9): x is the average, z is not averaged."""
    args = {**OPTIMIZERS[name].defaults, "betas": [0.9, 0.99], **args}
    one = new_state(name, decay=0.0, args=args, rate=0.5)
    train(one, range(4, 12))
    before = [p.detach().clone() for p in one.optimizer_params]
    averages = []
    for p in one.optimizer_params:
        y, z = p.detach().double(), one.optimizer.state[p]["z"].double()
        averages.append((y - 0.1 * z) / 0.9)
    moved = 0.0
    with one.inference_weights():
        for p, average, trained in zip(one.optimizer_params, averages, before, strict=True):
            assert torch.allclose(p.double(), average, rtol=0, atol=1e-6)
            moved = max(moved, (p - trained).abs().max().item())
    assert moved > 1e-4 and all(map(torch.equal, one.optimizer_params, before))
    train(one, [12])  # only in training mode can it take a step
