"""Images as a captioning model takes them: transformers' own image processors, with values that were checked.

`preprocessor_config.json` says sizes and colours; its class is one of those that are known, in the variants that need
no torchvision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.base_model import configs
from trainer.spec.errors import SettingsError
from trainer.spec.rules.captioners import FLORENCE2, PREPROCESSOR, PROCESSOR, QWEN3_VL
from trainer.spec.values import show

# The name in the file, without endings such as Fast → transformers' class.
CLASSES = {
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "SiglipImageProcessor": "SiglipImageProcessorPil",
    "LlavaImageProcessor": "LlavaImageProcessorPil",
    "Qwen2VLImageProcessor": "Qwen2VLImageProcessorPil",
}
OF_KIND = {FLORENCE2: ("CLIPImageProcessor",), QWEN3_VL: ("Qwen2VLImageProcessor",)}
SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad")
COLOURS = ("image_mean", "image_std")
SIZES = ("size", "crop_size")
PATCHES = ("patch_size", "temporal_patch_size", "merge_size")
LARGEST_SIDE = 2048  # of a size in pixels
# Qwen3-VL makes a token of each 32 × 32 pixels. A megapixel shows what a caption names, and costs 1,024 tokens.
MOST_PIXELS = 1 << 20
LEAST_PIXELS = 1 << 16


def load_image_processor(folder: Path, kind: str) -> Any:
    """The image processor of a model. Raises SettingsError for one that is not known."""
    try:
        values = _read(folder)
        name = str(values.get("image_processor_type", OF_KIND.get(kind, ("",))[0])).removesuffix("Fast")
        allowed = OF_KIND.get(kind, ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor"))
        if name not in allowed:
            raise ValueError(f"says image_processor_type={show(name)}; allowed is {' or '.join(allowed)}")
        arguments = _checked(values, kind)
    except ValueError as problem:
        raise SettingsError(f"{folder}: {PREPROCESSOR} {problem}. Fix: take another model.") from problem
    import transformers

    return getattr(transformers, CLASSES[name])(**arguments)


def _read(folder: Path) -> dict[str, Any]:
    """Raises ValueError, as the rest of a sentence about the file."""
    if (folder / PREPROCESSOR).exists():
        return configs.read_object(folder / PREPROCESSOR)
    if (folder / PROCESSOR).exists():  # newer versions write it there
        inner = configs.read_object(folder / PROCESSOR).get("image_processor")
        if isinstance(inner, dict):
            return inner
    raise ValueError("is missing")


def _checked(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The arguments of the image processor. Raises ValueError."""
    arguments: dict[str, Any] = {}
    for key in SWITCHES:
        if isinstance(values.get(key), bool):
            arguments[key] = values[key]
    for key in COLOURS:
        if values.get(key) is not None:
            arguments[key] = _three(key, values[key])
    if values.get("resample") is not None:
        arguments["resample"] = _whole("resample", values["resample"], 0, 5)
    for key in PATCHES:
        if values.get(key) is not None:
            arguments[key] = _whole(key, values[key], 1, 64)
    if kind == QWEN3_VL:
        arguments["size"] = {"shortest_edge": LEAST_PIXELS, "longest_edge": MOST_PIXELS}
        return arguments
    for key in SIZES:
        if values.get(key) is not None:
            arguments[key] = _size(key, values[key])
    return arguments


def _size(key: str, value: Any) -> dict[str, int]:
    if isinstance(value, int):
        return {"height": _whole(key, value, 1, LARGEST_SIDE), "width": value}
    if not isinstance(value, dict) or set(value) not in ({"height", "width"}, {"shortest_edge"}):
        raise ValueError(f"says {key}={show(value)}; allowed is a height and a width")
    return {name: _whole(key, side, 1, LARGEST_SIDE) for name, side in value.items()}


def _whole(key: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"says {key}={show(value)}; allowed is {low} to {high}")
    return value


def _three(key: str, value: Any) -> list[float]:
    """A number for each of three colours."""
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 3 or not all(type(n) in (int, float) and math.isfinite(n) and 0 <= n <= 255 for n in numbers):
        raise ValueError(f"says {key}={show(value)}; allowed are three numbers")
    if key == "image_std" and min(numbers) <= 0:
        raise ValueError(f"says {key}={show(value)}; allowed are numbers above 0")
    return [float(number) for number in numbers]
