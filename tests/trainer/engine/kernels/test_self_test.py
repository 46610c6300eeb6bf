"""The self-test finds kernels that compute wrong results on a device, before anything trains with them."""

import logging

import pytest
import torch

from trainer.engine.kernels import dispatch, self_test

FP8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz]
KERNELS = [
    "norm_rows",
    "norm_gradient",
    "norm_residual",
    "gelu_rows",
    "gelu_gradient",
    "swiglu_rows",
    "swiglu_gradient",
    "rotate",
    "rotate_gradient",
    "rotate_heads",
    "rotate_heads_gradient",
]


@pytest.mark.parametrize("dtype", FP8)
def test_correct_kernels_pass(dtype):
    assert self_test.agree("cpu", dtype)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("spoil", [lambda t: t * 1.03, lambda t: t.roll(1, 0), lambda t: t * float("nan")])
def test_a_wrong_kernel_is_named_in_the_log(monkeypatch, caplog, name, spoil):
    caplog.set_level(logging.WARNING)
    correct = getattr(dispatch, name)

    def wrong(*args):
        found = correct(*args)
        if isinstance(found, torch.Tensor):
            return spoil(found)
        *others, last = found
        return (*others, spoil(last))

    monkeypatch.setattr(dispatch, name, wrong)
    assert not self_test.agree("cpu", torch.float8_e4m3fn)
    assert f"kernels {name} " in caplog.text or f"{name}, {name} " in caplog.text


@pytest.mark.parametrize("side", [0, 3])  # x, and the weight
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("spoil", [lambda t: t * 0, lambda t: t.roll(1, 1)])
def test_missing_or_misplaced_parts_of_adapter_columns_are_found(monkeypatch, side, part, spoil):
    correct = dispatch.append_adapter_columns

    def wrong(*args):
        correct(*args)
        first = self_test.IN_FEATURES + part * self_test.RANK
        columns = args[side][:, first : first + self_test.RANK]
        columns.copy_(spoil(columns.float()).to(columns.dtype))

    monkeypatch.setattr(dispatch, "append_adapter_columns", wrong)
    assert not self_test.agree("cpu", torch.float8_e4m3fn)
