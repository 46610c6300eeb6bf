"""Made-up machines, a time, and models to plan for: a miniature, one that is none, and the sizes of a made-up one."""

from datetime import UTC, datetime

from entrypoint.system.hardware import Hardware
from trainer.spec.family import Footprint, base_models

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CPU = Hardware("cpu", "x86_64", 32.0, 0, "", 32.0, 8)
LARGE_GPU = Hardware("nvidia", "9.0", 139.0, 1, "550.1", 500.0, 32)
SMALL_GPU = Hardware("nvidia", "8.9", 24.0, 1, "550.1", 64.0, 16)
HOME = Hardware("nvidia", "8.9", 8.0, 1, "580.1", 32.0, 8)
MINI = min(name for name, (_, model) in base_models().items() if model.files_gib == 0)
FULL = min(name for name, (_, model) in base_models().items() if model.files_gib > 0)
GIB = 2**30
# Sizes in round numbers, so that a prediction can be added up by hand.
ROUND = Footprint(
    block_weights=8 * GIB,
    other_weights=GIB,
    adapter_weights_per_rank=GIB / 64,
    kohya_weights_per_rank=GIB / 32,
    split_kohya_weights_per_rank=GIB / 16,
    peft_weights_per_rank=GIB / 64,
    region_count=10,
    text_tokens=512,
    caption_values=512 * 4096,
    latent_channels=16,
    saved_gib={"none": 4.0, "products": 2.0, "attention": 1.0, "all": 0.5, "host": 0.25},
    working_gib=0.125,
    largest_region_weights=GIB,
    fp8_weights=6 * GIB,
    encoder_weights=3 * GIB,
    hidden_size=1280,
    capture_gib=2.0,
    unfused_factor=1.5,
)
