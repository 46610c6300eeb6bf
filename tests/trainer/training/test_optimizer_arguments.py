"""Every optimiser with every argument of its class at odd values: refused by the plan's rules, or it trains."""

from __future__ import annotations

import importlib
import inspect
import itertools
from typing import Any

import pytest
import torch

from trainer.spec.optimizers import NOT_OFFERED, OPTIMIZERS
from trainer.training import optimizers

SHAPES = ((64, 64), (64, 64), (64,), (8, 4, 3, 3))  # the first is large enough for states in 8 bits
VARIABLES_OF_THEIR_OWN = {"lr", "weight_decay", "warmup_steps"}
ODD: tuple[Any, ...] = (
    *(0, 1, -1, 2, 7, 10**18, 0.0, 0.5, 1.0, -1.0, 1e-300, 1e-30, 1e-20, 1e-12, 1e-8, 0.9999999, 1e18, -1e18),
    *(None, True, False, "text", ""),
    *([], [0, 0], [0, 0.9], [0.9, 0], [1, 1], [0.9], [0.9, 0.99], [0.9, 0.99, 0.999], [1e-30, 1e-3], [-1, 0.9]),
    *([0.9999999, 0.9999999], [True, False], ["a", "b"], [None, 0.9], [0.1, 0.0], [[0.9], [0.9]]),
)


def arguments_of_class(name: str) -> list[str]:
    module, _, class_name = OPTIMIZERS[name].path.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), class_name).__init__)
    return [argument for argument in signature.parameters if argument not in ("self", "params")]


def trains(name: str, args: dict[str, Any]) -> bool:
    """Whether the weights are finite after some steps, with samples drawn in between as a job does."""
    spec = OPTIMIZERS[name]
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(*shape) / 8) for shape in SHAPES]
    with torch.no_grad():
        params[1].zero_()  # as half of a LoRA is: the other half has no gradient at the first step
    optimizer = optimizers.make_optimizer(
        name,
        params,
        learning_rate=spec.learning_rate,
        weight_decay=0.1,
        args={**spec.defaults, **args},
        warmup_steps=2 if spec.own_warmup else 0,
    )
    for sampled in (False, False, True, False):
        x = torch.randn(8, 64)
        drawn = x @ params[0] @ params[1] * params[2]
        ((drawn - x).square().mean() + params[3].square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if sampled:
            optimizers.set_training(optimizer, False)
            optimizers.set_training(optimizer, True)
    optimizers.set_training(optimizer, False)
    return all(bool(param.isfinite().all()) for param in params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_argument_of_the_class_is_offered_or_refused_with_a_reason(name):
    for argument in arguments_of_class(name):
        assert argument in OPTIMIZERS[name].rules or argument in NOT_OFFERED or argument in VARIABLES_OF_THEIR_OWN


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, spec in OPTIMIZERS.items() for argument in spec.rules]
)
def test_an_odd_value_is_refused_by_rule_or_trains(name, argument):
    rule = OPTIMIZERS[name].rules[argument]
    accepted = [value for value in ODD if rule.problem(value) is None]
    assert accepted, "the rule refuses everything"
    for value in accepted:
        assert trains(name, {argument: value}), f"{argument}={value}"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_ends_of_every_range_train(name):
    for argument, rule in OPTIMIZERS[name].rules.items():
        if rule.kind not in ("number", "integer"):
            continue
        for end in (rule.low, rule.high):
            value = int(end) if end is not None and rule.kind == "integer" else end
            if value is not None:
                assert rule.problem(value) is None and trains(name, {argument: value}), f"{argument}={value}"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_defaults_of_the_class_are_allowed(name):
    module, _, class_name = OPTIMIZERS[name].path.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), class_name).__init__)
    for argument, rule in OPTIMIZERS[name].rules.items():
        default = signature.parameters[argument].default
        value = [*default] if isinstance(default, tuple) else default
        unlimited = value == float("inf")
        assert unlimited or rule.only is not None or rule.problem(value) is None, f"{argument}={value}"


def switches(name: str) -> list[str]:
    return [argument for argument, rule in OPTIMIZERS[name].rules.items() if rule.kind == "switch"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_two_switches_go_together(name):
    for first, second in itertools.combinations(switches(name), 2):
        for values in itertools.product((False, True), repeat=2):
            args = dict(zip((first, second), values, strict=True))
            if any(OPTIMIZERS[name].rules[argument].problem(value) for argument, value in args.items()):
                continue
            assert trains(name, args), args


def test_without_an_epsilon_the_averaged_prodigy_trains_with_every_switch():
    name = "prodigy-schedulefree"
    for argument, value in itertools.product(switches(name), (False, True)):
        assert trains(name, {"eps": None, argument: value}), f"{argument}={value}"
