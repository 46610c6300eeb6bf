"""The gradient of a group of micro-batches against autograd over all its images, whatever is halved or prefetched."""

import logging
import math

import pytest
import torch

from trainer.data.batches import MicroBatch
from trainer.engine.cuda_graphs import EagerStep
from trainer.spec.errors import OutOfMemoryError
from trainer.training import gradients
from trainer.training.gradients import Backward, seeded
from trainer.training.objective import FlowMatching
from trainer.training.step_guard import StepGuard

SEED = 11


def test_seeds_are_mixed_by_knuths_generator():
    """x ← (6364136223846793005 x + part + 1442695040888963407) mod 2^63, from 0; in exact integers."""
    for parts in ((0,), (7,), (7, 3), (3, 7), (2**62, 5, 1), (1, 2, 3, 4)):
        x = 0
        for part in parts:
            x = (6364136223846793005 * x + part + 1442695040888963407) % 9223372036854775808
        generator = torch.Generator()
        assert seeded(generator, *parts) is generator and generator.initial_seed() == x
    first = {seeded(torch.Generator(), *parts).initial_seed() for parts in ((1, 2), (2, 1), (1, 2, 0), (1,), (1, 3))}
    assert len(first) == 5


def test_latents_are_drawn_from_their_mean_and_deviation():
    moments = torch.randn(2, 6, 4, 4)
    drawn = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    expected = moments[:, :3].double() + moments[:, 3:].double() * drawn.double()
    assert torch.allclose(gradients.latents(moments, torch.Generator().manual_seed(3)).double(), expected, atol=1e-6)


def batch(count, seed, *, mask=False):
    generator = torch.Generator().manual_seed(seed)
    moments = torch.randn(count, 4, 4, 4, generator=generator)
    text = {"tokens": torch.randn(count, 3, 2, generator=generator)}
    mask_B1HW = torch.rand(count, 1, 4, 4, generator=generator) if mask else None
    weight = torch.rand(count, generator=generator) + 0.5
    names = tuple(f"{seed}-{i}" for i in range(count))
    captions = tuple(f"caption {name}" for name in names)
    return MicroBatch(moments, text, torch.randn(count, 6, generator=generator), mask_B1HW, weight, names, captions)


GROUP = [batch(3, 1), batch(1, 2, mask=True), batch(2, 3)]


class Model:
    """A prediction of two weights that reads everything that it is given. `most`: images that fit in memory."""

    def __init__(self, most=99):
        self.params = [torch.nn.Parameter(torch.tensor([0.5, -0.25])), torch.nn.Parameter(torch.tensor(0.125))]
        self.most, self.sizes, self.calls = most, [], []

    def __call__(self, noisy, t, given):
        self.sizes.append(len(noisy))
        self.calls.append((given.names, given.captions))
        if len(noisy) > self.most:
            raise torch.OutOfMemoryError("no memory\nand more")
        scale = t + given.text["tokens"].mean((1, 2)) + given.geometry_B6.sum(1)
        first = noisy * self.params[0][None, :, None, None]
        return first + self.params[1] * scale[:, None, None, None]


OBJECTIVE = FlowMatching("sigmoid", noise_offset=0.1, weighting="cosmap")


def expected(group, number, *, first=0, stride=1, scale=1.0):
    """By the definition, in one graph: the mean over all images of the group, times the loss scale."""
    model, losses, times = Model(), [], []
    for i, one in enumerate(group):
        generator = seeded(torch.Generator(), SEED, number, first + stride * i)
        mean, deviation = one.moments_B2CHW.chunk(2, dim=1)
        clean = mean + deviation * torch.randn(mean.shape, generator=generator)
        t = torch.sigmoid(torch.randn(len(clean), generator=generator))
        noise = torch.randn(clean.shape, generator=generator)
        noise = noise + 0.1 * torch.randn(*clean.shape[:2], 1, 1, generator=generator)
        t4 = t[:, None, None, None]
        error = (model((1 - t4) * clean + t4 * noise, t, one) - (noise - clean)) ** 2
        if one.mask_B1HW is not None:
            error = error * one.mask_B1HW
        weight = 2 / (math.pi * (1 - 2 * t + 2 * t**2))
        losses.append(error.mean((1, 2, 3)) * weight * one.weight_B)
        times.append(t)
    (torch.cat(losses).mean() * scale).backward()
    return torch.cat([p.grad.reshape(-1) for p in model.params]), losses, times


def backward(model, **fields):
    runner = EagerStep(model.params)
    return Backward(model, OBJECTIVE, torch.Generator(), SEED, fields.pop("guard", StepGuard()), runner, **fields)


def check(found, one, number=4, group=GROUP, **keys):
    gradient, losses, times = expected(group, number, **keys)
    assert torch.allclose(one.runner.flat_grad, gradient, rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found[0], losses, strict=True))
    assert all(map(torch.equal, found[1], times)) and len(found[1]) == len(times)


