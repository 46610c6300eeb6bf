"""A job of two processes, which is what a job on two GPUs is: here both are on the CPU, with `-m gpu` on two GPUs."""

import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.faults.moments import descendants

LONG = {"PARAMS_MAX_STEPS": "3000", "PARAMS_SAVE_EVERY_N_STEPS": "10"}
# As a cluster says it: none of our business.
CLUSTER = {"WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1", "MASTER_ADDR": "10.65.0.2", "MASTER_PORT": "29400"}


@pytest.fixture(params=["cpu", pytest.param("auto", marks=pytest.mark.gpu)])
def two(request, job):
    exact = {"PARAMS_PRECISION": "fp32", "PARAMS_COMPILE": "false", "PARAMS_ATTENTION": "_native_math"}
    if request.param == "auto" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    job.environment |= {"NUM_GPUS": "2", "BACKEND": request.param, "PARAMS_OPTIMIZER_TYPE": "adamw", **CLUSTER, **exact}
    job.environment |= {"PARAMS_LEARNING_RATE": "1e-3", "PARAMS_BATCH_SIZE": "2"}
    return job


def sha(job):
    return hashlib.sha256((job.out / "x.safetensors").read_bytes()).hexdigest()


def members(process):
    """The trainers that `process` has started, by their rank. Children of theirs, which have it too, come later."""
    found = {}
    for child in descendants(process.pid):
        try:
            environ = Path(f"/proc/{child}/environ").read_text()
        except OSError:  # it has ended
            continue
        pairs = [pair.split("=", 1) for pair in environ.split("\0") if "=" in pair]
        if "KILN_RANK" in dict(pairs):
            rank = int(dict(pairs)["KILN_RANK"])
            found[rank] = min(int(child), found.get(rank, int(child)))
    return found


def numbers(job):
    return {row["step"]: (row["loss"], row["grad_norm"], row["lr"]) for row in job.metrics() if "loss" in row}


def with_prompts(job, steps):
    """Samples of three prompts of three shapes, and of these with the base model at the end."""
    prompts = job.folder / "prompts.txt"
    shapes = ("--w 64 --h 64", "--w 96 --h 64 --d 7", "--w 64 --h 96 --d 8")
    prompts.write_text("\n".join(f"a red spot {shape} --s {steps}" for shape in shapes))
    job.environment |= {"SAMPLE_PROMPTS": str(prompts), "SAMPLE_STRENGTHS": "0", "PARAMS_SAMPLE_EVERY_N_STEPS": "4"}


def samples(job):
    return {path.name: path.read_bytes() for path in (job.out / "sample").glob("step-*.png")}


def test_two_processes_encode_what_one_does(two):
    """Each its share of images and captions, to the same bytes."""
    files = []
    for number in ("2", "1"):
        cache = two.folder / f"cache-{number}"
        output = two.folder / f"output-{number}"
        paths = {"CACHE_PATH": str(cache), "OUTPUT_PATH": str(output), "PARAMS_MAX_STEPS": "1"}
        code, printed = two.run(NUM_GPUS=number, PARAMS_CAPTION_DROPOUT_RATE="0.5", **paths)
        assert code == 0, printed
        encoded = [*cache.glob("latents/*/*"), *cache.glob("text/*/*")]
        files.append({path.relative_to(cache): path.read_bytes() for path in encoded})
    assert files[0] == files[1] and len(files[0]) > 6
    assert "Encoded 3 of 6 latents" in (two.folder / "output-2" / "run.log").read_text()


