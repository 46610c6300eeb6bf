"""Captions and prompts that a text encoder does not read to their end are named, with the place of the cut."""

import csv
import dataclasses
import io
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tests.support.miniatures import base, family_of, folder
from trainer.data import caption_length
from trainer.job.run import run
from trainer.sample import sample_command
from trainer.spec.family import facts_of, family_names, get_family
from trainer.training.stop_flag import StopFlag

START = "a b c d e f g h " * 12  # 96 tokens
QUICK = {"PARAMS_OPTIMIZER_TYPE": "adamw", "PARAMS_LEARNING_RATE": "0.01", "PARAMS_MAX_STEPS": "2"}


def reader(family, **options):
    facts = facts_of(family_of(family).FACTS.name, base(family))
    return caption_length.load_reader(facts, folder(family), **options)


@pytest.mark.parametrize(("family", "name", "limit"), [("sdxl", "CLIP", 77), ("flux", "T5", 64), ("sd3", "T5", 64)])
def test_the_encoder_that_reads_most_counts(family, name, limit):
    """The miniatures' T5 has a tokenizer for 64 tokens."""
    found = reader(family)
    assert (found.name, found.limit) == (name, limit)


@pytest.mark.parametrize("family", [*family_names(), "flux2_dev"])
@given(words=st.lists(st.sampled_from(["red", "a", "Ünïcode", "blue,", "😀", "  two", "x" * 30]), max_size=120))
def test_the_cut_is_where_the_tokens_end(family, words):
    text, found = " ".join(words), reader(family)
    cut = found.cut(text)
    ids = found.tokenizer(text, verbose=False).input_ids
    assert (cut is not None) == (len(ids) > found.limit)
    if cut is not None:
        assert cut.tokens == len(ids) and cut.kept + cut.lost == text and cut.lost.strip()
        kept = found.tokenizer(cut.kept, verbose=False).input_ids
        assert found.limit - 4 <= len(kept) <= found.limit  # a character may be several tokens


@pytest.mark.parametrize("family", ["flux2", "flux2_dev", "krea2", "qwen_image", "z_image"])
def test_the_first_lost_token_has_no_effect_and_the_last_kept_one_has(family):
    """Of language models, whose tokenizers add no mark and whose template stands around the caption."""
    kind = family_of(family)
    encoders = kind.load_encoders(folder(family), device="cpu", dtype=torch.float32)
    found = reader(family)
    # The miniatures' vocabularies lack words of these templates: more tokens stand before the caption.
    templates = {"z_image": lambda: (kind.BEFORE, kind.TOKENS_BEFORE)}
    templates["flux2"] = lambda: (kind.QWEN3.before, kind.QWEN3.tokens_before)
    templates["flux2_dev"] = lambda: (kind.MISTRAL.before, kind.MISTRAL.tokens_before)
    if family in templates:
        before, tokens = templates[family]()
        assert facts_of(kind.FACTS.name, base(family)).text_readers["tokenizer"][1] == kind.TEXT_TOKENS - tokens
        length = min(kind.TEXT_TOKENS, found.tokenizer.model_max_length)
        found = dataclasses.replace(found, limit=length - len(found.tokenizer(before).input_ids))
    cut = found.cut("a " * 600)
    assert cut.kept.rstrip().endswith("a") and cut.lost.strip().startswith("a")
    changed = [cut.kept + cut.lost.replace("a", "b"), cut.kept.rstrip()[:-1] + "b" + cut.lost]
    with torch.no_grad():
        whole, of_lost, of_kept = (item["tokens"] for item in kind.encode_text(encoders, ["a " * 600, *changed]))
    assert torch.equal(whole, of_lost) and not torch.equal(whole, of_kept)


def test_captions_of_just_the_limit_are_whole():
    found = reader("sdxl")
    assert found.cut("a " * 75) is None and found.cut("a " * 76).tokens == 78
    longer = reader("sdxl", max_tokens=150)
    assert longer.cut("a " * 150) is None and longer.cut("a " * 151).tokens == 153


@pytest.mark.parametrize(
    ("count", "max_tokens", "fix"),
    [(80, 77, "TOKEN_LENGTH=150, or"), (200, 77, "TOKEN_LENGTH=225, or"), (999, 77, "TOKEN_LENGTH=225, or"),
     (200, 150, "TOKEN_LENGTH=225, or"), (999, 225, "Fix: shorten")],
)  # fmt: skip
def test_the_smallest_length_that_helps_is_advised(count, max_tokens, fix):
    found = reader("sdxl", max_tokens=max_tokens)
    cuts = caption_length.find_cuts(found, [("0.0/a.png", ["a " * count]), ("0.0/b.png", ["a"])])
    lines = caption_length.describe_cuts(found, cuts, get_family("sdxl").FACTS, limit=5)
    assert fix in lines[0] and "0.0/a.png" in lines[1] and "b.png" not in "".join(lines)


