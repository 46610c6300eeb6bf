"""The arithmetic of the memory model for a model of round numbers: every figure here was added up by hand.

The rules are those of the docstrings: bytes of each weight and of each trained number, kilotokens, shares. Whether the
sizes of the published models are right, measured peaks say (test_memory_model.py).
"""

import dataclasses

import pytest

from tests.support.machines import GIB, ROUND
from trainer.spec.family import base_models
from trainer.spec.memory_model import (
    BATCHES,
    DECODE_GIB_PER_MEGAPIXEL,
    ENCODE_GIB_PER_MEGAPIXEL,
    OUTPUT_SHARE,
    TILED_DECODE_GIB,
    VAE_GIB,
    Strategy,
    Workload,
    candidates,
    choose,
    fastest_batch,
    phase_peaks_gib,
    pinned_host_gib,
    predict_peak_gib,
    relative_speed,
    state_bytes,
    trained_gib,
    weights_gib,
)
from trainer.spec.plan import OptimPlan

# 2,048 + 512 tokens for each of two images: 5 kilotokens. A quarter of a GiB of trained numbers: 4 GiB with AdamW.
WORK = Workload(512 * 1024, 2, 16, "adamw")
MODES = [
    ("none", "none"), ("products", "none"), ("attention", "none"), ("attention", "activations"), ("all", "none"),
    ("all", "activations"), ("all", "weights"),
]  # fmt: skip
FITS, FITS_OFFLOADED = 0.93, 0.97  # shares of the device that a peak may fill


def exactly(number):
    return pytest.approx(number, rel=1e-12)


def fp8(recompute, offload="none", kept_blocks=0, *, transposed=False):
    options = {"recompute": recompute, "offload": offload, "kept_blocks": kept_blocks, "transposed": transposed}
    return Strategy("fp8", gib=predict_peak_gib(ROUND, WORK, precision="fp8", **options), **options)


# ---- weights and trained numbers


@pytest.mark.parametrize(
    ("precision", "rank", "options", "gib"),
    [
        ("bf16", 16, {}, 8 * 2 + 2),
        ("fp16", 16, {}, 8 * 2 + 2),
        ("fp32", 16, {}, 8 * 4 + 4),
        ("torchao", 16, {}, 8 * 2 + 2),  # quantised in each step
        ("int8", 16, {}, 8 + 2),
        ("int8-storage", 16, {}, 8 + 2),
        ("fp8-storage", 16, {}, 8 + 2),
        ("nf4", 16, {}, 8 * 0.5625 + 2),  # 4 bits, and 4 bytes for 64 weights
        # Rows of 1,280 with 48 columns are 1,328 long, 1,408 when aligned to 128: 128 more in 0.54 of the sides.
        ("fp8", 16, {}, 8 + 2 + 0.54 * 128 / 64),
        ("fp8", 16, {"transposed": True}, 8 + 6 + 2 + 128 / 64),
        ("fp8", 85, {}, 8 + 2 + 0.54 * 256 / 64),  # 256 columns, which are the widest that fit five times
        ("fp8", 86, {}, 8 + 2),  # 272 columns are too wide for 1,280
        ("fp8", 128, {"transposed": True}, 8 + 6 + 2),
        # The largest region twice: the one that runs and the next.
        ("bf16", 16, {"offload": "weights"}, 2 * 2 + 2),
        ("fp8", 16, {"offload": "weights"}, 2 + 2 + 0.54 * 128 / 64 / 4),
        # And the share of each of the GPUs.
        ("bf16", 16, {"offload": "shards", "shards": 2}, 2 * (2 + 4) + 2),
        ("fp8", 16, {"offload": "shards", "shards": 8}, 2 + 1 + 2 + 0.54 * 128 / 64 * 3 / 8),
        ("fp8", 16, {"offload": "none", "shards": 8}, 8 + 2 + 0.54 * 128 / 64),
        ("fp8", 16, {"offload": "activations"}, 8 + 2 + 0.54 * 128 / 64),
    ],
)
def test_frozen_weights(precision, rank, options, gib):
    assert weights_gib(ROUND, rank, precision, **options) == exactly(gib)


