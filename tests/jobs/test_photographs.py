"""The job on real photographs."""

import json
import shutil

from safetensors import safe_open

from trainer.spec.family import base_models


def test_square_and_five_aspect_ratios_at_the_base_size(job, photographs):
    config = {
        "general": {"resolution": 128, "enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256},
        "datasets": [
            {
                "bucket_reso_steps": 16,
                "batch_size": 2,
                "subsets": [
                    {"image_dir": str(photographs / "dog"), "num_repeats": 2, "flip_aug": True},
                    {"image_dir": str(photographs / "can"), "shuffle_caption": True, "keep_tokens": 1},
                ],
            }
        ],
    }
    code, printed = job.run(DATASET_NAME="", DATASET_CONFIG=json.dumps(config))
    assert code == 0, printed
    assert "11 found, 11 used, 0 skipped" in printed
    with safe_open(job.out / "x.safetensors", "pt") as file:
        header = file.metadata()
    sizes = {tuple(b["resolution"]) for b in json.loads(header["ss_bucket_info"])["buckets"].values()}
    assert (128, 128) in sizes and len(sizes) >= 3
    assert json.loads(header["ss_dataset_dirs"]) == {
        "dog": {"n_repeats": 2, "img_count": 5},
        "can": {"n_repeats": 1, "img_count": 6},
    }


def test_1024_pixels_with_the_real_numbers_of_tokens(job, photographs):
    """4,096 tokens of a square picture and 512 of its caption, as Flux.1 itself is trained."""
    model = job.folder / "model"
    shutil.copytree(base_models()["mini-flux"][1].source, model)
    config = model / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_length": 512, "model_max_length": 512}))
    cache = job.folder / "cache"
    code, printed = job.run(
        DATASET_NAME=str(photographs / "can"),
        MODEL_PATH=str(model),
        CACHE_PATH=str(cache),
        PARAMS_RESOLUTION="1024",
        PARAMS_MAX_STEPS="1",
    )
    assert code == 0, printed
    assert "Encoded 6 of 6 latents" in printed
    assert [row["step"] for row in job.metrics()] == [1]

    def shapes(folder, key):
        for path in (cache / folder).rglob("*.safetensors"):
            with safe_open(path, "pt") as file:
                yield file.get_slice(key).get_shape()

    sizes = {(8 * height, 8 * width) for _, height, width in shapes("latents", "moments")}
    assert (1024, 1024) in sizes and len(sizes) == 6
    assert all(0.85 < height * width / 1024**2 <= 1 for height, width in sizes)
    assert {length for length, _ in shapes("text", "tokens")} == {512}
