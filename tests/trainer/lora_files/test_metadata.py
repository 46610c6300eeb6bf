"""The header of the LoRA file, which users' tools show."""

import json
from dataclasses import replace

from trainer import __version__
from trainer.data.epochs import EpochSampler
from trainer.data.scan import scan
from trainer.job import saving
from trainer.lora_files import metadata
from trainer.spec.family import get_family
from trainer.spec.plan import Dataset, Source
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


# ---- a run with every value different, and its header written by hand

CIRCLES = metadata.SubsetSummary("circles", images=5, repeats=2, is_reg=False, tags={"red": 3, "blue": 2})
SQUARES = metadata.SubsetSummary("squares", images=4, repeats=3, is_reg=True, tags={"square": 4})
LINES = metadata.SubsetSummary("lines", images=7, repeats=1, is_reg=False, tags={})
LARGE = metadata.DatasetSummary(
    Dataset((), (640, 512), 6, enable_bucket=True, min_bucket_reso=320, max_bucket_reso=1280),
    (CIRCLES, SQUARES),
    {(640, 512): 9, (512, 640): 13},
)
SMALL = metadata.DatasetSummary(Dataset((), (256, 128), 8), (LINES,), {(256, 128): 6, (512, 640): 1})
RUN = metadata.TrainingRun(
    name="mine",
    base="flux",
    base_version="flux1",
    licence="a-licence (https://example.com/licence). Any use.",
    architecture="flux-1-dev",
    lora_type="rslora",
    rank=16,
    split_qkv=True,
    targets=("to_q", "to_k"),
    alpha=12.0,
    started=1767323045,
    optimizer="adamw",
    learning_rate=1e-4,
    text_encoders={"text_encoder": 2e-5, "text_encoder_2": 3e-5},
    schedule="cosine",
    seed=11,
    noise_offset=0.05,
    max_token_length=150,
    resolution=(640, 512),
    trigger="zot",
    objective="flow",
    datasets=(LARGE, SMALL),
)
# Keys and forms as sd-scripts' train_network.py writes them, and ModelSpec 1.0.1.
EXPECTED = {
    "ss_output_name": "mine",
    "ss_sd_model_name": "flux",
    "ss_base_model_version": "flux1",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "24",
    "ss_network_alpha": "18.0",
    "ss_training_started_at": "1767323045.0",
    "ss_resolution": "(640, 512)",
    "ss_num_train_images": "17",  # 5 x 2 + 7 x 1
    "ss_num_reg_images": "12",
    "ss_steps": "7",
    "ss_epoch": "2",
    "ss_optimizer": "adamw",
    "ss_learning_rate": "0.0001",
    "ss_text_encoder_lr": "[2e-05, 3e-05]",
    "ss_lr_scheduler": "cosine",
    "ss_seed": "11",
    "ss_noise_offset": "0.05",
    "ss_max_token_length": "150",
    "kiln_alpha": "12.0",
    "kiln_lora_type": "rslora",
    "kiln_rank": "16",
    "kiln_split_qkv": "true",
    "kiln_targets": '["to_q", "to_k"]',
    "kiln_version": __version__,
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": "flux-1-dev/lora",
    "modelspec.implementation": "diffusers",
    "modelspec.title": "mine",
    "modelspec.resolution": "640x512",
    "modelspec.date": "2026-01-02T03:04:05Z",
    "modelspec.prediction_type": "flow",
    "modelspec.trigger_phrase": "zot",
    "modelspec.license": "a-licence (https://example.com/licence). Any use.",
    "modelspec.tags": "",
}
TABLES = {
    "ss_bucket_info": {
        "buckets": {
            "0": {"resolution": [256, 128], "count": 6},
            "1": {"resolution": [512, 640], "count": 14},
            "2": {"resolution": [640, 512], "count": 9},
        }
    },
    "ss_dataset_dirs": {
        "circles": {"n_repeats": 2, "img_count": 5},
        "squares": {"n_repeats": 3, "img_count": 4},
        "lines": {"n_repeats": 1, "img_count": 7},
    },
    "ss_tag_frequency": {"circles": {"red": 3, "blue": 2}, "squares": {"square": 4}, "lines": {}},
    "ss_datasets": [
        {
            "is_dreambooth": True,
            "batch_size_per_device": 6,
            "num_train_images": 10,
            "num_reg_images": 12,
            "resolution": [640, 512],
            "enable_bucket": True,
            "min_bucket_reso": 320,
            "max_bucket_reso": 1280,
            "tag_frequency": {"circles": {"red": 3, "blue": 2}, "squares": {"square": 4}},
            "bucket_info": {
                "buckets": {
                    "0": {"resolution": [512, 640], "count": 13},
                    "1": {"resolution": [640, 512], "count": 9},
                }
            },
            "subsets": [
                {"image_dir": "circles", "img_count": 5, "num_repeats": 2, "is_reg": False},
                {"image_dir": "squares", "img_count": 4, "num_repeats": 3, "is_reg": True},
            ],
        },
        {
            "is_dreambooth": True,
            "batch_size_per_device": 8,
            "num_train_images": 7,
            "num_reg_images": 0,
            "resolution": [256, 128],
            "enable_bucket": False,
            "min_bucket_reso": 256,
            "max_bucket_reso": 1024,
            "tag_frequency": {"lines": {}},
            "bucket_info": {
                "buckets": {
                    "0": {"resolution": [256, 128], "count": 6},
                    "1": {"resolution": [512, 640], "count": 1},
                }
            },
            "subsets": [{"image_dir": "lines", "img_count": 7, "num_repeats": 1, "is_reg": False}],
        },
    ],
}


def test_every_value_of_a_run_is_under_its_key():
    found = metadata.lora_metadata(RUN, step=7, epoch=2, rank=24, alpha=18.0)
    assert {key: json.loads(found.pop(key)) for key in TABLES} == TABLES
    assert found == EXPECTED


def test_what_a_run_does_not_have_has_no_key_or_is_empty():
    plain = replace(RUN, text_encoders={}, max_token_length=77, trigger=None, name="Größe")
    found = metadata.lora_metadata(plain, step=7, epoch=2, rank=24, alpha=18.0)
    assert not found.keys() & {"ss_text_encoder_lr", "ss_max_token_length"}
    assert (found["modelspec.trigger_phrase"], found["ss_output_name"]) == ("", "Größe")
    tagged = replace(CIRCLES, tags={"größe": 1})
    plain = replace(RUN, datasets=(replace(LARGE, subsets=(tagged,)),))
    found = metadata.lora_metadata(plain, step=7, epoch=2, rank=24, alpha=18.0)
    assert found["ss_tag_frequency"] == '{"circles": {"größe": 1}}'
