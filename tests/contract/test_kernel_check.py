"""Kernels that are wrong on a device are found before anything trains with them."""

import logging

import pytest
import torch

from trainer.engine.kernels import dispatch, self_test

FP8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz]
KERNELS = [
    "norm_rows",
    "norm_gradient",
    "gelu_rows",
    "gelu_gradient",
    "rotate",
    "rotate_gradient",
]


@pytest.mark.parametrize("dtype", FP8)
def test_right_kernels_agree(dtype):
    assert self_test.agree("cpu", dtype)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("spoil", [lambda t: t * 1.03, lambda t: t.roll(1, 0), lambda t: t * float("nan")])
def test_a_kernel_that_is_wrong_is_named(monkeypatch, caplog, name, spoil):
    caplog.set_level(logging.WARNING)
    right = getattr(dispatch, name)

    def wrong(*given):
        found = right(*given)
        if isinstance(found, torch.Tensor):
            return spoil(found)
        *others, last = found
        return (*others, spoil(last))

    monkeypatch.setattr(dispatch, name, wrong)
    assert not self_test.agree("cpu", torch.float8_e4m3fn)
    assert f"kernels {name} " in caplog.text or f"{name}, {name} " in caplog.text


@pytest.mark.parametrize("side", [0, 3])  # x, and the weight
@pytest.mark.parametrize("third", [0, 1, 2])
@pytest.mark.parametrize("spoil", [lambda t: t * 0, lambda t: t.roll(1, 1)])
def test_halves_of_adapters_that_are_missing_or_misplaced_are_found(monkeypatch, side, third, spoil):
    right = dispatch.append_adapter_columns

    def wrong(*given):
        right(*given)
        first = self_test.WIDTH + third * self_test.RANK
        columns = given[side][:, first : first + self_test.RANK]
        columns.copy_(spoil(columns.float()).to(columns.dtype))

    monkeypatch.setattr(dispatch, "append_adapter_columns", wrong)
    assert not self_test.agree("cpu", torch.float8_e4m3fn)
