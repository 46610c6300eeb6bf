"""Calls in the graphs' pool, on a CPU, where nothing is captured. Captured ones: tests/gpu/test_engine.py."""

import contextlib

import pytest
import torch

from trainer.engine.pooled_calls import PooledCalls, _Forward, _size, same_bits


class Pool:
    """Counts how often it is entered."""

    def __init__(self):
        self.entered = 0

    @contextlib.contextmanager
    def allocating(self):
        self.entered += 1
        yield


class Doubling(torch.nn.Module):
    def forward(self, x, scale=1):
        self.last = 2 * x * scale
        return (self.last,)


@pytest.mark.parametrize("captures", [True, False])
def test_what_a_module_returns_is_copied_out_of_the_pool(captures):
    pool, module = Pool(), Doubling()
    around = []

    @contextlib.contextmanager
    def pass_context():
        around.append(True)
        yield

    with PooledCalls(pool, pass_context).of(module, "forward", captures=captures):
        (output,) = module(torch.tensor([1.0, 2.0]), scale=3)
        module.last.fill_(-1)  # as the next replay would
        module(torch.tensor([5.0, 5.0]))
    assert output.tolist() == [6, 12] and pool.entered == 2 and len(around) == (2 if captures else 0)
    assert "forward" not in module.__dict__ and module(torch.ones(1))[0].tolist() == [2] and pool.entered == 2


def test_a_method_of_the_module_itself_is_put_back():
    module = Doubling()
    module.decode = own = module.forward
    for _ in range(2):
        with PooledCalls(Pool(), contextlib.nullcontext).of(module, "decode", captures=False):
            assert module.decode != own
        assert module.decode == own


def test_a_method_is_put_back_after_an_error():
    module = Doubling()
    calls = PooledCalls(Pool(), contextlib.nullcontext)
    with pytest.raises(RuntimeError, match="out of"), calls.of(module, "forward", captures=True):
        raise RuntimeError("out of something")
    assert "forward" not in module.__dict__


def test_a_replay_reads_its_own_inputs_and_copies_what_it_wrote():
    static, output = torch.zeros(2), torch.zeros(2)

    class Graph:
        def replay(self):
            torch.mul(static, 10, out=output)

    forward = _Forward(Graph(), [static], {"out": output})
    first = forward.replay([torch.tensor([1.0, 2.0])])
    second = forward.replay([torch.tensor([3.0, 4.0])])
    assert first["out"].tolist() == [10, 20] and second["out"].tolist() == [30, 40]


def test_a_graph_is_for_one_shape_type_and_set_of_other_arguments():
    x = torch.zeros(2, 3)
    one = _size([x, 1.0, None], "spec")
    assert one == _size([torch.ones(2, 3), 1.0, None], "spec")
    others = [[x[:1], 1.0, None], [x.double(), 1.0, None], [x, 2.0, None], [x, 1.0, True]]
    assert all(_size(leaves, "spec") != one for leaves in others) and _size([x, 1.0, None], "other") != one


def test_the_bits_of_all_tensors_are_compared():
    a = {"x": torch.ones(2), "y": [torch.zeros(1), 5]}
    assert same_bits(a, {"x": torch.ones(2), "y": [torch.zeros(1), 5]})
    assert not same_bits(a, {"x": torch.ones(2), "y": [torch.full((1,), 1e-9), 5]})