def test_two_processes_draw_the_images_that_one_draws(two):
    """Each its share, at the same strengths; those that are there already are not drawn again."""
    with_prompts(two, steps=2)
    code, printed = two.run(PARAMS_MAX_STEPS="4")
    # The first says what it has drawn, and all are there.
    assert code == 0 and "Drew 2 of 3 samples of step 0" in printed and "Drew 3 of 6 samples of step 4" in printed
    together = samples(two)
    names = [f"step-{step:08d}-{number:02d}" for step in (0, 4) for number in range(3)]
    assert sorted(together) == sorted([f"{n}.png" for n in names] + [f"{n}-at-0.png" for n in names[3:]])
    for name in (*names[:3], *names[3:5]):
        (two.out / "sample" / f"{name}.png").unlink()
    # It begins with the weights of step 4, of which all samples but one are missing.
    one = {"NUM_GPUS": "1", "PARAMS_GRADIENT_ACCUMULATION": "2"}
    code, printed = two.run(PARAMS_MAX_STEPS="6", **one)
    assert code == 0 and "Resumed at step 4 of 6" in printed and "Drew 2 samples of step 4" in printed, printed
    alone = samples(two)
    two.environment["OUTPUT_PATH"] = str(two.folder / "one")
    code, printed = two.run(PARAMS_MAX_STEPS="1", **one)
    assert code == 0, printed
    alone = samples(two) | alone
    assert {name: alone[name] for name in together} == together


