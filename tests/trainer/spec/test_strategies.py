"""The table of memory modes: its order, its conditions, and the modes to fall back to, against the rule in words."""

import itertools

import pytest

from trainer.spec.strategies import (
    MEMORY_MODES,
    OFFLOADS,
    POLICIES,
    RECOMPUTE_POLICIES,
    MemoryMode,
    RunningMode,
    described,
    fallbacks,
    memory_mode,
)

# From what keeps least to what keeps most; from what is on the device to what is not.
KEEPS = {"all": 0, "attention": 1, "products": 2, "none": 3}
AWAY = {"none": 0, "activations": 1, "shards": 2, "weights": 3}


def test_the_table_is_in_the_order_of_what_is_kept_and_of_what_it_costs():
    assert list(RECOMPUTE_POLICIES) == list(KEEPS) and tuple(KEEPS) == POLICIES and list(OFFLOADS) == list(AWAY)
    costs = [policy.step_cost for policy in RECOMPUTE_POLICIES.values()]
    assert costs == sorted(costs, reverse=True) and costs[-1] == 1.0 and len(set(costs)) == 4
    slow = [mode.slowdown for mode in OFFLOADS.values()]
    assert slow == sorted(slow) and slow[0] == 1.0 and len(set(slow)) == 4
    assert [(mode.recompute, mode.offload) for mode in MEMORY_MODES] == [
        ("none", "none"),
        ("products", "none"),
        ("attention", "none"),
        ("attention", "activations"),
        ("all", "none"),
        ("all", "activations"),
        ("none", "shards"),
        ("products", "shards"),
        ("attention", "shards"),
        ("all", "shards"),
        ("all", "weights"),
    ]


def test_conditions_of_the_modes():
    """Outputs that a policy keeps are offloaded only with the compiler; streamed weights have no rows for DoRA."""
    for mode in MEMORY_MODES:
        for compiled, dora in itertools.product((False, True), repeat=2):
            possible = compiled or (mode.recompute, mode.offload) != ("attention", "activations")
            possible = possible and not (dora and mode.offload in ("shards", "weights"))
            assert mode.is_allowed(compiled=compiled, dora=dora) == possible
        assert mode.weights_on_device == (mode.offload not in ("shards", "weights"))
        assert memory_mode(mode.recompute, mode.offload) is mode
    with pytest.raises(KeyError):
        memory_mode("products", "weights")
    assert MemoryMode("all").is_allowed(compiled=False, dora=True)


@pytest.mark.parametrize("policy", KEEPS)
@pytest.mark.parametrize("offload", AWAY)
@pytest.mark.parametrize("kept", [0, 3])
@pytest.mark.parametrize("compiled", [False, True])
def test_each_fallback_keeps_and_holds_no_more(policy, offload, kept, compiled):
    first, *rest = fallbacks(policy, kept, offload, compiled=compiled)
    assert first == (policy, kept, offload)
    expected = []
    for mode in MEMORY_MODES:
        running = RunningMode(mode.recompute, 0, mode.offload)
        if KEEPS[mode.recompute] > KEEPS[policy] or AWAY[mode.offload] < AWAY[offload] or mode.recompute == "none":
            continue
        if not compiled and (mode.recompute, mode.offload) == ("attention", "activations"):
            continue
        if mode.offload == "shards" and offload != "shards":  # weights are sharded as they are loaded
            continue
        if running != first:
            expected.append(running)
    assert rest == expected


def test_a_mode_in_words():
    assert described("none", 0, "none") == "everything kept"
    assert described("all", 3, "weights") == (
        "all recomputed, except in 3 blocks, activations offloaded, weights streamed"
    )
    assert described("none", 0, "shards") == "everything kept, weights sharded over the GPUs"
    assert described("products", 1, "activations") == (
        "all but products recomputed, except in 1 blocks, activations offloaded"
    )


# Images per second of Flux.1 and the row to compare with, on one card each: docs/performance.md, docs/lab-notes.md.
SPEEDS = [
    ("all", "none", 2.69 / 3.56),  # H100, batch 1: fp8+all+replay and fp8+none+replay+eager
    ("attention", "none", 2.88 / 3.56),  # fp8+attention+replay
    ("products", "none", 279.2 / 282.8),  # ms of the accelerator for an image
    ("all", "weights", 1.88 / 2.49 * 2.69 / 3.56),  # plain, with the weights streamed and not
]


@pytest.mark.parametrize(("recompute", "offload", "measured"), SPEEDS)
def test_the_cost_of_a_mode_is_as_it_was_measured(recompute, offload, measured):
    predicted = 1 / (RECOMPUTE_POLICIES[recompute].step_cost * OFFLOADS[offload].slowdown)
    assert predicted == pytest.approx(measured, rel=0.05)
