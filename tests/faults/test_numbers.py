"""G1, G2, A4 and clocks: bad numbers, memory that runs out, and a job that always fails at the same place."""

import json

import pytest
import torch
from safetensors.torch import load_file


@pytest.mark.parametrize(
    ("kind", "factor"),
    [
        ("loss", "nan"),
        pytest.param("loss", "inf", marks=pytest.mark.slow),
        pytest.param("grad", "nan", marks=pytest.mark.slow),
        pytest.param("grad", "inf", marks=pytest.mark.slow),
    ],
)
def test_one_bad_step_is_skipped_and_told(run, tiny, kind, factor):
    assert run({"kind": kind, "step": 7, "factor": factor}) == 0, run.said()
    assert run.times_fired() == 1
    row = next(r for r in run.metrics() if r["step"] == 7)
    assert row["skipped"] == 1 and "loss" not in row
    assert [r["step"] for r in run.metrics()] == list(range(1, 25))
    assert "Step 7 is skipped" in run.said() and ".png" in run.said()
    assert run.final != tiny.reference


@pytest.mark.slow
def test_a_loss_spike_is_skipped(run):
    assert run({"kind": "loss", "step": 20, "factor": "100"}) == 0, run.said()
    assert run.times_fired() == 1
    assert "more than 10 times the largest" in run.said() and "diverges" in run.said()


@pytest.mark.slow
def test_without_the_spike_guard_the_same_loss_is_taken(run):
    assert run({"kind": "loss", "step": 20, "factor": "100"}, train={"max_loss_spike": 0.0}) == 0
    assert run.times_fired() == 1 and "is skipped" not in run.said()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ({"kind": "loss", "factor": "nan"}, "overflow in the model's arithmetic"),
        ({"kind": "param", "factor": "3e38"}, "overflow in the model's arithmetic"),  # finite, its products are not
        ({"kind": "grad", "factor": "inf"}, "overflow in the backward pass"),
        ({"kind": "param", "factor": "inf"}, "the adapter's own weights are not finite"),
        ({"kind": "latents"}, "bad data"),
    ],
)
def test_too_many_bad_steps_stop_with_their_cause(run, fault, why):
    """The last state is sound, and the message tells overflow from bad data."""
    assert run({**fault, "step": 8, "times": 1000}, output={"save_every": 7}) == 70, run.said()
    assert run.times_fired()
    assert why in run.said() and "PARAMS_MAX_SKIPPED_STEPS=3 allows" in run.said() and ".png" in run.said()
    assert run.status()["exit_code"] == 70
    tensors = [load_file(run.out / "state" / name / "state.safetensors") for name in run.states()]
    assert tensors and all(bool(torch.isfinite(t).all()) for some in tensors for t in some.values())
    assert all("loss" not in r for r in run.metrics() if r["step"] > 12)


@pytest.mark.slow
def test_weights_that_are_not_finite_are_never_saved(run):
    """The update itself went wrong, just before a save."""
    assert run({"kind": "param", "step": 8, "factor": "inf"}) == 70, run.said()
    assert "not finite" in run.said() and run.states() == ["step-00000004"]
    assert not list(run.out.glob("x-step00000008*"))


@pytest.mark.slow
def test_the_limit_is_counted_over_restarts(run):
    """A state remembers how many steps were skipped before it."""
    assert run({"kind": "loss", "step": 7, "times": 1, "factor": "nan"}) == 0

    record = json.loads((run.out / "state" / "step-00000024" / "state.json").read_text())
    assert '["skipped", 1]' in record["text"]


def test_out_of_memory_once_halves_the_micro_batch(run, tiny):
    """Two pictures at once, then one: the same draws and the same mean, so the weights agree to rounding."""
    assert run({"kind": "oom", "step": 7, "fits": 1, "times": 1000}) == 0, run.said()
    assert run.times_fired() == 1, "after the first time one picture is computed at once"
    assert "out of memory with 2 images at once; from now on 1 at once" in run.said()
    expected = [json.loads(line) for line in (tiny.base / "first" / "metrics.jsonl").read_text().splitlines()]
    for got, undisturbed in zip(run.metrics()[:7], expected[:7], strict=True):
        assert got["loss"] == pytest.approx(undisturbed["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(undisturbed["grad_norm"], rel=1e-4)
    assert [r["step"] for r in run.metrics()] == list(range(1, 25))


@pytest.mark.slow
def test_out_of_memory_without_end_stops_after_bounded_tries(run):
    assert run({"kind": "oom", "step": 7, "times": 1000}) == 75, run.said()
    assert run.times_fired() == 2
    assert "even a single image does not fit" in run.said() and run.states() == ["step-00000004"]


@pytest.mark.slow
def test_another_error_is_not_tried_again(run):
    assert run({"kind": "oom", "step": 7, "times": 1000, "error": "CUDA error: unspecified"}) == 70
    assert run.times_fired() == 1


@pytest.mark.slow
def test_a_crash_loop_ends(run, tiny):
    """A4. Three restarts may fail at the same step; the next says so at once, until something changes."""
    for _ in range(4):
        assert run({"kind": "crash", "step": 7, "times": 1000}) == 70
    assert run.times_fired() == 4
    assert run() == 70 and "failed 4 times without getting past step 6" in run.said()
    assert "a made-up bug" in run.said() and run.times_fired() == 4
    (run.out / "crashes.json").unlink()
    assert run() == 0 and run.final == tiny.reference


@pytest.mark.slow
def test_progress_ends_the_count(run):
    for step in (6, 10, 14, 18, 22):
        assert run({"kind": "crash", "step": step, "times": 1000}) == 70
    assert run() == 0, run.said()


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_nothing(run, tiny):
    assert run({"kind": "clock_backwards"}) == 0 and run.times_fired() == 1
    assert run.final == tiny.reference
