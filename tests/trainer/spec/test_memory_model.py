"""The prediction of a step's memory, against peaks that `python -m bench step` measured on one accelerator."""

import pytest

from trainer.spec.family import base_models, get_family
from trainer.spec.memory_model import (
    BATCHES,
    MAX_USABLE_SHARE,
    Workload,
    candidates,
    choose,
    fastest_batch,
    phase_peaks_gib,
    pinned_host_gib,
    predict_peak_gib,
)

FLUX = base_models()["flux"][1].footprint
# Rank 16, AdamW; Flux.1 at 1280 x 768 pixels, the others at 1024 x 1024: precision, batch, recompute, offload, GiB.
MEASURED = {
    "flux": [
        ("fp8", 1, "all", "none", 13.89),
        ("fp8", 4, "all", "none", 19.89),
        ("fp8", 1, "attention", "none", 15.33),
        ("fp8", 4, "attention", "activations", 16.03),
        ("fp8", 1, "none", "none", 32.16),
        ("fp8", 1, "none", "none", 30.95),
        ("fp8", 4, "products", "none", 70.22),
        ("fp8", 4, "products", "none", 70.65),
        ("fp8", 1, "none", "none", 31.21),
        ("fp8", 1, "all", "weights", 3.55),
    ],
    "sdxl": [
        ("fp8", 1, "none", "none", 8.24),
        ("fp8", 4, "none", "none", 21.35),
        ("fp8", 1, "attention", "none", 5.37),
        ("fp8", 1, "all", "none", 5.07),
        ("bf16", 1, "none", "none", 12.41),
        ("bf16", 4, "none", "none", 31.70),
    ],
    "sd3": [
        ("fp8", 4, "none", "none", 17.78),
        ("fp8", 4, "none", "none", 17.02),
    ],
}


def workload(batch, pixels=1280 * 768):
    return Workload(pixels, batch, 16, "adamw")


@pytest.mark.parametrize(
    ("name", "precision", "batch", "recompute", "offload", "gib"),
    [(name, *row) for name, rows in MEASURED.items() for row in rows],
)
def test_the_prediction_is_within_five_per_cent_or_half_a_gib(name, precision, batch, recompute, offload, gib):
    footprint, pixels = base_models()[name][1].footprint, 1280 * 768 if name == "flux" else 1024 * 1024
    found = predict_peak_gib(
        footprint, workload(batch, pixels), precision=precision, recompute=recompute, offload=offload
    )
    assert abs(found - gib) <= max(0.05 * gib, 0.5)


@pytest.mark.parametrize("have", [16, 24, 32, 48, 80, 141, 192])
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 60])
@pytest.mark.parametrize("name", [n for n, (_, m) in base_models().items() if m.footprint])
def test_the_chosen_strategy_fits_if_any_does(have, batch, name):
    footprint = base_models()[name][1].footprint
    strategies = candidates(footprint, workload(batch), ["fp8", "bf16"])
    strategy = choose(footprint, workload(batch), strategies, have_gib=have, host_gib=1000)
    assert strategy.gib <= have * MAX_USABLE_SHARE or strategy.gib == min(s.gib for s in strategies)
    assert 0 <= strategy.kept_blocks <= footprint.region_count
    again = predict_peak_gib(
        footprint,
        workload(batch),
        precision=strategy.precision,
        recompute=strategy.recompute,
        kept_blocks=strategy.kept_blocks,
        offload=strategy.offload,
        transposed=strategy.transposed,
    )
    assert again == pytest.approx(strategy.gib)


def test_with_more_memory_no_more_is_recomputed():
    order = ["all", "attention", "products", "none"]
    ranks = [
        order.index(
            choose(FLUX, workload(4), candidates(FLUX, workload(4), ["fp8"]), have_gib=have, host_gib=0).recompute
        )
        for have in (14, 20, 28, 40, 80, 141)
    ]
    assert ranks == sorted(ranks)


