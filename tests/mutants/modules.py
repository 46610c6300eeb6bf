"""Which modules get faults, and which tests are to notice them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TRAINING = ("trainer/training",)
ENGINE = ("trainer/engine", "trainer/training/test_loop.py", "trainer/spec/test_memory_model.py")
FAMILIES = (
    "trainer/families",
    "trainer/training/test_loop.py",
    "trainer/training/test_text_encoders.py",
    "trainer/engine/test_encoders.py",
    "trainer/base_model/test_single_file.py",
)
PLANNING = ("entrypoint/planning", "trainer/spec", "entrypoint/dataset_config/test_manifest.py")
STORAGE = ("trainer/storage", "trainer/checkpoints", "trainer/data", "entrypoint/planning")

# Modules (a folder stands for all in it) → the tests of which those that call the changed function run.
MODULES: dict[str, tuple[str, ...]] = {
    "trainer/training": (*TRAINING, "trainer/checkpoints"),
    "trainer/checkpoints": ("trainer/checkpoints", "trainer/storage"),
    "trainer/data/identity.py": ("trainer/data", "trainer/storage", "trainer/checkpoints"),
    "trainer/data/cache.py": ("trainer/data",),
    "trainer/data/buckets.py": ("trainer/data", "entrypoint/planning"),
    "trainer/data/epochs.py": ("trainer/data", "entrypoint/planning"),
    "trainer/data/batches.py": ("trainer/data", "trainer/training"),
    "trainer/storage/digests.py": STORAGE,
    "trainer/storage/run_records.py": STORAGE,
    "trainer/storage/choose_run.py": STORAGE,
    "trainer/storage/atomic.py": STORAGE,
    "trainer/spec/memory_model.py": (*PLANNING, "trainer/engine/memory"),
    "trainer/spec/strategies.py": (*PLANNING, "trainer/engine"),
    "trainer/spec/plan.py": (*PLANNING, "trainer/storage", "trainer/checkpoints"),
    "trainer/spec/values.py": (*PLANNING, "entrypoint/settings"),
    "trainer/spec/rules": (*PLANNING, "trainer/storage", "trainer/checkpoints", "trainer/data"),
    "trainer/lora_files/write.py": ("trainer/lora_files",),
    "trainer/lora_files/convert.py": ("trainer/lora_files",),
    "trainer/lora_files/metadata.py": ("trainer/lora_files",),
    "trainer/lora_files/weights.py": ("trainer/lora_files", "trainer/engine"),
    "trainer/engine/adapters.py": (*ENGINE, "trainer/lora_files"),
    "trainer/engine/rope.py": (*ENGINE, "trainer/families"),
    "trainer/engine/flat_parameters.py": (*ENGINE, "trainer/training"),
    "trainer/engine/quantization": ENGINE,
    "trainer/families/flux.py": FAMILIES,
    "trainer/families/flux2.py": FAMILIES,
    "trainer/families/sd3.py": FAMILIES,
    "trainer/families/sdxl.py": FAMILIES,
    "trainer/families/z_image.py": FAMILIES,
    "trainer/families/qwen_image.py": FAMILIES,
    "trainer/families/krea2.py": FAMILIES,
    "trainer/families/qwen_vae.py": FAMILIES,
    "entrypoint/planning/plan.py": (*PLANNING, "entrypoint/settings"),
    "entrypoint/planning/engine_choice.py": PLANNING,
}


def module_files() -> dict[str, tuple[str, ...]]:
    """Each module's path → its test files, as paths below the repository's root. Packages' `__init__` that only say
    what is in them have no faults.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, tests in MODULES.items():
        path = ROOT / name
        for module in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            found[module.relative_to(ROOT).as_posix()] = _files(tests)
    return found


def _files(names: tuple[str, ...]) -> tuple[str, ...]:
    files: set[Path] = set()
    for name in names:
        path = ROOT / "tests" / name
        files |= set(path.rglob("test_*.py")) if path.is_dir() else {path}
    return tuple(sorted(path.relative_to(ROOT).as_posix() for path in files))
