"""How many bytes an image takes in the cache, with its captions. Estimates: they do not exist yet."""

from __future__ import annotations

from trainer.spec.family import base_models
from trainer.spec.plan import Dataset, Plan, Subset
from trainer.spec.weight_formats import PRECISIONS

MINIATURE_CHANNELS = 16  # of a miniature's latents, or more than those
LEAST_BYTES = 1 << 30  # of a part of the images that is worth its overhead (`trainer.job.rolling.rolling_cache`)


def bytes_per_image(plan: Plan, dataset: Dataset, subset: Subset) -> int:
    """Of one image of `subset`, in all its views and captions."""
    footprint = base_models()[plan.model.base][1].footprint
    channels = MINIATURE_CHANNELS
    caption_bytes = 0  # of a miniature, which has no footprint and small tokens
    if footprint:
        channels = footprint.latent_channels
        bytes_per_value = 4 if PRECISIONS[plan.engine.precision].dtype == "float32" else 2
        caption_bytes = footprint.caption_values * bytes_per_value
    width, height = dataset.resolution
    latent_bytes = width * height // 64 * 2 * channels * 4  # fp32, whatever the precision
    return latent_bytes * subset.image_variants + caption_bytes * subset.caption_variants