def test_nothing_is_offloaded_that_host_memory_cannot_hold():
    large = workload(60)
    strategies = candidates(FLUX, large, ["fp8"])
    sent = choose(FLUX, large, strategies, have_gib=141, host_gib=1000)
    assert sent.offload == "activations" and pinned_host_gib(FLUX, large, sent) > 100
    less = choose(FLUX, large, strategies, have_gib=141, host_gib=pinned_host_gib(FLUX, large, sent) - 1)
    assert (less.recompute, less.offload) == ("all", "activations")
    assert choose(FLUX, large, strategies, have_gib=141, host_gib=20).offload == "none"


def test_no_more_blocks_are_exempt_from_recompute_than_there_are():
    strategy = next(s for s in candidates(FLUX, workload(1, 512 * 512), ["fp8"]) if s.recompute == "attention")
    assert choose(FLUX, workload(1, 512 * 512), [strategy], have_gib=139, host_gib=0).kept_blocks == FLUX.region_count


def test_the_footprint_counts_a_region_for_each_block():
    assert FLUX.region_count == 19 + 38 and get_family("sd3").FACTS.models["sd3"].footprint.region_count == 24


def test_weight_streaming_is_tried_before_4_bits_and_after_strategies_with_weights_on_the_device():
    small = Workload(512 * 512, 1, 16, "adamw8bit")
    strategies = candidates(FLUX, small, ["fp8", "nf4"])
    named = [(strategy.precision, strategy.offload == "weights") for strategy in strategies]
    assert list(dict.fromkeys(named)) == [("fp8", False), ("fp8", True), ("nf4", False), ("nf4", True)]
    at_home = choose(FLUX, small, strategies, have_gib=8, host_gib=24)
    assert (at_home.precision, at_home.offload) == ("fp8", "weights") and at_home.gib < 4
    little_host = choose(FLUX, small, strategies, have_gib=8, host_gib=6)
    assert little_host.precision == "nf4" and little_host.offload != "weights"


def test_streamed_weights_count_as_host_memory():
    strategy = next(s for s in candidates(FLUX, workload(1), ["fp8"]) if s.offload == "weights")
    assert pinned_host_gib(FLUX, workload(1), strategy) == pytest.approx(11.1 + 1.5, abs=0.7)


@pytest.mark.parametrize("have", [16, 24, 48, 80, 141, 192])
def test_the_batch_is_the_fastest_that_fits_and_more_memory_is_never_slower(have):
    def tried(have):
        works = [Workload(1024 * 1024, batch, 16, "adamw") for batch in BATCHES]
        found = [(w, choose(FLUX, w, candidates(FLUX, w, ["fp8"]), have_gib=have, host_gib=500)) for w in works]
        return [(w, strategy) for w, strategy in found if strategy.gib <= have * MAX_USABLE_SHARE]

    chosen, strategy = fastest_batch(FLUX, tried(have))
    assert strategy.gib <= have * MAX_USABLE_SHARE and 1 <= chosen.batch <= 64
    assert have < 80 or (strategy.recompute in ("none", "products") and chosen.batch >= 2)


def test_streaming_and_tiling_lower_the_peaks_of_their_phases_alone():
    strategy = choose(FLUX, workload(1), candidates(FLUX, workload(1), ["fp8"]), have_gib=24, host_gib=64)
    pixels = {"drawn_pixels": 2**20, "encoded_pixels": 1280 * 768}
    plain = phase_peaks_gib(FLUX, workload(1), strategy, streamed=False, tiled=False, **pixels)
    lean = phase_peaks_gib(FLUX, workload(1), strategy, streamed=True, tiled=True, **pixels)
    larger = phase_peaks_gib(
        FLUX, workload(1), strategy, streamed=False, tiled=False, **{**pixels, "encoded_pixels": 2**22}
    )
    assert larger["latents"] > 1.3 * plain["latents"] and {**larger, "latents": 0} == {**plain, "latents": 0}
    assert plain["training"] == lean["training"] == strategy.gib
    assert 9 < plain["texts"] < 10.5 and lean["texts"] < 2
    assert lean["samples"] < plain["samples"] - 2 and lean["latents"] < plain["latents"]
