"""Gradients are laid out as cuDNN's attention must have them; tests/gpu/test_attention.py has that attention itself."""

import torch

from trainer.engine.attention.cudnn_fix import with_strides_of


def test_a_gradient_gets_the_strides_of_the_output():
    like = torch.empty(2, 5, 3, 8).transpose(1, 2)  # (B, H, T, D) of (B, T, H, D)
    wide = torch.randn(2, 5, 40)
    for g in (wide[..., :24], wide[..., 1:25], wide[..., :1].expand(2, 5, 24)):
        g = g.unflatten(2, (3, 8)).transpose(1, 2)
        found = with_strides_of(g, like)
        assert found.stride() == like.stride() and found.data_ptr() % 16 == 0 and found.equal(g)


def test_a_gradient_that_is_laid_out_so_is_not_copied():
    like = torch.empty(1, 5, 3, 8).transpose(1, 2)
    g = torch.randn(5, 24).as_strided(
        (1, 3, 5, 8), (999, 8, 24, 1)
    )  # one picture: how far the next would be is nothing
    assert with_strides_of(g, like) is g
