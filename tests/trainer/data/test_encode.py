"""Which weights the cache belongs to: every part that encodes, each by itself, and the settings of the encoders."""

import shutil

import pytest

from trainer.data.encode import open_cache

ENCODING = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2")


@pytest.fixture
def model(tmp_path):
    for part in (*ENCODING, "transformer", "scheduler", "vae"):
        (tmp_path / "model" / part).mkdir(parents=True)
        (tmp_path / "model" / part / "config.json").write_text(f'{{"part": "{part}"}}')
    return tmp_path / "model"


def test_every_part_that_encodes_text_gives_other_items_and_no_other_does(model, tmp_path):
    def opened(precision="bfloat16", **changed):
        return open_cache(tmp_path, model, precision=precision, **changed)

    first = opened()
    others = [opened("float32"), opened(max_tokens=150), opened(max_tokens=225)]
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
