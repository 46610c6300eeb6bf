"""Every optimiser and schedule against its published algorithm, written out here in float64 with numpy.

A quadratic with one optimum is minimised from the same start, once by each. Where a rule of the algorithm is left out,
has another constant or comes in another order, the weights are others within a few steps.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from trainer.spec.optimizers import OPTIMIZERS, SCHEDULERS
from trainer.training import optimizers

STEPS, DECAY, WARMUP = 8, 0.1, 3
SHAPES = ((96, 64), (64, 8))  # the first is large enough for states in 8 bits
EPS, RATE = 1e-8, 0.01
D0 = 1e-4  # where Prodigy's d begins: steps of 1e-6 would drown in the rounding of weights in fp32


def starts():
    """One matrix begins anywhere (at numbers that bf16 holds exactly), one at zero like half of an adapter."""
    rng = np.random.default_rng(0)
    return [rng.integers(-64, 65, SHAPES[0]) / 64, np.zeros(SHAPES[1])]


def optima():
    rng = np.random.default_rng(1)
    return [rng.normal(size=shape) for shape in SHAPES]


class Adam:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2)."""

    rate, betas = RATE, (0.9, 0.999)

    def __init__(self, weights):
        self.weights, self.t = weights, 0
        self.m, self.v = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]

    def step(self, gradients):
        self.t += 1
        b1, b2 = self.betas
        for i, g in enumerate(gradients):
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g**2
            m, v = self.m[i] / (1 - b1**self.t), self.v[i] / (1 - b2**self.t)
            self.weights[i] = self.weights[i] - self.rate * (m / (np.sqrt(v) + EPS) + DECAY * self.weights[i])

    def result(self):
        return self.weights


class Lion(Adam):
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2."""

    betas = (0.9, 0.99)

    def step(self, gradients):
        b1, b2 = self.betas
        for i, g in enumerate(gradients):
            update = np.sign(b1 * self.m[i] + (1 - b1) * g)
            self.weights[i] = self.weights[i] - self.rate * (update + DECAY * self.weights[i])
            self.m[i] = b2 * self.m[i] + (1 - b2) * g


class Adafactor:
    """Shazeer & Stern 2018, arXiv:1804.04235, algorithm 4, with a fixed step size and decoupled weight decay."""

    rate = RATE

    def __init__(self, weights):
        self.weights, self.t = weights, 0
        self.rows, self.columns = [0.0] * len(weights), [0.0] * len(weights)

    def step(self, gradients):
        self.t += 1
        b2 = 1 - self.t**-0.8
        for i, g in enumerate(gradients):
            squares = g**2 + 1e-30
            self.rows[i] = b2 * self.rows[i] + (1 - b2) * squares.mean(axis=1)
            self.columns[i] = b2 * self.columns[i] + (1 - b2) * squares.mean(axis=0)
            update = g / np.sqrt(np.outer(self.rows[i], self.columns[i]) / self.rows[i].mean())
            update /= max(1.0, np.sqrt((update**2).mean()))
            self.weights[i] = self.weights[i] - self.rate * (update + DECAY * self.weights[i])

    def result(self):
        return self.weights


class Prodigy(Adam):
    """Mishchenko & Defazio 2024, arXiv:2306.06101, algorithm 4; without bias correction, with d_coef 2."""

    rate = 1.0

    def __init__(self, weights):
        super().__init__(weights)
        self.start = [w.copy() for w in weights]
        self.d, self.r, self.s = D0, 0.0, [np.zeros_like(w) for w in weights]

    def step(self, gradients):
        b1, b2 = self.betas
        d, root = self.d, math.sqrt(b2)
        self.r = root * self.r + (1 - root) * d**2 * sum(
            np.vdot(g, x0 - x) for g, x0, x in zip(gradients, self.start, self.weights, strict=True)
        )
        for i, g in enumerate(gradients):
            self.s[i] = root * self.s[i] + (1 - root) * d**2 * g
            self.m[i] = b1 * self.m[i] + (1 - b1) * d * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * d**2 * g**2
        self.d = max(d, 2.0 * self.r / sum(np.abs(s).sum() for s in self.s))
        for i in range(len(gradients)):
            update = self.m[i] / (np.sqrt(self.v[i]) + self.d * EPS)
            self.weights[i] = self.weights[i] - d * (update + DECAY * self.weights[i])


class ScheduleFree:
    """AdamW with schedule-free averaging (Defazio et al. 2024, arXiv:2405.15682, algorithm 1), and a warm-up.

    The gradient is taken at y, between the quick z and the averaged x; x is what counts in the end.
    """

    rate, b1, b2 = RATE, 0.9, 0.999

    def __init__(self, weights):
        self.t, self.total = 0, 0.0
        self.z, self.x = [w.copy() for w in weights], [w.copy() for w in weights]
        self.v = [np.zeros_like(w) for w in weights]

    @property
    def weights(self):
        return [self.b1 * x + (1 - self.b1) * z for x, z in zip(self.x, self.z, strict=True)]

    def step(self, gradients):
        self.t += 1
        rate = self.rate * min(1.0, self.t / WARMUP)
        updates = []
        for i, g in enumerate(gradients):
            self.v[i] = self.b2 * self.v[i] + (1 - self.b2) * g**2
            updates.append(g / (np.sqrt(self.v[i] / (1 - self.b2**self.t)) + EPS))
        self.move(updates, rate)

    def move(self, updates, rate):
        self.total += rate**2
        share, at = rate**2 / self.total, self.weights
        for i, update in enumerate(updates):
            self.z[i] = self.z[i] - rate * (update + DECAY * at[i])
            self.x[i] = (1 - share) * self.x[i] + share * self.z[i]

    def result(self):
        return self.x


class ProdigyScheduleFree(ScheduleFree):
    """The two together: Prodigy's d, estimated along z from every eleventh weight, and schedule-free averaging."""

    rate, b2, every = 1.0, 0.99, 11

    def __init__(self, weights):
        super().__init__(weights)
        self.start = [self.some(w) for w in weights]
        self.d, self.r, self.s = D0, 0.0, [0.0] * len(weights)

    def some(self, values):
        return values.ravel()[:: self.every].copy()

    def step(self, gradients):
        d, root, updates = self.d, math.sqrt(self.b2), []
        ahead = sum(
            np.vdot(self.some(g), x0 - self.some(z)) for g, x0, z in zip(gradients, self.start, self.z, strict=True)
        )
        self.r = root * self.r + d**2 * ahead
        for i, g in enumerate(gradients):
            self.s[i] = root * self.s[i] + d**2 * self.some(g)
            self.v[i] = self.b2 * self.v[i] + (1 - self.b2) * d**2 * g**2
            updates.append(d * g / (np.sqrt(self.v[i]) + d * EPS))
        self.move(updates, d)
        self.d = max(d, 2.0 * self.r / sum(np.abs(s).sum() for s in self.s))


