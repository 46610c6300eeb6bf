"""The images and captions: where they come from, and what overrides dataset.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# ruff: noqa: RUF009 (`row` only makes a dataclasses.field)
from entrypoint import DEFAULT_CACHE_PATH
from entrypoint.settings.row import LARGEST_COUNT, row

FROM_DATASET_CONFIG = "dataset.json's"  # what applies where an overriding variable is not set


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where images and captions come from, and values that override dataset.json. None: not set."""

    dataset_name: str | None = row(
        "DATASET_NAME",
        "text",
        meaning="Hub dataset, folder, .zip or .tar archive (path or address), or folder of a bucket (s3, gs, az, "
        "hf://buckets); needed unless DATASET_CONFIG names sources",
    )
    dataset_config: str | None = row(
        "DATASET_CONFIG",
        "text",
        meaning="dataset.json, .yaml or .toml: path, URL, or the text itself",
        if_unset="the dataset.json of this program",
    )
    dataset_revision: str | None = row(
        "DATASET_REVISION", "text", meaning="branch, tag or commit of the Hub dataset DATASET_NAME"
    )
    dataset_split: str | None = row("DATASET_SPLIT", "text", meaning="split of Hub datasets", if_unset="train")
    dataset_subset: str | None = row(
        "DATASET_SUBSET", "text", meaning="subset (configuration) of Hub datasets", if_unset="the default one"
    )
    image_column: str | None = row(
        "IMAGE_COLUMN", "text", meaning="column of the images, in a Hub dataset or a metadata file", if_unset="detected"
    )
    caption_column: str | None = row(
        "CAPTION_COLUMN", "text", meaning="column of the captions, likewise", if_unset="detected"
    )
    trigger_word: str | None = row(
        "TRIGGER_WORD",
        "text",
        meaning="put before every caption or in the place of [trigger], and before this program's own prompts",
    )
    caption_with: str | None = row(
        "CAPTION_WITH",
        "text",
        meaning="model that captions images which have no caption: florence-2, qwen3-vl, joycaption, wd, another Hub "
        "repository of their kinds (owner/name@revision), or a folder",
    )
    caption_prompt: str | None = row(
        "CAPTION_PROMPT",
        "text",
        meaning="what it is asked: subject, style, plain, or a text in which {trigger} stands for the trigger word; of "
        "a tagger, tags that it leaves out",
        if_unset="subject with a trigger word, else plain",
    )
    caption_max_tokens: int | None = row(
        "CAPTION_MAX_TOKENS",
        "integer",
        meaning="tokens of a caption at most",
        low=8,
        high=1024,
        if_unset="what the text encoder reads, up to 256",
    )
    caption_overwrite: bool = row(
        "CAPTION_OVERWRITE", "switch", default="false", meaning="caption also images that have a caption"
    )
    caption_write: bool = row(
        "CAPTION_WRITE", "switch", default="false", meaning="write these captions beside the images of folders as well"
    )
    strict_dataset: bool = row(
        "STRICT_DATASET", "switch", default="false", meaning="stop at an unusable image instead of skipping it"
    )
    cache_path: Path = row("CACHE_PATH", "path", default=DEFAULT_CACHE_PATH, meaning="where encoded images are kept")
    max_cache_gib: float | None = row(
        "MAX_CACHE_GIB",
        "number",
        meaning="GiB of encoded images, and of shards from a bucket, at a time; more come and go while the job trains",
        above=0,
        high=1_000_000,
        if_unset="what is free at CACHE_PATH",
    )
    batch_size: int | None = row(
        "PARAMS_BATCH_SIZE",
        "auto_integer",
        meaning="images at once; auto: fastest",
        low=1,
        high=4096,
        if_unset=FROM_DATASET_CONFIG,
    )
    resolution: tuple[int, int] | None = row(
        "PARAMS_RESOLUTION",
        "size",
        meaning="training area in pixels: side, or WIDTHxHEIGHT",
        low=16,
        high=8192,
        if_unset=FROM_DATASET_CONFIG,
    )
    num_repeats: int | None = row(
        "PARAMS_NUM_REPEATS",
        "integer",
        meaning="times that each image is seen in an epoch",
        low=1,
        high=LARGEST_COUNT,
        if_unset=FROM_DATASET_CONFIG,
    )
    caption_dropout_rate: float | None = row(
        "PARAMS_CAPTION_DROPOUT_RATE",
        "number",
        meaning="share of empty captions",
        low=0,
        high=1,
        if_unset=FROM_DATASET_CONFIG,
    )
