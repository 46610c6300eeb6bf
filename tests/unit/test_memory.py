"""The prediction of a step's memory, against peaks that `python -m bench.engine` measured on one accelerator."""

import pytest

from trainer.families import base_models, family
from trainer.memory import SPARE, Work, best, on_host, predicted, ways

FLUX = base_models()["flux"][1].footprint
# Flux.1, 1280 x 768 pixels, rank 16, AdamW, weights in FP8: batch, recompute, offload, GiB
MEASURED = [
    (1, "all", "none", 13.89),
    (4, "all", "none", 19.89),
    (1, "attention", "none", 15.33),
    (4, "attention", "activations", 15.37),
    (2, "none", "none", 64.09),
]


def work(batch, pixels=1280 * 768):
    return Work(pixels, batch, 16, "adamw")


@pytest.mark.parametrize(("batch", "recompute", "offload", "gib"), MEASURED)
def test_the_prediction_is_within_five_per_cent_or_half_a_gib(batch, recompute, offload, gib):
    found = predicted(FLUX, work(batch), precision="fp8", recompute=recompute, offload=offload)
    assert abs(found - gib) <= max(0.05 * gib, 0.5)


@pytest.mark.parametrize("have", [16, 24, 32, 48, 80, 141, 192])
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 60])
@pytest.mark.parametrize("name", [n for n, (_, m) in base_models().items() if m.footprint])
def test_what_is_chosen_fits_if_anything_does(have, batch, name):
    of = base_models()[name][1].footprint
    choices = ways(of, work(batch), ["fp8", "bf16"])
    way = best(of, work(batch), choices, have_gib=have, host_gib=1000)
    assert way.gib <= have * SPARE or way.gib == min(w.gib for w in choices)
    assert 0 <= way.kept_blocks <= of.regions
    again = predicted(
        of,
        work(batch),
        precision=way.precision,
        recompute=way.recompute,
        kept_blocks=way.kept_blocks,
        offload=way.offload,
    )
    assert again == pytest.approx(way.gib)


def test_more_memory_is_never_used_for_less():
    order = ["all", "attention", "none"]
    ranks = [
        order.index(best(FLUX, work(4), ways(FLUX, work(4), ["fp8"]), have_gib=have, host_gib=0).recompute)
        for have in (14, 20, 28, 40, 80, 141)
    ]
    assert ranks == sorted(ranks)


def test_what_the_host_cannot_hold_is_not_sent_there():
    large = work(60)
    choices = ways(FLUX, large, ["fp8"])
    assert best(FLUX, large, choices, have_gib=141, host_gib=1000).offload == "activations"
    assert best(FLUX, large, choices, have_gib=141, host_gib=on_host(FLUX, large) - 1).offload == "none"


def test_a_region_for_each_block_that_a_plan_may_keep_whole():
    assert FLUX.regions == 19 + 38 and family("sd3").FACTS.models["sd3"].footprint.regions == 24
