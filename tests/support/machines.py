"""Made-up machines, a time, and two models to plan for: a miniature and one that is not."""

from datetime import UTC, datetime

from entrypoint.system.hardware import Hardware
from trainer.spec.family import base_models

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
CPU = Hardware("cpu", "x86_64", 32.0, 0, "", 32.0, 8)
LARGE_GPU = Hardware("nvidia", "9.0", 139.0, 1, "550.1", 500.0, 32)
SMALL_GPU = Hardware("nvidia", "8.9", 24.0, 1, "550.1", 64.0, 16)
HOME = Hardware("nvidia", "8.9", 8.0, 1, "580.1", 32.0, 8)
MINI = min(name for name, (_, model) in base_models().items() if model.files_gib == 0)
FULL = min(name for name, (_, model) in base_models().items() if model.files_gib > 0)
