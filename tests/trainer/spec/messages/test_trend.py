"""Whether a loss has risen: by medians, which neither spikes nor few steps move."""

import numpy as np
import pytest

from trainer.spec.messages.trend import STRETCH, risen


def test_a_loss_that_is_far_higher_has_risen():
    assert risen([0.5] * STRETCH + [1.3] * STRETCH) == (0.5, 1.3, 30)
    assert risen([0.5] * 200 + [1.3] * 200) == (0.5, 1.3, 100)
    said = "the loss has risen from 0.5 (median of the first 20 steps) to 1.3 (of the last 30)"
    assert str(risen([0.5] * 30 + [1.3] * 30)) == said


@pytest.mark.parametrize(
    "losses",
    [
        [0.5] * 200,
        [1.1] * 100 + [0.5] * 100,
        [0.5] * 199 + [9000.0],
        [0.5] * 100 + [1.2] * 200,
        [0.1] * 29 + [9.0] * 30,  # too few to say
        [0.0] * 30 + [1.0] * 30,
        [],
    ],
)
def test_what_has_not_is_not_said_to_have(losses):
    assert risen(losses) is None


def test_the_noise_of_single_images_is_no_rise():
    """Losses as those of batch 1, from 0.1 to 2 by the noise level: of 500 runs that learn nothing none at any step."""
    random = np.random.default_rng(0)
    for _ in range(500):
        losses = list(0.5 * np.exp(0.7 * random.standard_normal(400)))
        assert not any(risen(losses[:step]) for step in range(STRETCH, 401, STRETCH))
