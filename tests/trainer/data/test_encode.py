"""Which weights the cache belongs to: every part that encodes, each by itself, and the settings of the encoders."""

import dataclasses
import shutil
from unittest.mock import MagicMock

import pytest
import torch

from trainer.data import encode
from trainer.data.cache import Cache, Share
from trainer.data.encode import open_cache
from trainer.job.rolling import rolling_cache
from trainer.spec.plan import EnginePlan

ENCODING = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2")


@pytest.fixture
def model(tmp_path):
    for part in (*ENCODING, "transformer", "scheduler", "vae"):
        (tmp_path / "model" / part).mkdir(parents=True)
        (tmp_path / "model" / part / "config.json").write_text(f'{{"part": "{part}"}}')
    return tmp_path / "model"


def test_every_part_that_encodes_text_gives_other_items_and_no_other_does(model, tmp_path):
    def opened(precision="bfloat16", family="flux", **changed):
        return open_cache(tmp_path, model, family=family, precision=precision, **changed)

    first = opened()
    # Z-Image and FLUX.2 klein have the same encoder, and read other states of it.
    others = [opened("float32"), opened(max_tokens=150), opened(max_tokens=225), opened(family="z_image")]
    for part in ENCODING:
        config = model / part / "config.json"
        kept = config.read_text()
        config.write_text(kept.upper())
        others.append(opened())
        config.write_text(kept)
    shutil.copytree(model / "tokenizer", model / "tokenizer_3")
    others.append(opened())
    shutil.rmtree(model / "tokenizer_3")
    assert len({cache.encoders for cache in (first, *others)}) == len(others) + 1
    assert {cache.vae for cache in others} == {first.vae} and opened(max_tokens=77) == first
    for part in ("transformer", "scheduler"):
        (model / part / "config.json").write_text("{}")
    assert opened() == first
    (model / "vae" / "config.json").write_text("{}")
    assert opened().encoders == first.encoders and opened().vae != first.vae


def captioned(tmp_path, monkeypatch, texts, *, piece, share=None, stream=False, **options):
    """`fill_texts` with encoders that note what they are given; the batches, and the cache."""
    batches = []

    class Noting:
        def encode_text(self, encoders, captions, *, max_tokens):
            batches.append(list(captions))
            return [{"tokens": torch.full((2, 2), float(len(text)))} for text in captions]

    monkeypatch.setattr(encode, "PIECE", piece)
    monkeypatch.setattr(encode, "load_text_encoders", lambda *_: object())
    cache = Cache(tmp_path, "v", "e")
    encode.fill_texts(
        cache,
        iter(texts),
        family=Noting(),
        model=tmp_path,
        engine=EnginePlan(stream_encoders=stream),
        check_in=lambda: None,
        **({"share": share} if share else {}),
        **options,
    )
    return batches, cache


def test_captions_are_encoded_once_whatever_piece_they_come_in(tmp_path, monkeypatch):
    texts = [f"caption {i}" for i in range(50)]
    batches, cache = captioned(tmp_path, monkeypatch, texts * 3, piece=20)
    assert [text for batch in batches for text in batch] == texts and max(map(len, batches)) == 16
    assert all(cache.has(cache.text_path(text)) for text in texts)
    assert captioned(tmp_path, monkeypatch, texts, piece=7)[0] == []
    # As before where all of them are one piece.
    whole, _ = captioned(tmp_path / "whole", monkeypatch, texts * 3, piece=1000)
    assert whole == [texts[i : i + 16] for i in range(0, 50, 16)]
    few, _ = captioned(tmp_path / "few", monkeypatch, texts, piece=1000, at_once=3)
    assert few == [texts[i : i + 3] for i in range(0, 50, 3)]


def test_streamed_encoders_are_the_first_process_s_and_the_others_still_agree_on_what_is_missing(tmp_path, monkeypatch):
    texts = [f"caption {i}" for i in range(20)]
    merged = []

    def merge(numbers):
        merged.append(len(numbers))
        return [max(number, 1) for number in numbers]

    batches, _ = captioned(tmp_path, monkeypatch, texts, piece=8, share=Share(1, 2, merge), stream=True)
    assert batches == [] and merged == [8, 1, 8, 1, 4]


@pytest.mark.parametrize(
    ("base", "stream", "at_once"), [("flux2-dev", False, 1), ("flux2-dev", True, 16), ("flux", False, 16)]
)
def test_captions_are_encoded_as_many_at_once_as_was_planned_for(job_plan, monkeypatch, base, stream, at_once):
    asked = {}
    monkeypatch.setattr(encode, "fill_texts", lambda *_, **options: asked.update(options))
    monkeypatch.setattr(encode, "fill_images", lambda *_, **__: None)
    plan = job_plan("flux2")
    plan = dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, base=base),
        engine=dataclasses.replace(plan.engine, precision="fp8", stream_encoders=stream),
    )
    rolling_cache.fill(plan, MagicMock(), None, check_in=lambda: None, share=Share())
    assert asked["at_once"] == at_once
