"""Train the miniature models: one loop for all of them, which gets the losses as functions.

On a GPU every step is a replayed CUDA graph, since models this small otherwise wait for launches; so a loss function
draws its own batch from pools that are on the device already, and never copies from or to the host.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LossFunction = Callable[[], torch.Tensor]
WARM_UP = 3  # eager steps before the capture: torch.cuda.graph needs some, and kernels are chosen in them


def difference(y_BCHW: torch.Tensor, x_BCHW: torch.Tensor) -> torch.Tensor:
    """Between an image and its copy: of pixels, and of each to its neighbours, which makes edges sharp."""
    edges = sum(F.l1_loss(y_BCHW.diff(dim=axis), x_BCHW.diff(dim=axis)) for axis in (2, 3))
    return F.l1_loss(y_BCHW, x_BCHW) + F.mse_loss(y_BCHW, x_BCHW) + edges


def rate(progress: float) -> float:
    """The factor of the learning rate at `progress` 0..1: up over the first 3 %, then down along a cosine."""
    return min(progress / 0.03, 1.0) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def fit(
    losses: Sequence[LossFunction],
    modules: Sequence[nn.Module],
    *,
    seconds: float,
    peak_rate: float,
    device: torch.device,
    report: Callable[[str], None],
    average: float = 0.998,
    captured: bool = True,
) -> int:
    """Trains `modules` in place for `seconds`, leaves the moving average of their weights in them, returns the steps.

    Each step takes one of `losses` at random (one for each shape of image). AdamW, gradients clipped to norm 1. On a
    GPU the modules compute in bf16, which halves the traffic that bounds them; the weights proper stay in fp32.
    `captured` False: no CUDA graphs, for a loss that cannot be captured.
    """
    on_gpu = device.type == "cuda"
    replayed = on_gpu and captured
    params = [param for module in modules for param in module.parameters()]
    weights: list[torch.Tensor] = [param for param in params if param.requires_grad]
    masters = [param.detach().clone().requires_grad_() for param in weights]
    if on_gpu:
        for module in modules:
            module.bfloat16()
    kept = [torch.zeros_like(master) for master in masters]
    for master, gradient in zip(masters, kept, strict=True):
        master.grad = gradient
    mean = [torch.zeros_like(master) for master in masters]
    learning_rate = torch.tensor(0.0, device=device)
    running_loss = torch.tensor(1.0, device=device)
    adam = torch.optim.AdamW(
        masters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=on_gpu, capturable=on_gpu
    )

    def step(loss_function: LossFunction) -> None:
        for weight in weights:
            weight.grad = None
        loss = loss_function()
        loss.backward()
        _copy_gradients(weights, kept)
        nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        adam.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
            torch._foreach_lerp_(mean, masters, 1 - average)
            running_loss.lerp_(loss.float(), 0.02)

    start = time.monotonic()
    runs = _prepared(step, losses, replayed=replayed)
    report(f"ready after {time.monotonic() - start:.0f} s")
    steps = _run(
        runs,
        seconds=seconds - (time.monotonic() - start),
        peak_rate=peak_rate,
        learning_rate=learning_rate,
        running_loss=running_loss,
        every=1000 if replayed else 50,
        report=report,
    )
    if not steps:
        raise TimeoutError(f"{seconds:.0f} s were over before the first step")
    known = 1 - average ** (steps + (WARM_UP * len(losses) if replayed else 0))  # the average began at zero
    _write_back(modules, weights, [smooth / known for smooth in mean])
    report(f"{steps} steps in {time.monotonic() - start:.0f} s, last loss {running_loss.item():.4f}")
    return steps


def _copy_gradients(weights: Sequence[torch.Tensor], kept: Sequence[torch.Tensor]) -> None:
    """Put the weights' gradients into `kept`; a weight that no loss reaches keeps its gradient of zeros."""
    gradients = []
    slots = []
    for weight, slot in zip(weights, kept, strict=True):
        if weight.grad is not None:
            gradients.append(weight.grad)
            slots.append(slot)
    torch._foreach_copy_(slots, gradients)


def _write_back(modules: Sequence[nn.Module], weights: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Put `values` into the modules, in fp32 and without gradients."""
    for module in modules:
        module.float()
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
            weight.grad = None


def _run(
    runs: Sequence[Callable[[], None]],
    *,
    seconds: float,
    peak_rate: float,
    learning_rate: torch.Tensor,
    running_loss: torch.Tensor,
    every: int,
    report: Callable[[str], None],
) -> int:
    """Call one of `runs` at random until `seconds` are over, setting `learning_rate`; return how often."""
    rng = random.Random(0)
    start = time.monotonic()
    steps = 0
    while (elapsed := time.monotonic() - start) < seconds:
        learning_rate.fill_(peak_rate * rate(elapsed / seconds))
        rng.choice(runs)()
        steps += 1
        if steps % 50 == 0:  # also keeps the host from running_loss far ahead of the device
            value = running_loss.item()
            if steps % every == 0:
                report(f"step {steps}  {elapsed:5.0f} s  loss {value:.4f}")
            if not math.isfinite(value):
                raise FloatingPointError(f"loss {value} at step {steps}")
    return steps


def _prepared(
    step: Callable[[LossFunction], None], losses: Sequence[LossFunction], *, replayed: bool
) -> list[Callable[[], None]]:
    """`step` of each loss, as a CUDA graph where it is to be `replayed`."""
    if not replayed:
        return [_eager(step, loss) for loss in losses]
    pool = torch.cuda.graph_pool_handle()  # no graph reads what another has left, so all share one memory
    return [_captured(step, loss, pool) for loss in losses]


def _eager(step: Callable[[LossFunction], None], loss: LossFunction) -> Callable[[], None]:
    return lambda: step(loss)


def _captured(step: Callable[[LossFunction], None], loss: LossFunction, pool: Any) -> Callable[[], None]:
    """`step(loss)` as a CUDA graph. Warm-up steps are real steps, at a learning rate of zero."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step(loss)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step(loss)
    return graph.replay
