"""What identifies class images in the cache: each field of the prompt, and all else that decides their pixels."""

import dataclasses

import pytest

from trainer.job.class_images import ClassImages
from trainer.spec.plan import Prompt

PROMPT = Prompt("a dog", 64, 48, seed=1, steps=4, guidance=3.5, cfg=1.0, negative="blurred")
IMAGES = ClassImages(PROMPT, 3)


@pytest.fixture
def model(tmp_path):
    for part in ("text_encoder", "transformer", "vae"):
        (tmp_path / "model" / part).mkdir(parents=True)
        (tmp_path / "model" / part / "config.json").write_text(f'{{"part": "{part}"}}')
    return tmp_path / "model"


def other(value):
    return f"{value}x" if isinstance(value, str) else value + 1


def test_every_field_gives_another_folder(model, tmp_path):
    asked = {"precision": "bf16", "scheduler": {"shift": 3.0}, "max_tokens": 77}

    def folder(images=IMAGES, **changed):
        return images.folder(tmp_path, model, **{**asked, **changed})

    found = [folder()]
    for field in dataclasses.fields(Prompt):
        changed = dataclasses.replace(PROMPT, **{field.name: other(getattr(PROMPT, field.name))})
        found.append(folder(ClassImages(changed, 3)))
    assert {field.name for field in dataclasses.fields(ClassImages)} == {"prompt", "count"}
    found.append(folder(ClassImages(PROMPT, 4)))
    found += [folder(precision="fp8"), folder(max_tokens=150), folder(max_tokens=225)]
    found += [folder(scheduler={"shift": 2.0}), folder(scheduler={})]
    for part in ("text_encoder", "transformer", "vae"):
        config = model / part / "config.json"
        kept = config.read_text()
        config.write_text(kept.upper())
        found.append(folder())
        config.write_text(kept)
    (model / "text_encoder").rename(model / "text_encoder_2")
    found.append(folder())
    assert len(set(found)) == len(found) and {path.parent.name for path in found} == {"class-pictures"}
    (model / "text_encoder_2").rename(model / "text_encoder")
    assert folder() == found[0]


def test_each_missing_image_has_its_own_seed(tmp_path):
    (tmp_path / "00001.png").write_bytes(b"there")
    assert [(path.name, prompt) for path, prompt in IMAGES.missing(tmp_path)] == [
        ("00000.png", PROMPT),
        ("00002.png", dataclasses.replace(PROMPT, seed=3)),
    ]
