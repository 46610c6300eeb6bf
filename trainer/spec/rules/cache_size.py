"""How many bytes an image takes in the cache, with its captions. Estimates: they do not exist yet."""

from __future__ import annotations

from trainer.spec.family import base_models
from trainer.spec.plan import Dataset, Plan, Subset
from trainer.spec.weight_formats import PRECISIONS

LATENT_CHANNELS = 16  # of most families
BYTES_PER_CHANNEL = 1 / 8  # of each pixel: mean and deviation in float32 for 8 × 8 pixels, 2 * 4 / 64
# For the largest of the families.
VALUES_PER_TOKEN = 4096  # width of T5-XXL's output
MIN_TOKENS = 77  # CLIP's
LEAST_BYTES = 1 << 30  # of a part of the images that is worth its overhead (`trainer.job.rolling.rolling_cache`)


def bytes_per_image(plan: Plan, dataset: Dataset, subset: Subset, *, channels: int = LATENT_CHANNELS) -> int:
    """Of one image of `subset`, in all its views and captions. `channels`: of the VAE's latents."""
    footprint = base_models()[plan.model.base][1].footprint
    caption_bytes = 0  # of a miniature, which has no footprint and small tokens
    if footprint:
        usual_values = max(footprint.text_tokens, MIN_TOKENS) * VALUES_PER_TOKEN
        bytes_per_value = 4 if PRECISIONS[plan.engine.precision].dtype == "float32" else 2
        caption_bytes = (footprint.caption_values or usual_values) * bytes_per_value
    width, height = dataset.resolution
    latent_bytes = int(width * height * channels * BYTES_PER_CHANNEL)
    return latent_bytes * subset.image_variants + caption_bytes * subset.caption_variants