@pytest.mark.parametrize(
    ("optimizer", "args", "bytes_in_memory"),
    [
        ("adamw", {}, 4 + 4 + 8), ("adamw", {"amsgrad": True}, 4 + 4 + 12), ("adamw", {"amsgrad": False}, 4 + 4 + 8),
        ("adamw8bit", {}, 4 + 4 + 2), ("lion", {}, 4 + 4 + 4), ("lion8bit", {}, 4 + 4 + 1),
        ("prodigy", {"d_coef": 2.0}, 4 + 4 + 16), ("adamw-schedulefree", {}, 4 + 4 + 8),
        ("prodigy-schedulefree", {}, 4 + 4 + 4 + 2 * 2 / 11 + 4 / 16),
        ("prodigy-schedulefree", {"factored": False}, 4 + 4 + 4 + 2 * 2 / 11 + 4),
        ("prodigy-schedulefree", {"use_focus": True}, 4 + 4 + 4 + 2 * 2 / 11 + 4),
        ("adafactor", {}, 4 + 4 + 4 / 16), ("adafactor", {"beta1": None}, 4 + 4 + 4 / 16),
        ("adafactor", {"beta1": 0.0}, 4 + 4 + 4 + 4 / 16),
    ],
)  # fmt: skip
@pytest.mark.parametrize("decay", [0.0, 0.99])
def test_trained_numbers_and_the_states_of_them(optimizer, args, bytes_in_memory, decay, job_plan):
    """A number, its gradient, the optimiser's state and 4 bytes of an average; a state on disk has no gradient.

    What each optimiser really keeps: tests/trainer/training/test_optimizers.py.
    """
    plan = job_plan("flux")
    plan = dataclasses.replace(
        plan,
        lora=dataclasses.replace(plan.lora, rank=16),
        optim=OptimPlan(name=optimizer, args=args),
        train=dataclasses.replace(plan.train, ema_decay=decay),
    )
    workload = Workload(512 * 1024, 2, 16, optimizer, args, ema=decay > 0)
    expected = bytes_in_memory + (4 if decay else 0)
    assert trained_gib(ROUND, workload) == exactly(expected / 4)
    assert state_bytes(ROUND, plan) == exactly((expected / 4 - 1) * GIB)


# The layers with adapters of the published models, as (inputs, outputs) in widths: q, k and v in one and apart.
JOINED, APART, MLP, SINGLE = [(1, 3), (1, 1)], [(1, 1)] * 4, [(1, 4), (4, 1)], [(1, 3), (1, 4), (5, 1)]
SIDES = {"flux": (3072, 19 * 2 * (JOINED + MLP) + 38 * SINGLE), "sd3": (1536, 24 * 2 * (APART + MLP))}


@pytest.mark.parametrize("base", SIDES)
def test_numbers_for_each_rank_and_the_share_of_outputs_are_those_of_the_layers(base):
    width, sides = SIDES[base]
    inputs, outputs = (sum(column) for column in zip(*sides, strict=True))
    if base == "sd3":  # the text ends in the last block: no output, no MLP
        inputs, outputs = inputs - 6, outputs - 6
    footprint = base_models()[base][1].footprint
    assert footprint.adapter_weights_per_rank == pytest.approx((inputs + outputs) * width, rel=0.005)
    assert pytest.approx(outputs / (inputs + outputs), rel=0.1) == OUTPUT_SHARE


# ---- peaks


@pytest.mark.parametrize(
    ("precision", "recompute", "options", "gib"),
    [
        # frozen + trained + kilotokens x (working + saved)
        ("fp8", "none", {}, 11.08 + 4 + 5 * (0.125 + 4)),
        ("fp8", "none", {"transposed": True}, 18 + 4 + 5 * (0.125 + 4)),
        ("fp8", "products", {}, 11.08 + 4 + 5 * (0.125 + 2)),
        ("bf16", "none", {}, 18 + 4 + 5 * (0.125 + 4 * 1.5)),  # without our fused blocks
        ("bf16", "all", {}, 18 + 4 + 5 * (0.125 + 0.5)),
        ("int8", "none", {}, 10 + 4 + 5 * (0.125 + 4 * 1.5)),
        ("nf4", "products", {}, 6.5 + 4 + 5 * (0.125 + 2)),
        ("fp32", "all", {}, 36 + 4 + 10 * (0.125 + 0.5)),  # activations twice as wide
        # Blocks that are exempt keep everything: 4 of 10, 5 of 10.
        ("fp8", "products", {"kept_blocks": 4}, 11.08 + 4 + 5 * (0.125 + 0.6 * 2 + 0.4 * 4)),
        ("bf16", "attention", {"kept_blocks": 5}, 18 + 4 + 5 * (0.125 + 0.5 * 1 + 0.5 * 6)),
        # A sixteenth of what is offloaded is on its way in each direction.
        ("fp8", "attention", {"offload": "activations"}, 11.08 + 4 + 5 * (0.125 + 0.25 + 1 / 8)),
        ("bf16", "none", {"offload": "activations"}, 18 + 4 + 5 * (0.125 + 0.25 + 6 / 8)),
        ("fp8", "all", {"offload": "weights"}, 4.27 + 1 + 4 + 5 * (0.125 + 0.25 + 0.5 / 8)),
    ],
)
def test_the_peak_of_a_step(precision, recompute, options, gib):
    assert predict_peak_gib(ROUND, WORK, precision=precision, recompute=recompute, **options) == exactly(gib)


