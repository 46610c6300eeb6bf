"""Adapters as views of flat parameters: nothing is lost, and pieces keep to their limits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.engine import flat_parameters
from trainer.engine.flat_parameters import MAX_PIECE_ELEMENTS, flatten_parameters, split_into_pieces
from trainer.spec.optimizers import OPTIMIZERS


@given(st.lists(st.integers(1, 14), max_size=30), st.integers(0, 4))
def test_neighbours_share_a_piece_as_long_as_they_fit(sizes, small):
    """By hand: a piece grows until the next one would exceed ten elements; small ones stand alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat_parameters, "MAX_PIECE_ELEMENTS", 10)
        pieces = split_into_pieces(sizes, separate=lambda size: size < small)
    expected, total = [], 0
    for index, size in enumerate(sizes):
        alone = size < small or (bool(expected) and sizes[expected[-1][-1]] < small)
        if not expected or alone or total + size > 10:
            expected.append([])
            total = 0
        expected[-1].append(index)
        total += size
    assert pieces == expected
    assert split_into_pieces([]) == [] and split_into_pieces([1, 2, 3]) == [[0, 1, 2]]
    assert split_into_pieces([MAX_PIECE_ELEMENTS - 1, 1, 1]) == [[0, 1], [2]] and MAX_PIECE_ELEMENTS == 16_777_216


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_become_views_of_the_flat_ones_with_their_values(name):
    spec = OPTIMIZERS[name]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 600), (3, 2), (5000,), (4096, 1))]
    before = [p.detach().clone() for p in params]
    flat = flatten_parameters(name, params)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    if spec.by_shape:
        assert flat is params
        return
    assert torch.equal(torch.cat([p.detach().flatten() for p in flat]), torch.cat([p.flatten() for p in before]))
    assert len(flat) == (3 if spec.least > 6 else 1)
    with torch.no_grad():
        for p in flat:
            p.add_(1)
    assert all(torch.equal(p, old + 1) for p, old in zip(params, before, strict=True))