@pytest.mark.parametrize(("first", "stride"), [(0, 1), (1, 2), (2, 3)])
def test_the_gradient_is_that_of_the_mean_over_all_images(first, stride):
    one = backward(Model(), first_index=first, stride=stride)
    check(one(GROUP, 4), one, first=first, stride=stride)
    assert one.predict.sizes == [3, 1, 2]
    assert one.predict.calls == [(b.names, b.captions) for b in GROUP]


def test_the_loss_scale_multiplies_the_gradient_and_not_the_losses():
    one = backward(Model(), guard=StepGuard(scale=64.0))
    check(one(GROUP, 4), one, scale=64.0)


@pytest.mark.parametrize(("most", "sizes"), [(2, [1, 1, 1, 1, 1, 1]), (1, [1, 1, 1, 1, 1, 1])])
def test_half_as_many_images_at_once_give_the_same_gradient(most, sizes, caplog):
    """Three images at most: then one at once."""
    one = backward(Model(most))
    check(one(GROUP, 4), one)
    assert one.predict.sizes == [3, *sizes] and one.images_at_once == 1
    assert "Step 4: out of memory with 3 images at once; from now on 1 at once" in caplog.text
    assert "no memory" in caplog.text and "and more" not in caplog.text
    one.runner.clear()
    check(one(GROUP, 5), one, 5)
    assert one.predict.sizes[7:] == [1] * 6  # for the rest of the run


def test_halves_of_eight_images(caplog):
    group = [batch(8, 7, mask=True)]
    one = backward(Model(3))
    check(one(group, 4), one, group=group)
    assert one.predict.sizes == [8, 4, 2, 2, 2, 2] and one.images_at_once == 2
    odd = [batch(5, 8)]
    one.runner.clear()
    check(one(odd, 6), one, 6, group=odd)
    assert one.predict.sizes[6:] == [2, 2, 1]


def test_a_single_image_that_does_not_fit_is_an_error():
    one = backward(Model(0))
    with pytest.raises(OutOfMemoryError, match="Step 4: even a single image does not fit in memory: no memory"):
        one(GROUP, 4)
    assert one.predict.sizes == [3, 1]
    small = backward(Model(0), images_at_once=5)
    with pytest.raises(OutOfMemoryError, match="even a single image"):
        small([batch(1, 1)], 4)


def test_graphs_go_first_and_images_are_halved_after_that(caplog):
    """What the graphs held is free then, so as many images fit as in the rehearsal."""

    class Graphs(EagerStep):
        disabled = 0

        def disable(self):
            self.disabled += 1
            model.most = 3
            return self.disabled == 1

    model = Model(2)
    runner = Graphs(model.params)
    one = Backward(model, OBJECTIVE, torch.Generator(), SEED, StepGuard(), runner)
    check(one(GROUP, 4), one)
    assert model.sizes == [3, 3, 1, 2] and one.images_at_once is None
    assert "Step 4: out of memory; CUDA graphs are disabled. no memory" in caplog.text


def test_what_was_prefetched_is_taken_for_its_own_step_alone(monkeypatch):
    made = []
    noised = Backward._noised

    def watched(self, one, number, index):
        made.append((one.names[0], number, index))
        return noised(self, one, number, index)

    monkeypatch.setattr(Backward, "_noised", watched)
    one = backward(Model())
    one.prefetch(GROUP, 4)
    assert made == [] and one.prefetched is None  # step by step there is no time for it
    one.runner.capturing = True
    one.prefetch([], 4)
    assert one.prefetched is None
    one.prefetch(GROUP, 4)
    assert made == [("1-0", 4, 0)]
    check(one(GROUP, 4), one)
    assert made == [("1-0", 4, 0), ("2-0", 4, 1), ("3-0", 4, 2)] and one.prefetched is None
    one.runner.clear()
    one.prefetch(GROUP, 9)
    check(one(GROUP, 5), one, 5)
    assert made[4:] == [("1-0", 5, 0), ("2-0", 5, 1), ("3-0", 5, 2)] and one.prefetched is None


def test_no_memory_for_what_is_prefetched_is_left_to_the_step(monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    one = backward(Model())
    one.runner.capturing = True
    monkeypatch.setattr(Backward, "_noised", fails)
    one.prefetch(GROUP, 4)
    assert one.prefetched is None


def test_a_micro_batch_alone_is_a_step_of_number_zero(caplog):
    model = Model()
    runner = EagerStep(model.params)
    with caplog.at_level(logging.WARNING):
        gradients.add_gradient(GROUP[0], predict=model, objective=OBJECTIVE, device="cpu", seed=SEED, runner=runner)
    assert torch.allclose(runner.flat_grad, expected(GROUP[:1], 0)[0], rtol=1e-4, atol=1e-5)
    model = Model(1)
    with pytest.raises(torch.OutOfMemoryError):
        gradients.add_gradient(
            GROUP[0], predict=model, objective=OBJECTIVE, device="cpu", seed=SEED, runner=EagerStep(model.params)
        )
