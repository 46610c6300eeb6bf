"""The prediction of a step's memory, against peaks that `python -m bench step` measured on one accelerator."""

import csv
import re
from pathlib import Path

import pytest

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.planning.plan import make_plan
from entrypoint.settings.read import read_settings
from entrypoint.system.hardware import Hardware
from tests.support.machines import NOW
from trainer.spec.family import base_models, get_family
from trainer.spec.memory_model import (
    BATCHES,
    MAX_USABLE_SHARE,
    Workload,
    candidates,
    captions_at_once,
    choose,
    fastest_batch,
    phase_peaks_gib,
    pinned_host_gib,
    predict_peak_gib,
)

FLUX = base_models()["flux"][1].footprint
# Every peak of a step that a document of this repository has, and the place; `what` as `python -m bench step` takes it.
with (Path(__file__).parent / "measured_peaks.csv").open(newline="") as file:
    MEASURED = list(csv.DictReader(file))
OFFLOAD_WORDS = {"host": "activations", "weights": "weights"}
# No plan runs these: SDXL is never compiled, and so not without a CUDA graph either.
NO_PLAN = {("sdxl", "bf16+none+plain")}


def workload(batch, pixels=1280 * 768):
    return Workload(pixels, batch, 16, "adamw")


def predicted(row):
    """The peak as it is predicted, and what a CUDA graph of the step may take besides."""
    precision, recompute, *words = row["what"].split("+")
    footprint = base_models()[row["family"]][1].footprint
    if precision == "fp8" and recompute == "none" and "plain" in words:
        precision = "fp8-storage"  # 8 bits without our own blocks: the same weights, and what diffusers' blocks save
    gib = predict_peak_gib(
        footprint,
        Workload(int(row["pixels"]), int(row["batch"]), int(row["rank"]), row["optimizer"]),
        precision=precision,
        recompute=recompute,
        offload=next((OFFLOAD_WORDS[word] for word in words if word in OFFLOAD_WORDS), "none"),
        transposed="turned" in words,
    )
    is_recorded = "replay" in words and recompute != "none"
    return gib, footprint.capture_gib if is_recorded else 0.0


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['family']}-{row['what']}-{row['batch']}-{row['card']}")
def test_the_prediction_is_within_five_per_cent_or_half_a_gib(row):
    gib, graph = predicted(row)
    measured = float(row["peak"])
    allowed = max(0.05 * measured, 0.5)
    fits = gib - allowed <= measured <= gib + graph + allowed
    assert fits != ((row["family"], row["what"]) in NO_PLAN)


def test_the_table_has_every_peak_of_a_step_that_the_documents_have():
    """Each row of a table with a peak and a batch, in docs/performance.md."""
    text = Path("docs/performance.md").read_text(encoding="utf-8")
    asked = {(row["what"], row["peak"]) for row in MEASURED}
    missing = []
    for line in text.splitlines():
        what = re.search(r"`((?:fp8|bf16)\+[a-z+]+)`", line)
        peaks = re.findall(r"(?<=\| )\d+\.\d(?= \|)", line)
        if (
            line.startswith("| ")
            and what
            and peaks
            and "0." not in line
            and not any((what[1], p) in asked for p in peaks)
        ):
            missing.append(line)
    assert not missing


def test_the_table_has_every_policy_and_way_to_offload():
    words = {word for row in MEASURED for word in row["what"].split("+")}
    assert words >= {"none", "products", "attention", "all", "host", "weights", "turned", "replay", "fp8", "bf16"}
    assert {row["family"] for row in MEASURED} == {"flux", "sdxl", "sd3"}


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


def test_batches_are_powers_of_two_and_their_halves_between():
    expected = sorted([2**n for n in range(8)] + [3 * 2**n for n in range(6)])
    assert list(BATCHES) == expected


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


def activations_gib(base, captions):
    """What a language model works with for so many captions of 512 tokens, in 16 bits, in parts."""
    config = base_models()[base][1].published.configs["text_encoder/config.json"]
    state = captions * 512 * config["hidden_size"] * 2 / 2**30
    mlp = captions * 512 * config["intermediate_size"] * 2 / 2**30
    kept = {"flux2-klein-4b": 28, "flux2-klein-9b": 28, "flux2-dev": 31, "krea2": 37}.get(base, 2)
    put_together = {"krea2": 12}.get(base, 3)
    return (kept + put_together) * state + 3 * mlp


