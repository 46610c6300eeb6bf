"""The header of the LoRA file, which users' tools show."""

import json

from trainer.data.epochs import EpochSampler
from trainer.data.scan import scan
from trainer.job import saving
from trainer.lora_files import metadata
from trainer.spec.family import get_family
from trainer.spec.plan import Source
from trainer.training.objective import FlowMatching

READ = [
    "ss_output_name",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_training_started_at",
    "ss_bucket_info",
    "ss_resolution",
    "ss_dataset_dirs",
    "ss_datasets",
    "ss_tag_frequency",
    "ss_base_model_version",
    "ss_num_train_images",
    "ss_steps",
    "ss_epoch",
    "ss_optimizer",
    "ss_learning_rate",
    "ss_lr_scheduler",
    "ss_seed",
    "ss_noise_offset",
]
MODELSPEC = [
    "sai_model_spec",
    "architecture",
    "implementation",
    "title",
    "resolution",
    "date",
    "license",
    "tags",
    "trigger_phrase",
    "prediction_type",
]


def header(plan):
    found = scan(plan.data, cpu_workers=0)
    sampler = EpochSampler(found.images, plan.data, seed=0)
    run = saving.describe_run(plan, get_family("flux"), FlowMatching(), sampler=sampler, scan=found)
    return metadata.lora_metadata(run, step=7, epoch=2, rank=4, alpha=4.0)


def test_the_header_has_every_key_as_text_and_no_path(job_plan):
    plan = job_plan("flux", TRIGGER_WORD="zot", PARAMS_NUM_REPEATS="3")
    found = header(plan)
    assert found.keys() >= {*READ, *(f"modelspec.{key}" for key in MODELSPEC)}
    assert all(isinstance(value, str) for value in found.values())
    assert plan.output.path not in json.dumps(found) and plan.data.datasets[0].subsets[0].source.path not in str(found)
    assert (found["ss_steps"], found["ss_epoch"], found["ss_num_train_images"]) == ("7", "2", "6")
    assert json.loads(found["ss_tag_frequency"]) == {
        "pictures": {"a red circle": 1, "a blue square on a green background": 1}
    }
    assert json.loads(found["ss_bucket_info"]) == {"buckets": {"0": {"resolution": [128, 128], "count": 6}}}


def test_buckets_and_tags_are_listed_for_the_run_and_for_each_dataset(job_plan, tmp_path):
    """One folder at two resolutions, and as regularisation images: three sources of one name."""
    folder = {"image_dir": str(tmp_path / "pictures")}
    config = {
        "datasets": [
            {"resolution": 128, "batch_size": 2, "subsets": [{**folder, "num_repeats": 2}]},
            {"resolution": 64, "subsets": [folder, {**folder, "is_reg": True}]},
        ]
    }
    found = header(job_plan("flux", DATASET_NAME="", DATASET_CONFIG=json.dumps(config)))
    names = ["pictures", "pictures (2)", "pictures (3)"]
    assert list(json.loads(found["ss_dataset_dirs"])) == list(json.loads(found["ss_tag_frequency"])) == names
    assert (found["ss_num_train_images"], found["ss_num_reg_images"]) == ("6", "2")
    first, second = json.loads(found["ss_datasets"])
    assert first["bucket_info"] == {"buckets": {"0": {"resolution": [128, 128], "count": 4}}}
    assert second["bucket_info"] == {"buckets": {"0": {"resolution": [64, 64], "count": 4}}}
    assert (first["batch_size_per_device"], first["resolution"]) == (2, [128, 128])
    assert [s["image_dir"] for s in second["subsets"]] == names[1:] and second["num_reg_images"] == 2
    assert {tuple(b["resolution"]) for b in json.loads(found["ss_bucket_info"])["buckets"].values()} == {
        (64, 64),
        (128, 128),
    }


def test_secrets_in_a_url_are_not_in_the_header():
    assert Source("archive", "https://host/a/pictures.zip?key=canary").public == "https://host/a/pictures.zip"
    assert Source("folder", "/data/what?").public == "/data/what?"


def test_the_trigger_words_of_all_subsets_and_no_placeholder(job_plan, tmp_path):
    folder = {"image_dir": str(tmp_path / "pictures")}
    own = [{**folder, "trigger_word": "sks"}, folder, {**folder, "trigger_word": ""}, {**folder, "is_reg": True}]
    config = {"datasets": [{"resolution": 128, "subsets": own}]}
    plan = job_plan("flux", DATASET_NAME="", DATASET_CONFIG=json.dumps(config), TRIGGER_WORD="zot")
    for caption in (tmp_path / "pictures").glob("*.txt"):
        caption.write_text("a photo of [trigger]")
    found = header(plan)
    assert found["modelspec.trigger_phrase"] == "sks, zot"
    tags = json.loads(found["ss_tag_frequency"])
    assert "a photo of sks" in tags["pictures"] and "a photo of zot" in tags["pictures (2)"]
