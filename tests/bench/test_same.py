"""The recorder behind `make same`: what it ignores, what it reports, and how it calls it."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from bench.same import command, compare, report
from bench.same.bad_input import BAD_INPUT
from bench.same.data import write_data
from bench.same.jobs import CHECK, REFUSED, TRAIN, Job, all_jobs
from bench.same.normalise import NUMBER, normal_line, normal_lines, numbers, with_places, words
from bench.same.outputs import (
    flat,
    read_events,
    read_folder,
    read_help,
    read_metrics,
    read_plan,
    read_safetensors,
    read_state,
)
from bench.same.record import BUG, Place, environment, figures, is_sentence, problems

PLACES = {"/home/me/.same/tree": "<tree>", "/home/me/.same/run": "<run>", "/home/me/.same/run/a": "<job>"}


# ---- what may differ from run to run


@pytest.mark.parametrize(
    ("line", "normal"),
    [
        ("18:59:51 INFO Phase: encoding.", "INFO Phase: encoding."),
        ("2026-11-29 18:59:51,968 INFO Phase: encoding.", "INFO Phase: encoding."),
        ("Encoded 14 of 14 captions in 2.7 s.", "Encoded 14 of 14 captions in <time>."),
        ("stood still for 7 ms; written in 0.20 s", "stood still for <time>; written in <time>"),
        ("about 1 MiB needed, 77.8 GiB free.", "about 1 MiB needed, <room> free."),
        ("1 MiB are needed, and 20.5 GiB are free.", "1 MiB are needed, and <room> are free."),
        ("the lock of pid 4711", "the lock of pid <pid>"),
        ("at localhost:29401", "at localhost:<port>"),
        ('  File "<tree>/trainer/loop.py", line 12, in train', '  File "<source>"'),
        ("<tree>/trainer/loop.py:40: UserWarning: x", "<source>: UserWarning: x"),
    ],
)  # fmt: skip
def test_times_sizes_and_numbers_of_the_system_are_left_out(line, normal):
    assert normal_line(line, timed=True) == normal


@pytest.mark.parametrize(
    "line",
    [
        "INFO Dataset 0: bucket 96×160, 1 examples.",
        "INFO PARAMS_OFFLOAD: none (41.9 GiB of 48 GiB are predicted for a step)",
        "INFO x.safetensors: read back, its output differs from the trained model's by 0.0e+00.",
        "INFO Validation loss at step 3: 0.4711",
    ],
)
def test_numbers_that_are_results_stay(line):
    assert normal_line(line, timed=True) == line


def test_seconds_stay_where_none_are_measured():
    assert "300 s" in normal_line("20 times the usual step, at least 300 s", timed=False)


def test_progress_lines_count_once_because_a_slow_machine_prints_more():
    first = "10:00:00 step 1/6  epoch 1  loss 0.3  1.3 images/s  0:00:01 left"
    last = "10:00:07 step 6/6  epoch 1  loss 0.2  1.2 images/s  0:00:00 left"
    slow, fast = f"{first}\n{last}", last
    assert normal_lines(slow, {}, timed=True) == normal_lines(fast, {}, timed=True)
    assert "epoch <number>  loss <number>" in normal_lines(fast, {}, timed=True)[0]


def test_lines_by_chance_and_empty_lines_are_left_out():
    text = "a\n\n12:00:00 WARNING Training waited 0.3 s for the save before: the volume is slow.\n"
    text += "Failed to load x.so\nb\nLoading weights: 100%|##########| 36/36 [00:00<00:00, 3083.35it/s]"
    assert normal_lines(text, {}, timed=True) == ["a", "b"]


def test_the_innermost_folder_gives_the_label():
    assert with_places("/home/me/.same/run/a/out, /home/me/.same/run/b", PLACES) == "<job>/out, <run>/b"


def test_numbers_are_compared_without_separators_of_thousands():
    assert numbers("1,024 px at 2.5e-4") == numbers("1024 px at 2.5e-4") == ["1024", "2.5e-4"]
    assert words("12 found") == words("11 found") and NUMBER.fullmatch("0.0e+00")


# ---- what is kept of files


def test_a_plan_is_compared_without_reasons_and_places(tmp_path):
    plan = {"lora": {"rank": 4}, "model": {"path": "/home/me/.same/tree/x"}, "reasons": ["A: 1 (B)"], "prompts": []}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    fields, reasons = read_plan(tmp_path / "plan.json", PLACES)
    assert fields == {"lora.rank": 4, "model.path": "<tree>/x", "prompts": []} and reasons == ["A: 1 (B)"]


def test_nested_values_get_paths_as_names():
    assert flat({"a": [{"b": 1}, 2], "c": {}}) == {"a[0].b": 1, "a[1]": 2, "c": {}}


def test_losses_are_compared_and_times_are_not():
    lines = '{"step": 1, "loss": 0.25, "time": 1.0}\n{"step": 1, "validation_loss": 0.5, "time": 2.0}\n'
    assert read_metrics(lines) == {"step 1, loss": 0.25, "step 1, validation_loss": 0.5}


def write_lora(path: Path, metadata: dict[str, str], names: list[str], content: bytes = b"\0" * 8) -> None:
    entries = {n: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate(names)}
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content * len(names))


def lora(tmp_path: Path, metadata: dict[str, str], names: list[str]) -> dict[str, object]:
    write_lora(tmp_path / "x.safetensors", metadata, names)
    return read_safetensors(tmp_path / "x.safetensors", {})


def test_another_order_in_the_header_of_a_lora_is_seen(tmp_path):
    first = lora(tmp_path, {"a": "1", "b": "2"}, ["m", "n"])
    order_of_metadata = lora(tmp_path, {"b": "2", "a": "1"}, ["m", "n"])
    order_of_tensors = lora(tmp_path, {"a": "1", "b": "2"}, ["n", "m"])
    for other in (order_of_metadata, order_of_tensors):
        differing = {name for name in first if first[name] != other[name]}
        assert differing == {"bytes", "order of the header"}


def test_the_parts_of_a_state_are_told_apart(tmp_path):
    def state(position: int, drawn: bytes) -> dict[str, Any]:
        write_lora(tmp_path / "state.safetensors", {}, ["0"], drawn)
        essence = {"dict": [["model.source", "/home/me/.same/tree/x"]]}
        random = {"dict": [["torch", {"tensor": "0"}]]}
        tree = {"dict": [["essence", essence], ["position", position], ["random", random]]}
        sealed = hashlib.sha256((tmp_path / "state.safetensors").read_bytes()).hexdigest()
        text = json.dumps({"step": 3, "sha256": sealed, "tree": tree})
        outer = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text}
        (tmp_path / "state.json").write_text(json.dumps(outer))
        return read_state(tmp_path, PLACES)

    first, second = state(1, b"a" * 8), state(2, b"b" * 8)
    assert first["parts"]["step"] == 3 and set(first["seals"].values()) == {True}
    assert (
        first["tensors"] == second["tensors"] == {"0": "F32 [2]"}
    )  # of the global random generators, seeded by nobody
    assert {name for name, value in first["parts"].items() if second["parts"][name] != value} == {"position"}


def test_what_tensorboard_measures_is_not_compared(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as board:
        for tag in ("loss", "images_per_second", "memory_gib"):
            board.add_scalar(tag, 0.5, 1)
    (path,) = tmp_path.iterdir()
    assert read_events(path) == {"step 1, loss": 0.5}


def test_an_output_folder_becomes_results_and_words(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events.out.tfevents.1795978797.vm.4606.0").write_bytes(b"")
    status = {"phase": "failed", "updated": 17.5, "eta_s": 3, "message": "No image in /home/me/.same/run/a."}
    (tmp_path / "status.json").write_text(json.dumps(status))
    text = PngImagePlugin.PngInfo()
    text.add_text("seed", "7")
    Image.new("RGB", (4, 2), "red").save(tmp_path / "sample.png", pnginfo=text)
    results, lines = read_folder(tmp_path, PLACES)
    assert results["files"] == ["logs/events.out.tfevents", "sample.png", "status.json"]
    assert results["status.json"] == {"phase": "failed"} and results["tensorboard"] == {}
    assert results["sample.png"]["size"] == "4x2 RGB" and results["sample.png"]["text seed"] == "7"
    assert lines == {"status.json, message": ["No image in <job>."]}


def test_names_defaults_and_choices_of_variables_are_results():
    head = "| variable | default | allowed | meaning |\n| --- | --- | --- | --- |\n"
    table = f"{head}| `A` | `1` | whole number, 1 to 9 | a |\n| `B` | found | x, y | b |"
    assert read_help(table) == {"names": ["A", "B"], "A, default": "`1`", "B, choices": ["x", "y"]}


def test_sentences_in_printed_rows_are_words():
    row = {"batch": 1, "weights": "fp8", "way": "all recomputed, kept on the host"}
    assert figures(row) == {"batch": 1, "weights": "fp8"} and is_sentence(row["way"])


# ---- what is reported


def recording(results: dict[str, object], *printed: str) -> dict[str, object]:
    return {"results": results, "words": {"printed": list(printed)}, "problems": []}


def test_equal_recordings_have_no_difference():
    one = {"a": recording({"exit code": 0}, "INFO Done."), "b": recording({"losses": {"step 1": 0.5}})}
    found = compare.compare(one, json.loads(json.dumps(one)))
    assert found == compare.Differences((), ())
    assert report.text(found) == "The same: no result and no sentence differs."


@pytest.mark.parametrize(("old", "new"), [(1, 1.0), (True, 1), (0.1, 0.1 + 1e-17 * 2), (None, compare.NOTHING)])
def test_types_and_last_bits_count(old, new):
    changes, _ = compare.changed({"x": old}, {"x": new})
    assert bool(changes) is (repr(old) != repr(new))


def test_a_missing_and_a_new_result_are_seen():
    found = compare.compare({"a": recording({"x": 1, "gone": 2})}, {"a": recording({"x": 1, "come": 3})})
    assert [(r.result, r.changes[0].old, r.changes[0].new) for r in found.results] == [
        ("come", compare.NOTHING, 3),
        ("gone", 2, compare.NOTHING),
    ]


def test_a_job_that_is_missing_is_seen():
    assert compare.compare({"a": recording({"x": 1})}, {}).results


def test_lists_differ_by_members_or_by_order():
    members, _ = compare.changed(["a", "b"], ["b", "c"])
    assert [(c.old, c.new) for c in members] == [("'a'", compare.NOTHING), (compare.NOTHING, "'c'")]
    order, _ = compare.changed(["a", "b", "c"], ["b", "a", "c"])
    assert [c.key for c in order] == ["place 1", "place 2"]


def test_a_changed_sentence_is_words_and_a_changed_number_a_result():
    old = {"a": recording({}, "INFO Pictures: 12 found.", "INFO 5 buckets.")}
    new = {"a": recording({}, "INFO Images: 12 found.", "INFO 6 buckets.")}
    found = compare.compare(old, new)
    (sentence,) = found.sentences
    assert (sentence.old, sentence.new) == ("INFO Pictures: 12 found.", "INFO Images: 12 found.")
    assert not sentence.has_other_numbers
    (result,) = found.results
    assert (result.changes[0].old, result.changes[0].new) == ("INFO 5 buckets.", "INFO 6 buckets.")


def test_a_new_wording_with_other_numbers_is_marked():
    (sentence,) = compare.compare(
        {"a": recording({}, "12 pictures are found")}, {"a": recording({}, "11 images are found")}
    ).sentences
    assert sentence.has_other_numbers and "numbers in it differ too" in report.text(
        compare.Differences((), (sentence,))
    )


def test_lines_are_paired_with_the_most_similar_and_the_rest_with_nothing():
    old = ["the model is loaded", "the LoRA is saved at step 3", "bye"]
    new = ["the LoRA is written at step 3", "the model was loaded"]
    assert compare.paired(old, new) == [(old[0], new[1]), (old[1], new[0]), (old[2], compare.NOTHING)]
    assert compare.paired(["a"], ["a", "a"]) == [(compare.NOTHING, "a")]


def test_another_order_of_the_same_lines_is_seen():
    assert compare.paired(["a", "b", "c"], ["a", "c", "b"]) == [("b", "c")]


def test_the_same_difference_in_many_jobs_is_printed_once():
    names = [f"job-{i}" for i in range(9)]
    old = {name: recording({"plan.json": {"train.seed": 1}}, "it is a picture") for name in names}
    new = {name: recording({"plan.json": {"train.seed": 2}}, "it is an image") for name in names}
    found = compare.compare(old, new)
    assert len(found.results) == len(found.sentences) == 1 and len(found.results[0].jobs) == 9
    text = report.text(found)
    assert "9 jobs (job-0, job-1, job-2, job-3, …)\n    plan.json: train.seed: 1 → 2" in text
    assert "old: it is a picture" in text and "new: it is an image" in text
    assert json.loads(report.as_json(found))["results"][0]["changes"] == [{"key": "train.seed", "old": 1, "new": 2}]


def test_many_changes_of_one_result_are_counted_and_the_most_telling_come_first():
    files = {f"x-step{i}.safetensors, bytes": i for i in range(20)}
    old = {"a": recording({"tensors": dict.fromkeys("abc", "x"), "exit code": 0, **files})}
    new = {"a": recording({"tensors": dict.fromkeys("abc", "y"), "exit code": 1, **dict.fromkeys(files, "")})}
    lines = report.text(compare.compare(old, new)).splitlines()
    assert lines[:4] == ["RESULTS: 22 differ", "  a", "    exit code: 0 → 1", "    tensors (3 of 3 values): a: x → y"]
    assert "    … and 10 more" in lines and "WORDS: the same" in lines


# ---- the jobs


def test_the_jobs_are_those_of_the_plan():
    jobs = {job.name: job for job in all_jobs()}
    assert len(jobs) == len(all_jobs()) and len(BAD_INPUT) >= 40
    for family in ("flux", "sdxl", "sd3"):
        assert {f"{family}-{kind}" for kind in ("default", "split", "dora", "encoders")} <= jobs.keys()
    in_8_bits = [name for name in jobs if name.endswith(("-fp8", "-int8"))]
    assert len(in_8_bits) >= 8 and sum(bool(job.kill_at) for job in jobs.values()) == 2
    assert any(job.variables.get("NUM_GPUS") == "2" and job.kind == TRAIN for job in jobs.values())


def test_a_job_comes_after_those_that_it_needs():
    seen: set[str] = set()
    for job in all_jobs():
        assert set(job.needs) <= seen and (not job.folder or job.folder in job.needs)
        seen.add(job.name)


def test_jobs_are_chosen_by_pattern_with_those_that_they_need():
    assert [job.name for job in command.chosen(["flux-from-*"])] == ["flux-split", "flux-from-lora"]
    with pytest.raises(LookupError, match="nothing-like-it"):
        command.chosen(["nothing-like-it"])


def test_values_are_filled_in_and_nothing_else_of_our_environment_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PARAMS_SEED", "7")
    place = Place(tmp_path / "tree", tmp_path / "run", tmp_path / "data", tmp_path / "stopped")
    given = environment(Job("a", "", variables={"DATASET_NAME": "<data>/x", "OUTPUT_PATH": "<job>/o"}), place)
    assert given["DATASET_NAME"] == f"{tmp_path}/data/x" and given["OUTPUT_PATH"] == f"{tmp_path}/run/a/o"
    assert "PARAMS_SEED" not in given and given["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("expects", "code", "printed", "wrong"),
    [(0, 0, "", False), (0, 78, "", True), (REFUSED, 78, "", False), (REFUSED, 0, "", True), (REFUSED, BUG, "", True),
     (0, 0, "Traceback (most recent call last):", True)],
)  # fmt: skip
def test_a_job_that_does_not_run_as_expected_proves_nothing(expects, code, printed, wrong):
    assert bool(problems(Job("a", "", CHECK, expects=expects), code, printed)) is wrong


def test_the_input_files_are_the_same_each_time(tmp_path):
    concept = Path(__file__).parents[2] / "trainer" / "families" / "miniatures" / "concept"
    for name in ("a", "b"):
        write_data(tmp_path / name, concept)
    files = [path.relative_to(tmp_path / "a") for path in sorted((tmp_path / "a").rglob("*")) if path.is_file()]
    placed = {"tags.json", "lines.json"}  # have the folder's name in them
    differing = [f for f in files if (tmp_path / "a" / f).read_bytes() != (tmp_path / "b" / f).read_bytes()]
    assert len(files) > 50 and {f.name for f in differing} == placed


# ---- the command


def test_a_missing_base_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([])
    assert stop.value.code == 64 and "BASE is missing" in capsys.readouterr().err


def test_an_unknown_base_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["no-such-commit"])
    assert stop.value.code == 64 and "BASE=no-such-commit is no commit" in capsys.readouterr().err


def test_the_jobs_are_listed(capsys):
    command.main(["--list"])
    assert "flux-default " in capsys.readouterr().out