# name → the algorithm, arguments that turn off what is beyond it, and how near the weights' path must come to it.
EXACT = 1e-5
CASES = {
    "prodigy": (Prodigy, {"d0": D0}, 0.005),  # d grows from small differences of weights, which fp32 rounds
    "adamw": (Adam, {}, EXACT),
    "adamw8bit": (Adam, {}, 0.03),  # moments in 8 bits
    "lion": (Lion, {}, EXACT),
    "lion8bit": (Lion, {}, 0.03),  # a momentum in 8 bits
    "adafactor": (Adafactor, {}, EXACT),
    "adamw-schedulefree": (ScheduleFree, {}, EXACT),
    "prodigy-schedulefree": (  # keeps s in bf16
        ProdigyScheduleFree,
        {"d0": D0, "factored": False, "use_stableadamw": False, "d_limiter": False},
        0.05,
    ),
}


def run(name, args, *, rate):
    """What the optimiser of the plan makes of the weights; and its `d`, after each step."""
    spec = OPTIMIZERS[name]
    params = [torch.nn.Parameter(torch.tensor(w, dtype=torch.float32)) for w in starts()]
    goals = [torch.tensor(w, dtype=torch.float32) for w in optima()]
    optimizer = optimizers.make_optimizer(
        name,
        params,
        learning_rate=rate,
        weight_decay=DECAY,
        args={**spec.defaults, **args},
        warmup_steps=WARMUP,
    )
    optimizers.set_training(optimizer, True)
    sizes = []
    for _ in range(STEPS):
        for p, objective in zip(params, goals, strict=True):
            p.grad = (p - objective).detach()
        optimizer.step()
        sizes.append(optimizer.param_groups[0].get("d", 0.0))
    optimizers.set_training(optimizer, False)
    return [p.detach().double().numpy() for p in params], sizes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_is_its_published_algorithm(name):
    kind, args, tolerance = CASES[name]
    reference, sizes = kind(starts()), []
    for _ in range(STEPS):
        reference.step([w - objective for w, objective in zip(reference.weights, optima(), strict=True)])
        sizes.append(getattr(reference, "d", 0.0))
    got, found = run(name, args, rate=kind.rate)
    assert found == pytest.approx(sizes, rel=tolerance)
    if OPTIMIZERS[name].prodigy:
        assert sizes[-1] > 10 * sizes[0]
    for begin, mine, its in zip(starts(), got, reference.result(), strict=True):
        assert np.linalg.norm(mine - its) <= tolerance * np.linalg.norm(its - begin) + 1e-7


def test_moments_in_8_bits_are_for_large_weights_only():
    """The small matrix of the problem is trained as exactly as by AdamW."""
    assert np.abs(run("adamw8bit", {}, rate=RATE)[0][1] - run("adamw", {}, rate=RATE)[0][1]).max() < 1e-7


TOTAL, CYCLES = 20, 2
PROGRESS = [max(0, n - WARMUP) / (TOTAL - WARMUP) for n in range(TOTAL)]
RISE = [min(1.0, n / WARMUP) for n in range(TOTAL)]
COURSES = {
    "constant": [1.0] * TOTAL,
    "constant_with_warmup": RISE,
    "linear": [r * (1 - p) for r, p in zip(RISE, PROGRESS, strict=True)],
    "cosine": [r * (1 + math.cos(math.pi * p)) / 2 for r, p in zip(RISE, PROGRESS, strict=True)],
    "cosine_with_restarts": [
        r * (1 + math.cos(math.pi * (CYCLES * p % 1))) / 2 for r, p in zip(RISE, PROGRESS, strict=True)
    ],
    # Of the first power, down to 1e-7.
    "polynomial": [r * (1 - p * (1 - 1e-3)) for r, p in zip(RISE, PROGRESS, strict=True)],
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_schedule_has_the_course_of_its_formula(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    schedule = optimizers.make_schedule(name, optimizer, warmup_steps=WARMUP, total_steps=TOTAL, num_cycles=CYCLES)
    rates = []
    for _ in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"] / 1e-4)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(COURSES[name], rel=1e-6, abs=1e-9)
    rises = [b > a for a, b in pairwise(rates[WARMUP:])]
    assert sum(rises) == (CYCLES - 1 if name == "cosine_with_restarts" else 0)