@pytest.mark.parametrize(
    ("recompute", "options", "gib"),
    [
        ("none", {}, 4 + 6.81 + 5 * (0.125 + 4)),
        ("products", {"kept_blocks": 4}, 4 + 6.81 + 5 * (0.125 + 0.6 * 2 + 0.4 * 4)),
        ("all", {}, 4 + 6.81 + 5 * (0.125 + 0.5)),
    ],
)
def test_the_peak_of_a_step_with_weights_sharded_over_four_gpus(recompute, options, gib):
    """A quarter of 8 GiB, two regions of 1, the other weights and half of the columns; what a step takes besides."""
    four = dataclasses.replace(WORK, shards=4)
    found = predict_peak_gib(ROUND, four, precision="fp8", recompute=recompute, offload="shards", **options)
    assert found == exactly(gib + 1 - 6.81 + 2 + 2 + 2 + 0.54 * 128 / 64 / 2)


@pytest.mark.parametrize(
    ("precision", "mode", "gib"),
    [
        ("fp8", ("products", "none"), 0),
        ("fp8", ("attention", "activations"), 5 * 1),
        ("fp32", ("all", "activations"), 5 * 0.5 * 2),
        ("fp8", ("none", "shards"), 0),
        ("fp8", ("all", "weights"), 5 * 0.5 + 11.08),
        ("bf16", ("all", "weights"), 5 * 0.5 + 18),
    ],
)
def test_what_waits_in_the_hosts_memory(precision, mode, gib):
    recompute, offload = mode
    assert pinned_host_gib(ROUND, WORK, Strategy(precision, recompute, 0, offload, 1.0)) == exactly(gib)


def test_the_peaks_of_the_other_phases():
    def peaks(strategy, drawn=2**20, encoded=2**20, *, streamed=False, tiled=False):
        found = phase_peaks_gib(
            ROUND, WORK, strategy, streamed=streamed, tiled=tiled, drawn_pixels=drawn, encoded_pixels=encoded
        )
        assert found.pop("training") == strategy.gib
        return found

    plain = fp8("none")
    # Encoders in 16 bits, with half a GiB; two images of 2^20 pixels at once; weights, adapters, the VAE, decoding.
    texts, latents, samples = 6 + 0.5, 0.31 + 2.6 * 2, 11.08 + 4 + 0.31 + 3.2
    assert peaks(plain) == exactly({"texts": texts, "latents": latents, "samples": samples})
    lean = {"texts": 6 / 12 + 0.5, "latents": latents, "samples": samples}
    assert peaks(plain, streamed=True) == exactly(lean)
    assert peaks(plain, tiled=True) == exactly({"texts": texts, "latents": 0.31 + 2.6, "samples": 15.39 + 1})
    # 2,000,000 pixels are encoded at once: eight of 2^18; one of 2^22.
    assert peaks(plain, encoded=2**18)["latents"] == exactly(0.31 + 2.6 * 8 / 4)
    assert peaks(plain, encoded=2**22)["latents"] == exactly(0.31 + 2.6 * 4)
    assert peaks(plain, drawn=2**21)["samples"] == exactly(15.39 + 6.4)
    assert peaks(Strategy("fp32", "all", 0, "none", 1.0))["texts"] == exactly(12 + 0.5)
    assert peaks(fp8("all", "weights"))["samples"] == exactly(4.27 + 4 + 0.31 + 3.2)
    assert peaks(fp8("none", transposed=True))["samples"] == exactly(18 + 4 + 0.31 + 3.2)


def test_the_vae_takes_a_few_of_its_widest_layers():
    """In fp32, GiB: 83.8 million weights; the encoder is 128 channels wide at full size, the decoder 256."""
    assert pytest.approx(83.8e6 * 4 / GIB, rel=0.01) == VAE_GIB
    encoder, decoder = 128 * 4 / 1024, 256 * 4 / 1024
    assert 4 * encoder <= ENCODE_GIB_PER_MEGAPIXEL <= 6 * encoder
    assert 3 * decoder <= DECODE_GIB_PER_MEGAPIXEL <= 4 * decoder
    tile = 512 * 512 / 2**20
    assert 3 * tile * decoder <= TILED_DECODE_GIB <= 6 * tile * decoder


