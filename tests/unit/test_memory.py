"""The prediction of a step's memory, against peaks that `python -m bench step` measured on one accelerator."""

import pytest

from trainer.spec.family import base_models, get_family
from trainer.spec.memory_model import BATCHES, TIGHT, Workload, best, fastest, on_host, phases, predicted, ways

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


def work(batch, pixels=1280 * 768):
    return Workload(pixels, batch, 16, "adamw")


@pytest.mark.parametrize(
    ("name", "precision", "batch", "recompute", "offload", "gib"),
    [(name, *row) for name, rows in MEASURED.items() for row in rows],
)
def test_the_prediction_is_within_five_per_cent_or_half_a_gib(name, precision, batch, recompute, offload, gib):
    of, pixels = base_models()[name][1].footprint, 1280 * 768 if name == "flux" else 1024 * 1024
    found = predicted(of, work(batch, pixels), precision=precision, recompute=recompute, offload=offload)
    assert abs(found - gib) <= max(0.05 * gib, 0.5)


@pytest.mark.parametrize("have", [16, 24, 32, 48, 80, 141, 192])
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 60])
@pytest.mark.parametrize("name", [n for n, (_, m) in base_models().items() if m.footprint])
def test_what_is_chosen_fits_if_anything_does(have, batch, name):
    of = base_models()[name][1].footprint
    choices = ways(of, work(batch), ["fp8", "bf16"])
    way = best(of, work(batch), choices, have_gib=have, host_gib=1000)
    assert way.gib <= have * TIGHT or way.gib == min(w.gib for w in choices)
    assert 0 <= way.kept_blocks <= of.region_count
    again = predicted(
        of,
        work(batch),
        precision=way.precision,
        recompute=way.recompute,
        kept_blocks=way.kept_blocks,
        offload=way.offload,
        turned=way.turned,
    )
    assert again == pytest.approx(way.gib)


def test_more_memory_is_never_used_for_less():
    order = ["all", "attention", "products", "none"]
    ranks = [
        order.index(best(FLUX, work(4), ways(FLUX, work(4), ["fp8"]), have_gib=have, host_gib=0).recompute)
        for have in (14, 20, 28, 40, 80, 141)
    ]
    assert ranks == sorted(ranks)


def test_what_the_host_cannot_hold_is_not_sent_there():
    large = work(60)
    choices = ways(FLUX, large, ["fp8"])
    sent = best(FLUX, large, choices, have_gib=141, host_gib=1000)
    assert sent.offload == "activations" and on_host(FLUX, large, sent) > 100
    less = best(FLUX, large, choices, have_gib=141, host_gib=on_host(FLUX, large, sent) - 1)
    assert (less.recompute, less.offload) == ("all", "activations")
    assert best(FLUX, large, choices, have_gib=141, host_gib=20).offload == "none"


def test_no_more_blocks_are_kept_than_there_are():
    way = next(w for w in ways(FLUX, work(1, 512 * 512), ["fp8"]) if w.recompute == "attention")
    assert best(FLUX, work(1, 512 * 512), [way], have_gib=139, host_gib=0).kept_blocks == FLUX.region_count


def test_a_region_for_each_block_that_a_plan_may_keep_whole():
    assert FLUX.region_count == 19 + 38 and get_family("sd3").FACTS.models["sd3"].footprint.region_count == 24


def test_weights_are_streamed_before_4_bits_are_taken_and_after_all_that_stays():
    small = Workload(512 * 512, 1, 16, "adamw8bit")
    choices = ways(FLUX, small, ["fp8", "nf4"])
    named = [(way.precision, way.offload == "weights") for way in choices]
    assert list(dict.fromkeys(named)) == [("fp8", False), ("fp8", True), ("nf4", False), ("nf4", True)]
    at_home = best(FLUX, small, choices, have_gib=8, host_gib=24)
    assert (at_home.precision, at_home.offload) == ("fp8", "weights") and at_home.gib < 4
    little_host = best(FLUX, small, choices, have_gib=8, host_gib=6)
    assert little_host.precision == "nf4" and little_host.offload != "weights"


def test_streamed_weights_are_counted_on_the_host():
    way = next(w for w in ways(FLUX, work(1), ["fp8"]) if w.offload == "weights")
    assert on_host(FLUX, work(1), way) == pytest.approx(11.1 + 1.5, abs=0.7)


@pytest.mark.parametrize("have", [16, 24, 48, 80, 141, 192])
def test_the_batch_is_the_fastest_that_fits_and_more_memory_is_never_slower(have):
    def tried(have):
        works = [Workload(1024 * 1024, batch, 16, "adamw") for batch in BATCHES]
        found = [(w, best(FLUX, w, ways(FLUX, w, ["fp8"]), have_gib=have, host_gib=500)) for w in works]
        return [(w, way) for w, way in found if way.gib <= have * TIGHT]

    work, way = fastest(FLUX, tried(have))
    assert way.gib <= have * TIGHT and 1 <= work.batch <= 64
    assert have < 80 or (way.recompute in ("none", "products") and work.batch >= 2)


def test_the_peaks_of_all_phases_are_told():
    way = best(FLUX, work(1), ways(FLUX, work(1), ["fp8"]), have_gib=24, host_gib=64)
    pixels = {"drawn_pixels": 2**20, "encoded_pixels": 1280 * 768}
    plain = phases(FLUX, work(1), way, streamed=False, tiled=False, **pixels)
    lean = phases(FLUX, work(1), way, streamed=True, tiled=True, **pixels)
    larger = phases(FLUX, work(1), way, streamed=False, tiled=False, **{**pixels, "encoded_pixels": 2**22})
    assert larger["latents"] > 1.3 * plain["latents"] and {**larger, "latents": 0} == {**plain, "latents": 0}
    assert plain["training"] == lean["training"] == way.gib
    assert 9 < plain["texts"] < 10.5 and lean["texts"] < 2
    assert lean["samples"] < plain["samples"] - 2 and lean["latents"] < plain["latents"]
