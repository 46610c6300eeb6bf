"""Class images: the base model draws them once, as diffusers does, and they are trained on as regularisation images."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.machines import FULL
from tests.support.miniatures import pipeline
from trainer.data.epochs import EpochSampler
from trainer.job import class_images, prepare
from trainer.job.reporting.status import Status
from trainer.job.run import run
from trainer.spec.errors import SettingsError
from trainer.spec.family import base_models, get_family
from trainer.spec.memory_model import weights_gib
from trainer.training.stop_flag import StopFlag

ONE_STEP = {"PARAMS_MAX_STEPS": "1", "PARAMS_NETWORK_DIM": "2", "PARAMS_PRIOR_LOSS_WEIGHT": "0.5"}


def config(folder, **subset):
    subsets = [{"image_dir": str(folder)}, {"class_prompt": "a red circle", "num_class_images": 2, **subset}]
    return json.dumps({"datasets": [{"resolution": 128, "batch_size": 2, "subsets": subsets}]})


@pytest.fixture
def job(job_plan, tmp_path):
    def make(name, out="out", **subset):
        where = {"DATASET_CONFIG": config(tmp_path / "pictures", **subset), "OUTPUT_PATH": str(tmp_path / out)}
        return job_plan(name, **ONE_STEP, **where, DATASET_NAME="")

    (tmp_path / "pictures").mkdir()
    return make


@pytest.mark.parametrize("name", ["flux", "sdxl", "sd3"])
def test_they_are_drawn_once_as_diffusers_draws_them(name, job, tmp_path, monkeypatch):
    run(job(name), StopFlag())
    found = sorted((tmp_path / "cache" / "class-pictures").rglob("*.png"))
    assert [path.name for path in found] == ["00000.png", "00001.png"]
    pipe, facts = pipeline(name), get_family(name).FACTS
    pipe.set_progress_bar_config(disable=True)
    defaults = facts.models[f"mini-{name}"].defaults
    steps, cfg = defaults.get("steps", facts.prompt_steps), defaults.get("cfg", facts.prompt_cfg)
    asked = {"guidance_scale": facts.prompt_guidance if name == "flux" else cfg}
    if name != "sdxl":
        t5 = pipe.tokenizer_2 if name == "flux" else pipe.tokenizer_3
        asked["max_sequence_length"] = t5.model_max_length
    for number, path in enumerate(found):
        generator = torch.Generator().manual_seed(42 + number)
        expected = pipe(
            "a red circle", width=128, height=128, num_inference_steps=steps, generator=generator, **asked
        ).images[0]  # fmt: skip
        difference = np.abs(np.asarray(Image.open(path), np.int16) - np.asarray(expected, np.int16))
        assert difference.max() <= 1

    # Another job takes them from the cache; one that lacks an image draws that one, the same.
    written = [path.read_bytes() for path in found]
    found[1].unlink()
    run(job(name, out="again"), StopFlag())
    assert [path.read_bytes() for path in found] == written
    monkeypatch.setattr(get_family(name), "load_vae", lambda *_, **__: pytest.fail("drawn anew"))
    run(job(name, out="third"), StopFlag())


def test_they_are_trained_on_as_regularisation_images(job, tmp_path):
    plan = job("flux", caption_suffix="alone")
    subset = plan.data.datasets[0].subsets[1]
    assert subset.is_reg and subset.source.kind == "generated" and subset.source.count == 2
    run(plan, StopFlag())
    report = (tmp_path / "out" / "dataset-report.txt").read_text()
    assert "Images: 4 found, 4 used" in report
    folder = next((tmp_path / "cache" / "class-pictures").iterdir())
    source = dataclasses.replace(subset.source, path=str(folder))
    dataset = dataclasses.replace(
        plan.data.datasets[0], subsets=(plan.data.datasets[0].subsets[0], dataclasses.replace(subset, source=source))
    )
    data = dataclasses.replace(plan.data, datasets=(dataset,))
    images = prepare.scan_and_report(data, report=tmp_path / "r.txt").images
    examples = [e for batch in EpochSampler(images, data, seed=1, prior_loss_weight=0.5).epoch(0) for e in batch]
    assert {(e.caption, e.weight) for e in examples if e.image.subset == 1} == {("a red circle alone", 0.5)}
    assert {e.weight for e in examples if e.image.subset == 0} == {1.0}


@pytest.mark.parametrize(("share", "fits"), [(1.01, True), (0.99, False)])
def test_the_host_holds_the_weights_that_the_gpus_will_share(job, tmp_path, monkeypatch, share, fits):
    """One process draws, with the host's memory for all; the others' GPUs have no shards yet."""
    plan = job("flux")
    needed = weights_gib(base_models()[FULL][1].footprint, 0, "fp8")
    engine = dataclasses.replace(plan.engine, offload="shards", num_gpus=4, precision="fp8")
    engine = dataclasses.replace(engine, host_gib=needed * share / 4)
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, base=FULL), engine=engine)
    if fits:
        assert class_images.engine_for_one(plan) == dataclasses.replace(engine, offload="weights")
        return
    monkeypatch.setattr(class_images, "load_text_encoders", lambda *_: pytest.fail("loaded in vain"))
    with pytest.raises(SettingsError, match=r"class_prompt: .* need \d.* GiB .* Fix: .*PARAMS_PRECISION=nf4"):
        class_images.draw_class_images(plan, status=Status(tmp_path), check_in=lambda: None)


def test_what_decides_an_image_decides_its_folder(job, tmp_path):
    for out, changes in {"a": {}, "b": {"class_prompt": "a blue circle"}, "c": {"num_class_images": 1}}.items():
        run(job("sd3", out=out, **changes), StopFlag())
    assert len(list((tmp_path / "cache" / "class-pictures").iterdir())) == 3


@pytest.mark.parametrize(
    ("subset", "said"),
    [
        ({"image_dir": "/tmp"}, "image_dir does not go together with class_prompt"),
        ({"class_tokens": "x"}, "class_tokens does not go together"),
        ({"is_reg": False}, "Fix: remove is_reg"),
        ({"num_class_images": 0}, "num_class_images"),
        ({"class_prompt": ""}, "class_prompt"),
    ],
)
def test_what_cannot_be_drawn_is_refused(job, subset, said):
    with pytest.raises(SettingsError, match=said):
        job("flux", **subset)