# ---- the choice


def test_strategies_to_try_are_in_the_order_of_preference():
    """Each precision with its weights on the device, then streaming in the last; the same for 4 bits."""
    found = candidates(ROUND, WORK, ["nf4", "bf16", "fp8"])
    expected = [(precision, *mode) for precision in ("bf16", "fp8") for mode in MODES[:-1]]
    expected += [("fp8", *MODES[-1]), *(("nf4", *mode) for mode in MODES)]
    assert [(s.precision, s.recompute, s.offload) for s in found] == expected
    for s in found:
        gib = predict_peak_gib(ROUND, WORK, precision=s.precision, recompute=s.recompute, offload=s.offload)
        assert (s.gib, s.kept_blocks, s.transposed) == (gib, 0, False)


def test_several_gpus_may_share_the_weights_before_they_are_streamed_from_the_host():
    four = dataclasses.replace(WORK, shards=4)
    sharded = [(policy, "shards") for policy in ("none", "products", "attention", "all")]
    found = [(s.precision, *s.mode) for s in candidates(ROUND, four, ["bf16", "fp8"])]
    expected = [(precision, *mode) for precision in ("bf16", "fp8") for mode in MODES[:-1]]
    assert found == [*expected, *(("fp8", *mode) for mode in sharded), ("fp8", *MODES[-1])]

    def taken(have):
        strategies = candidates(ROUND, four, ["fp8"])
        return choose(ROUND, four, strategies, have_gib=have, host_gib=1000.0)

    assert taken(fp8("all", "activations").gib / FITS_OFFLOADED * 1.001).mode == ("all", "activations")
    assert taken(fp8("all", "activations").gib / FITS_OFFLOADED * 0.999).mode == ("all", "shards")
    # Spare memory exempts blocks from recompute.
    products = predict_peak_gib(ROUND, four, precision="fp8", recompute="products", offload="shards")
    kept = choose(ROUND, four, [Strategy("fp8", "products", 0, "shards", products)], have_gib=27.0, host_gib=0.0)
    expected_gib = predict_peak_gib(
        ROUND, four, precision="fp8", recompute="products", offload="shards", kept_blocks=kept.kept_blocks
    )
    assert 0 < kept.kept_blocks < 10 and kept.gib == expected_gib <= 27.0 * FITS
    peaks = phase_peaks_gib(ROUND, four, kept, streamed=False, tiled=False, drawn_pixels=2**20, encoded_pixels=2**20)
    assert peaks["samples"] == exactly(2 + 2 + 2 + 0.54 * 128 / 64 / 2 + 4 + 0.31 + 3.2)


def test_words_for_a_strategy():
    assert str(fp8("none")) == "fp8, everything kept: 35.7 GiB"
    assert str(fp8("none", transposed=True)) == "fp8, everything kept, transposed weight copies: 42.6 GiB"
    kept = "fp8, all but products recomputed, except in 4 blocks: 29.7 GiB"
    assert str(fp8("products", kept_blocks=4)) == kept


def chosen(have, *strategies, host=1000.0, **options):
    """What is chosen of these, or of all in FP8."""
    return choose(ROUND, WORK, strategies or candidates(ROUND, WORK, ["fp8"]), have_gib=have, host_gib=host, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("factor", "fits"), [(1.001, True), (0.999, False)])
def test_the_first_that_fits_is_taken(mode, factor, fits):
    """Peaks of 35.7, 25.7, 20.7, 17.6, 18.2, 17.3 and 11.5 GiB, in this order."""
    least = fp8(*mode).gib / (FITS_OFFLOADED if mode[1] == "activations" else FITS)
    found = chosen(least * factor)
    if mode[1] == "weights":  # the least of all is taken even where it does not fit
        assert found.mode == mode
    elif mode == ("all", "none"):  # takes more than the mode before it
        assert found.mode == MODES[3]
    else:
        assert (found.mode == mode) == fits and MODES.index(found.mode) >= MODES.index(mode)


def test_where_nothing_fits_the_least_peak_is_taken():
    assert chosen(5.0) == fp8("all", "weights")
    assert chosen(5.0, fp8("all"), fp8("products"), fp8("attention")) == fp8("all")