def test_other_families_offer_no_longer_captions():
    facts = get_family("flux").FACTS
    cuts = caption_length.find_cuts(reader("flux"), [("0.0/a.png", ["a " * 300])])
    assert "TOKEN_LENGTH" not in caption_length.describe_cuts(reader("flux"), cuts, facts, limit=5)[0]


def write_captions(plan, *captions):
    for number, caption in enumerate(captions):
        (plan_folder(plan) / f"{number}.txt").write_text(caption)


def with_prompt(plan, text, negative):
    prompt = dataclasses.replace(plan.prompts[0], text=text, negative=negative, steps=2)
    return dataclasses.replace(plan, prompts=(prompt,))


def plan_folder(plan):
    return Path(plan.data.datasets[0].subsets[0].source.path)


@pytest.mark.parametrize("family", family_names())
def test_a_job_names_what_is_cut_and_no_warning_of_a_library_leaks(family, job_plan, tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    start = START * 7  # 672 tokens
    plan = with_prompt(job_plan(family, **QUICK), start, start * 2)
    write_captions(plan, f"{start}red wall", "a red circle")
    run(plan, StopFlag())
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any("1 captions are longer than the" in text for text in warnings)
    assert any("0.0/0.png: " in text and "cut before" in text for text in warnings)
    assert any(text.startswith("Prompt 0") for text in warnings)
    assert any(text.startswith("Negative prompt 0") for text in warnings)
    assert "0.0/0.png" in (tmp_path / "out" / "dataset-report.txt").read_text().partition("are longer than")[2]
    table = (tmp_path / "out" / "dataset-report.csv").read_text(encoding="utf-8-sig")
    rows = {row["file"]: row["cut_at"] for row in csv.DictReader(io.StringIO(table))}
    assert rows["0.png"] and rows["0.png"].rstrip("…") in f"{start}red wall" and rows["1.png"] == ""
    leaked = "\n".join([*warnings, capfd.readouterr().err])
    assert "Token indices" not in leaked and "truncated" not in leaked


def test_chunks_reach_training_samples_and_the_file_s_header(job_plan, tmp_path):
    """With 225 tokens two captions that differ at their ends train, are sampled, and are drawn by the command."""
    asked = {"PARAMS_SAMPLE_EVERY_N_STEPS": "2"}
    long = {"PARAMS_MAX_TOKEN_LENGTH": "225", "PARAMS_TEXT_ENCODER_LR": "0.01"}
    for name, more in {"plain": {}, "long": long}.items():
        plan = job_plan("sdxl", **QUICK, **asked, **more, OUTPUT_PATH=str(tmp_path / name))
        plan = with_prompt(plan, f"{START}red", f"{START}green")
        write_captions(plan, f"{START}red", f"{START}blue")
        run(plan, StopFlag())
        assert list((tmp_path / name / "sample").glob("*.png"))
    texts = list((tmp_path / "cache").rglob("text/*/*.safetensors"))
    lengths = set()
    for path in texts:
        with safe_open(path, framework="pt") as file:
            lengths.add(file.get_slice("tokens").get_shape()[0])
    assert lengths == {77, 227}
    headers = {}
    for name in ("plain", "long"):
        with safe_open(tmp_path / name / "x.safetensors", framework="pt") as file:
            headers[name] = file.metadata()
    assert headers["long"]["ss_max_token_length"] == "225" and "ss_max_token_length" not in headers["plain"]


def test_the_sample_command_reads_the_length_from_the_lora(job_plan, tmp_path, caplog):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{START}red --s 1 --w 64 --h 64 --n bad\n{START}blue --s 1 --w 64 --h 64 --d 42\n")
    run(job_plan("sdxl", **QUICK, PARAMS_MAX_TOKEN_LENGTH="150"), StopFlag())
    lora = str(tmp_path / "out" / "x.safetensors")
    drawn = {}
    for name, more in {"150": [], "77": ["--max-token-length", "77"]}.items():
        out = tmp_path / name
        asked = ["--base", "mini-sdxl", "--lora", lora, "--prompts", str(prompts), "--out", str(out), *more]
        caplog.clear()
        assert sample_command(asked) == 0
        drawn[name] = [path.read_bytes() for path in sorted(out.glob("step-*.png"))]
        assert any("Prompt 0 is longer" in r.getMessage() for r in caplog.records) is (name == "77")
    assert drawn["150"] != drawn["77"]
    assert sample_command([*asked[:-1], "100"]) == 78


def test_cached_texts_of_77_tokens_keep_their_names(tmp_path):
    from trainer.data.encode import open_cache

    plain = open_cache(tmp_path, folder("sdxl"), family="sdxl", precision="float32")
    asked = open_cache(tmp_path, folder("sdxl"), family="sdxl", precision="float32", max_tokens=77)
    longer = open_cache(tmp_path, folder("sdxl"), family="sdxl", precision="float32", max_tokens=150)
    assert plain.text_path("a") == asked.text_path("a") != longer.text_path("a")
