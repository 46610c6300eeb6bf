"""The ladder that a job goes down where memory runs out."""

import pytest

from trainer.engine import rungs

ORDER = {"none": 0, "attention": 1, "all": 2}


@pytest.mark.parametrize("offload", ["none", "activations"])
@pytest.mark.parametrize("kept", [0, 7])
@pytest.mark.parametrize("policy", ["none", "attention", "all"])
def test_every_rung_takes_less_and_the_last_takes_least(policy, kept, offload):
    ladder = rungs(policy, kept, offload)
    assert ladder[0] == (policy, kept, offload) and ladder[-1][0] == "all" and ladder[-1][2] == "activations"
    costs = [(where == "activations", ORDER[p], -k) for p, k, where in ladder]
    assert costs == sorted(set(costs))