def test_what_fills_the_usable_share_to_the_last_byte_fits():
    full, less = Strategy("bf16", "none", 0, "none", 10 * FITS), Strategy("bf16", "none", 0, "none", 1.0)
    assert chosen(10, full, less) == full
    copies = fp8("none", transposed=True)
    assert copies.gib / FITS * FITS == copies.gib and chosen(copies.gib / FITS, fp8("none")) == copies


def test_streamed_weights_leave_as_much_free_as_weights_on_the_device():
    """11.46 of 12 GiB would fit as offloaded activations do."""
    found = choose(ROUND, WORK, candidates(ROUND, WORK, ["fp8", "nf4"]), have_gib=12.0, host_gib=1000.0)
    assert (found.precision, found.mode) == ("nf4", ("all", "weights"))


def test_what_the_host_cannot_hold_is_not_taken():
    assert chosen(18.3, host=5.0).mode == ("attention", "activations")  # which takes exactly 5
    assert chosen(18.3, host=4.99).mode == ("all", "activations")
    assert chosen(18.3, fp8("attention", "activations"), host=1.0).mode == ("attention", "activations")  # nothing else


@pytest.mark.parametrize(
    ("recompute", "spare", "captured", "kept"),
    [
        # Each block that keeps everything takes a GiB more with products, 1.5 with attention.
        ("products", 3.5, False, 3),
        ("products", 3.5, True, 1),  # a graph takes 2 GiB
        ("products", 1.5, True, 0),
        ("products", 0.1, True, 0),
        ("attention", 3.5, False, 2),
        ("attention", 100.0, False, 10),
        ("all", 3.5, False, 0),
    ],
)
def test_spare_memory_exempts_blocks(recompute, spare, captured, kept):
    before = fp8(recompute)
    options = {"captured": True} if captured else {}
    found = chosen((before.gib + spare) / FITS, before, **options)
    assert found == fp8(recompute, kept_blocks=kept)


def test_spare_memory_takes_transposed_copies_in_fp8_where_everything_is_kept():
    copies = fp8("none", transposed=True)
    assert chosen(copies.gib / FITS * 1.001) == copies
    assert chosen(copies.gib / FITS * 0.999) == fp8("none")
    for precision in ("bf16", "int8", "fp8-storage"):
        plain = Strategy(precision, "none", 0, "none", 50.0)
        assert chosen(1000.0, plain) == plain


@pytest.mark.parametrize("mode", [("attention", "activations"), ("all", "activations"), ("all", "weights")])
def test_spare_memory_changes_nothing_where_something_is_offloaded(mode):
    assert chosen(1000.0, fp8(*mode)) == fp8(*mode)


# ---- the batch


@pytest.mark.parametrize(
    ("strategy", "speed"),
    [
        # images / (a step's fixed cost of one kilotoken + kilotokens x cost x slow-down)
        (fp8("none"), 2 / (1 + 5)),
        (fp8("all"), 2 / (1 + 5 * 1.28)),
        (fp8("attention", kept_blocks=5), 2 / (1 + 5 * (0.5 * 1.2 + 0.5))),
        (fp8("products", kept_blocks=2), 2 / (1 + 5 * (0.8 * 1.01 + 0.2))),
        (fp8("attention", "activations"), 2 / (1 + 5 * 1.2 * 1.02)),
        (fp8("all", "weights"), 2 / (1 + 5 * 1.28 * 1.4)),
    ],
)
def test_images_for_each_unit_of_time(strategy, speed):
    assert relative_speed(ROUND, WORK, strategy) == exactly(speed)


def test_a_larger_batch_is_worth_it_from_two_per_cent_on():
    """With 2.5 kilotokens for each image, a batch of n has n / (1 + 2.5 n) images for each unit of time."""
    tried = [(Workload(512 * 1024, batch, 16, "adamw"), fp8("none")) for batch in BATCHES]
    speeds = {1: 0.2857, 2: 0.3333, 3: 0.3529, 4: 0.3636, 6: 0.375, 8: 0.3810, 12: 0.3871, 16: 0.3902}
    for work, strategy in tried[: len(speeds)]:
        assert relative_speed(ROUND, work, strategy) == pytest.approx(speeds[work.batch], abs=1e-4)
    batches = [fastest_batch(ROUND, tried[: n + 1])[0].batch for n in range(len(speeds))]
    assert batches == [1, 2, 3, 4, 6, 6, 12, 12]
    assert fastest_batch(ROUND, tried[:7])[1] is tried[6][1]