@pytest.mark.slow
def test_a_stop_while_samples_are_drawn_ends_the_round_of_all(two):
    """Nothing is lost, and the images that were drawn by then stay."""
    with_prompts(two, steps=200)
    two.environment["PARAMS_MAX_STEPS"] = "8"
    process = two.start()
    while not any("-00000004-" in name for name in samples(two)):
        assert process.poll() is None, process.printed()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in printed, printed
    before = samples(two)
    assert (two.out / "state" / "step-00000005").is_dir()
    code, printed = two.run()
    assert code == 0 and "Resumed at step 5 of 8" in printed, printed
    assert before.items() <= samples(two).items() and len(samples(two)) > len(before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_goes_or_stands_still_while_it_draws_ends_the_job(two, number):
    with_prompts(two, steps=50)
    two.environment |= {"PARAMS_MAX_STEPS": "8", "PARAMS_SAVE_EVERY_N_STEPS": "2", "PARAMS_STEP_TIMEOUT": "4"}
    process = two.start()
    two.wait_for_step(process, 4)
    time.sleep(0.3)  # they draw for longer
    os.kill(members(process)[1], number)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 75 and "Traceback" not in printed, printed
    assert max(numbers(two)) == 4 and not (two.out / "x.safetensors").exists()
    expected = "Process 1 of 2 was killed (SIGKILL)" if number == signal.SIGKILL else "hangs"
    assert expected in two.status()["message"]
    before = samples(two)
    code, printed = two.run()
    assert code == 0 and "Resumed at step 4 of 8" in printed, printed
    assert before.items() <= samples(two).items() and len(samples(two)) == 12


def test_a_killed_worker_ends_the_job_and_sigterm_saves_it_and_the_steps_between_are_the_same(two):
    """The worker's own end is told, without a hang; 143 with the state of the step for SIGTERM."""
    process = two.start(**LONG)
    two.wait_for_step(process, 13)
    while not list((two.out / "state").glob("step-*")):  # written beside training
        assert process.poll() is None
        time.sleep(0.01)
    who = members(process)
    assert sorted(who) == [0, 1]
    while max(numbers(two)) % 10 != 5:  # some steps after a save
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(who[1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert two.status()["phase"] == "failed" and two.status()["exit_code"] == 75
    assert two.status()["message"].startswith("Process 1 of 2 was killed (SIGKILL)") and "Traceback" not in printed
    assert not any(Path(f"/proc/{number}").exists() for number in who.values())
    assert "an epoch has 2 steps" in printed
    before = numbers(two)
    saved = max(int(path.name[-8:]) for path in (two.out / "state").glob("step-*"))

    process = two.start(**LONG)
    two.wait_for_step(process, max(before) + 1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and f"Resumed at step {saved} of" in printed, printed
    assert "Traceback" not in printed and "has failed" not in printed and two.status()["phase"] == "stopped"
    after = numbers(two)
    assert (two.out / "state" / f"step-{max(after):08d}").is_dir()
    assert max(before) >= saved + 2 and {step: after[step] for step in before} == before


@pytest.mark.slow
def test_a_job_that_was_killed_and_stopped_ends_with_the_same_bytes(two):
    code, printed = two.run()
    assert code == 0 and printed.count("Done: ") == 1, printed
    undisturbed, rows = sha(two), numbers(two)
    assert sorted(rows) == list(range(1, 13))
    two.environment["OUTPUT_PATH"] = str(two.folder / "again")
    for step, number, expected in ((5, signal.SIGKILL, 75), (7, signal.SIGTERM, 143)):
        process = two.start()
        two.wait_for_step(process, step)
        os.kill(members(process)[1] if number == signal.SIGKILL else process.pid, number)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == expected, printed
    code, printed = two.run()
    assert code == 0 and sha(two) == undisturbed and numbers(two) == rows, printed


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_accumulation_in_a_whole_job(two):
    """With what the first does alone (samples, validation), an average of the weights, and trained text encoders."""
    prompts = two.folder / "prompts.txt"
    prompts.write_text("a red spot --w 64 --h 64 --s 2 --d 7\n")
    sizes = {"resolution": 128, "enable_bucket": True, "validation_split": 0.2, "batch_size": 2}
    two.environment |= {
        "SAMPLE_PROMPTS": str(prompts),
        "PARAMS_SAMPLE_EVERY_N_STEPS": "5",
        "PARAMS_VALIDATE_EVERY_N_STEPS": "3",
        "PARAMS_EMA_DECAY": "0.9",
        "PARAMS_SAVE_PRECISION": "fp32",
        "PARAMS_OPTIMIZER_ARGS": "eps=1e-4",  # else a gradient of zero but for rounding makes as large a step as any
        "PARAMS_TEXT_ENCODER_LR": "1e-4",
        "DATASET_CONFIG": json.dumps({"datasets": [{**sizes, "subsets": [{}]}]}),
    }
    code, printed = two.run()
    assert code == 0, printed
    together, rows = load_file(two.out / "x.safetensors"), two.metrics()
    assert len(list((two.out / "sample").glob("step-*.png"))) == 4
    one = {"NUM_GPUS": "1", "PARAMS_GRADIENT_ACCUMULATION": "2", "OUTPUT_PATH": str(two.folder / "one")}
    code, printed = two.run(**one)
    assert code == 0, printed
    two.environment |= one
    alone = load_file(two.out / "x.safetensors")
    assert together.keys() == alone.keys()
    far = [(together[k] - alone[k]).abs().max().item() for k in alone]
    assert max(far) < (1e-6 if two.environment["BACKEND"] == "cpu" else 1e-5), sorted(far)[-5:]
    assert [r["validation_loss"] for r in rows if "validation_loss" in r] == pytest.approx(
        [r["validation_loss"] for r in two.metrics() if "validation_loss" in r], rel=1e-5
    )
    assert [r["loss"] for r in rows if "loss" in r] == pytest.approx(
        [r["loss"] for r in two.metrics() if "loss" in r], rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stands_still_ends_the_job(two, rank):
    process = two.start(PARAMS_STEP_TIMEOUT="4", PARAMS_MAX_STEPS="3000")
    two.wait_for_step(process, 13)  # pictures of all sizes have been seen, and their steps recorded
    os.kill(members(process)[rank], signal.SIGSTOP)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert "The trainer hangs" in printed if rank == 0 else "the job hangs" in two.status()["message"]
    # Where the other one stood: CPUs wait in `mean`, GPUs in `heard`, and both at a save.
    other = printed[printed.index(f"Process {1 - rank}:") :] if rank == 0 else printed
    assert any(f"in {place}" in other for place in ("mean", "heard", "_largest")), printed[-6000:]


@pytest.mark.slow
def test_the_first_process_may_be_killed_too(two):
    process = two.start(PARAMS_MAX_STEPS="3000")
    two.wait_for_step(process, 3)
    who = members(process)
    os.kill(who[0], signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75, printed
    assert not any(Path(f"/proc/{number}").exists() for number in who.values())


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_as_many_batches_a_step_or_is_a_new_run(two):
    code, printed = two.run(PARAMS_MAX_STEPS="4")
    assert code == 0, printed
    first = sha(two)
    code, printed = two.run(NUM_GPUS="1", PARAMS_MAX_STEPS="4")
    assert code == 0 and "New run x-2, beside x, because these differ: NUM_GPUS: 2 → 1." in printed, printed
    assert sha(two) == first and (two.out / "x-2.safetensors").is_file()
    code, printed = two.run(NUM_GPUS="1", PARAMS_GRADIENT_ACCUMULATION="2", PARAMS_MAX_STEPS="6")
    assert code == 0 and "Resumed at step 4 of 6" in printed, printed
    assert "was made with NUM_GPUS 2, and this is 1: the result will not be bit-identical" in printed


def sharded_gib(printed):
    """What the first process keeps of the frozen weights, and all of these; [] where it keeps all."""
    found = re.findall(r"sharded over 2 processes: ([0-9.e-]+) of ([0-9.e-]+) GiB are here", printed)
    return [(float(here), float(everything)) for here, everything in found]


def test_sharded_weights_give_the_same_bytes_and_a_run_goes_on_with_and_without_them(two):
    """Steps (the last of an epoch has images for one process alone), validation and samples; then on one GPU."""
    with_prompts(two, steps=2)
    sizes = {"resolution": 128, "enable_bucket": True, "validation_split": 0.2, "batch_size": 2}
    two.environment |= {
        "PARAMS_VALIDATE_EVERY_N_STEPS": "3",
        "DATASET_CONFIG": json.dumps({"datasets": [{**sizes, "subsets": [{}]}]}),
    }
    ended = []
    for offload in ("none", "shards"):
        two.environment |= {"PARAMS_OFFLOAD": offload, "OUTPUT_PATH": str(two.folder / offload)}
        code, printed = two.run(PARAMS_MAX_STEPS="5")
        assert code == 0, printed
        held = sharded_gib((two.out / "run.log").read_text())
        assert len(held) == (offload == "shards")
        assert all(0 < here <= 0.51 * everything for here, everything in held), held
        losses = [row["validation_loss"] for row in two.metrics() if "validation_loss" in row]
        assert len(losses) == 2
        ended.append((sha(two), numbers(two), losses, samples(two)))
    assert ended[0] == ended[1] and len(ended[0][3]) == 12
    one = {"NUM_GPUS": "1", "PARAMS_GRADIENT_ACCUMULATION": "2", "PARAMS_OFFLOAD": "none"}
    code, printed = two.run(**one, PARAMS_MAX_STEPS="6")
    assert code == 0 and "Resumed at step 5 of 6" in printed and not sharded_gib(printed), printed
    code, printed = two.run(PARAMS_MAX_STEPS="7")
    assert code == 0 and "Resumed at step 6 of 7" in printed and sharded_gib(printed), printed


def test_a_process_that_keeps_sharded_weights_is_killed_and_the_job_ends_with_the_same_bytes(two):
    two.environment |= {"PARAMS_OFFLOAD": "shards", "PARAMS_SAVE_EVERY_N_STEPS": "2"}
    code, printed = two.run()
    assert code == 0, printed
    undisturbed, rows = sha(two), numbers(two)
    two.environment["OUTPUT_PATH"] = str(two.folder / "again")
    process = two.start()
    two.wait_for_step(process, 5)
    os.kill(members(process)[1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in printed, printed
    assert two.status()["message"].startswith("Process 1 of 2 was killed (SIGKILL)")
    code, printed = two.run()
    assert code == 0 and "Resumed at step" in printed and sha(two) == undisturbed and numbers(two) == rows, printed


def test_sharded_weights_need_several_gpus(two):
    two.environment["PARAMS_OFFLOAD"] = "shards"
    code, printed = two.run(NUM_GPUS="1")
    assert code == 78 and "PARAMS_OFFLOAD=shards spreads the weights over the GPUs of a job" in printed, printed