@pytest.mark.parametrize(
    ("base", "at_once"),
    [
        ("flux", 16),
        ("sd3.5-large", 16),
        ("sdxl", 16),
        ("z-image", 11),
        ("qwen-image", 6),
        ("flux2-klein-4b", 4),
        ("flux2-klein-9b", 2),
        ("krea2", 2),
        ("flux2-dev", 1),
    ],
)
def test_wide_text_encoders_encode_as_many_captions_as_there_is_room_for(base, at_once):
    footprint = base_models()[base][1].footprint
    assert captions_at_once(footprint, "fp8", streamed=False) == at_once
    assert captions_at_once(footprint, "fp8", streamed=True) == 16
    assert captions_at_once(footprint, "fp32", streamed=False) in (max(1, at_once // 2), at_once)
    strategy = choose(footprint, workload(1), candidates(footprint, workload(1), ["fp8"]), have_gib=80, host_gib=64)
    pixels = {"drawn_pixels": 2**20, "encoded_pixels": 2**20}
    encoders_gib = footprint.encoder_weights * 2 / 2**30
    whole = phase_peaks_gib(footprint, workload(1), strategy, streamed=False, tiled=False, **pixels)["texts"]
    assert whole == pytest.approx(encoders_gib + 0.5)  # so that as many cards as ever hold them whole
    streamed = phase_peaks_gib(footprint, workload(1), strategy, streamed=True, tiled=False, **pixels)["texts"]
    assert streamed < whole
    if "text_encoder_2/config.json" not in base_models()[base][1].published.configs:
        assert activations_gib(base, at_once) <= whole - encoders_gib
        assert activations_gib(base, 16) <= streamed - encoders_gib / 12


def test_the_largest_language_model_with_16_captions_is_what_its_layers_hold():
    """FLUX.2-dev's: 31 hidden states of 80 MiB, three of them put together, and three of 512 MiB in an MLP."""
    assert activations_gib("flux2-dev", 16) == pytest.approx(34 * 80 / 1024 + 1.5)
    assert activations_gib("flux2-dev", 16) > 4


def test_a_miniature_encodes_16_captions():
    assert captions_at_once(None, "fp32", streamed=False) == 16


# ---- whole jobs that were measured under a cap: rank 16, 8-bit AdamW, 1024 x 1024 pixels, batch 1

HOPPER = Hardware("nvidia", "9.0", 139.0, 1, "580.1", 500.0, 32)
CAPPED = [  # family, cap, measured peak, and what auto chose (docs/performance.md: Under a hard memory cap)
    ("sdxl", 5, 4.99, ("all", "activations")),
    ("sd3", 8, 7.93, ("none", "none")),
    ("flux", 8, 7.26, ("all", "weights")),
    ("flux", 16, 15.93, ("attention", "activations")),
]


@pytest.mark.parametrize(("name", "cap", "measured", "mode"), CAPPED)
def test_a_job_under_a_cap_is_planned_as_it_was_measured(name, cap, measured, mode):
    asked = {
        "BASE_MODEL": name, "DATASET_NAME": "/images", "MEMORY_LIMIT_GIB": str(cap), "PARAMS_NETWORK_DIM": "16",
        "PARAMS_OPTIMIZER_TYPE": "adamw8bit", "PARAMS_RESOLUTION": "1024",
    }  # fmt: skip
    plan = make_plan(read_settings(asked), read_manifest(None, None), HOPPER, now=NOW)
    assert (plan.engine.recompute, plan.engine.offload) == mode
    gib = predict_peak_gib(
        base_models()[name][1].footprint,
        Workload(1024 * 1024, 1, 16, "adamw8bit"),
        precision=plan.engine.precision,
        recompute=plan.engine.recompute,
        kept_blocks=plan.engine.kept_blocks,
        offload=plan.engine.offload,
        transposed=plan.engine.turned_weights,
    )
    assert gib <= measured <= cap  # of the whole job: its samples and its CUDA graph take the rest
