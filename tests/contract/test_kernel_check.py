"""Kernels that are wrong on a device are found before anything trains with them."""

import logging

import pytest
import torch

from trainer import fused, kernel_check, rotary

FP8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz]
KERNELS = [
    *((fused, name) for name in ("norm_rows", "norm_gradient", "gelu_rows", "gelu_gradient")),
    *((rotary, name) for name in ("rotate", "rotate_gradient")),
]


@pytest.mark.parametrize("dtype", FP8)
def test_right_kernels_agree(dtype):
    assert kernel_check.agree("cpu", dtype)


@pytest.mark.parametrize(("module", "name"), KERNELS)
@pytest.mark.parametrize("spoil", [lambda t: t * 1.03, lambda t: t.roll(1, 0), lambda t: t * float("nan")])
def test_a_kernel_that_is_wrong_is_named(monkeypatch, caplog, module, name, spoil):
    caplog.set_level(logging.WARNING)
    right = getattr(module, name)

    def wrong(*given):
        found = right(*given)
        if isinstance(found, torch.Tensor):
            return spoil(found)
        *others, last = found
        return (*others, spoil(last))

    monkeypatch.setattr(module, name, wrong)
    assert not kernel_check.agree("cpu", torch.float8_e4m3fn)
    assert f"kernels {name} " in caplog.text or f"{name}, {name} " in caplog.text
