"""Taggers: an ONNX file that gives each tag a probability, and a table of the tags. The WD taggers of SmilingWolf.

What they were trained with, which differs from other models (github.com/SmilingWolf/SW-CV-ModelZoo, and the app that
its models link to): the whole image on a white square, not cropped; blue, green, red in this order; numbers from 0 to
255, not scaled; the outputs are probabilities already. Underscores become blanks, but not in faces such as ^_^.
Brackets stay as they are: the backslashes before them that prompts have in ComfyUI and Forge are the syntax of those
programs, which take them out before the text encoder.

Letters: B images, S the side of the square, T tags.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.captioning.store import Made
from trainer.spec.errors import SettingsError
from trainer.spec.rules.captioners import ONNX, SUBJECT, TAGS
from trainer.storage.read import read_regular

GENERAL, CHARACTER = "0", "4"  # values of the column category; 9 are ratings, which describe no image
GENERAL_THRESHOLD, CHARACTER_THRESHOLD = 0.35, 0.85
LARGEST_TABLE = 1 << 24  # bytes
LARGEST_MODEL = 1 << 31  # bytes: protobuf takes no more
LARGEST_SIDE = 2048
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}  # of pixels; 255 is exact in both
# Tags in which an underscore is part of a face.
KAOMOJI = frozenset(
    (
        *("0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o"),
        *("@_@", "^_^", "o_o", "u_u", "x_x", "|_|", "||_||"),
    )
)


@dataclass(frozen=True)
class Tag:
    """A tag as a caption has it, and its category."""

    text: str
    category: str


def read_tags(path: Path) -> list[Tag]:
    """The table of a tagger, in the order of its outputs. Raises SettingsError."""
    try:
        text = read_regular(path, limit=LARGEST_TABLE).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise SettingsError(f"{path} cannot be read: {problem}.") from problem
    tags = []
    for row in rows:
        name, category = row.get("name"), row.get("category")
        if not name or category is None:
            raise SettingsError(f"{path} is no table of tags: it needs the columns name and category.")
        tags.append(Tag(name if name in KAOMOJI else name.replace("_", " "), category.strip()))
    return tags


def square(image: Image.Image, side: int) -> np.ndarray:
    """The image (RGB) on a white square, scaled to `side`: (S, S, 3) in BGR, 0 to 255."""
    longest = max(image.size)
    padded = Image.new("RGB", (longest, longest), "white")
    padded.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    if longest != side:
        padded = padded.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(padded, dtype=np.float32)[..., ::-1]


def caption(tags: Sequence[Tag], probabilities_T: np.ndarray, *, prompt: str, left_out: Collection[str]) -> str:
    """The tags above their thresholds with commas between them: characters, then what is seen, the surest first.

    With the prompt `subject`, a trigger word stands for the character, so that no name of one is given.
    """
    thresholds = {GENERAL: GENERAL_THRESHOLD, CHARACTER: CHARACTER_THRESHOLD}
    if prompt == SUBJECT:
        del thresholds[CHARACTER]
    chosen: dict[str, list[tuple[float, str]]] = {CHARACTER: [], GENERAL: []}
    for tag, probability in zip(tags, probabilities_T.tolist(), strict=True):
        threshold = thresholds.get(tag.category)
        if threshold is not None and probability > threshold and tag.text.lower() not in left_out:
            chosen[tag.category].append((probability, tag.text))
    texts = []
    for category in (CHARACTER, GENERAL):
        texts += [text for _, text in sorted(chosen[category], key=lambda found: -found[0])]
    return ", ".join(texts)


class Tagger:
    """A loaded tagger. Raises SettingsError for files that are none."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        self.tags = read_tags(folder / TAGS)
        self._path = folder / ONNX
        self._session, self._input = _open(self._path, threads=threads)
        self.side = int(self._input.shape[1])
        self._type = TYPES[self._input.type]

    def probabilities(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Of each tag for each image: (B, T)."""
        pixels_BSS3 = np.stack([square(image, self.side) for image in images]).astype(self._type)
        size = len(images)
        if self._input.shape[0] == 1:  # exported for one image at a time
            size = 1
        answers = []
        for start in range(0, len(images), size):
            answers.append(self._run(pixels_BSS3[start : start + size]))
        found_BT = np.concatenate(answers)
        if found_BT.shape != (len(images), len(self.tags)):
            raise SettingsError(
                f"{ONNX} gives {found_BT.shape[-1]} numbers for an image, and {TAGS} has {len(self.tags)} tags: these "
                "files do not belong together."
            )
        return np.asarray(found_BT, dtype=np.float64)

    def _run(self, pixels_BSS3: np.ndarray) -> np.ndarray:
        try:
            (found,) = self._session.run(None, {self._input.name: pixels_BSS3})
        except _errors() as problem:
            raise SettingsError(f"{self._path}: onnxruntime cannot run it: {str(problem)[:200]}") from problem
        if found.ndim != 2 or len(found) != len(pixels_BSS3):
            raise SettingsError(
                f"{self._path} gives {list(found.shape)} for {len(pixels_BSS3)} images; a tagger gives a number for "
                "each tag of each image. Take one of SmilingWolf's."
            )
        return np.asarray(found)

    def captions(
        self, images: Sequence[Image.Image], model: str, *, prompt: str, left_out: Collection[str]
    ) -> list[Made]:
        """The tags of each image. `left_out`: tags that are not given, in small letters."""
        answers = []
        for probabilities_T in self.probabilities(images):
            text = caption(self.tags, probabilities_T, prompt=prompt, left_out=left_out)
            answers.append(Made(text, model, "" if text else "no tag is likely enough"))
        return answers


def _open(path: Path, *, threads: int) -> tuple[Any, Any]:
    """A session, and its input, as the library describes it: name, shape, type."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    try:
        # The bytes and not the path: so that no file can be named from inside the model.
        session = onnxruntime.InferenceSession(
            read_regular(path, limit=LARGEST_MODEL), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except _errors() as problem:
        raise SettingsError(f"{path} is no model that onnxruntime reads: {str(problem)[:200]}") from problem
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shape = inputs[0].shape if inputs else []
    is_square = len(shape) == 4 and shape[3] == 3 and isinstance(shape[1], int) and shape[1] == shape[2]
    if len(inputs) != 1 or len(outputs) != 1 or not is_square or not 0 < shape[1] <= LARGEST_SIDE:
        raise SettingsError(
            f"{path} reads {[found.shape for found in inputs]}; a tagger reads images as [number, side, side, 3] and "
            "gives one output. Take one of SmilingWolf's."
        )
    if isinstance(shape[0], int) and shape[0] != 1:
        raise SettingsError(
            f"{path} reads {shape[0]} images at once, no more and no fewer. Export it for one, or for any number."
        )
    if inputs[0].type not in TYPES:
        raise SettingsError(f"{path} reads {inputs[0].type}. Allowed: {', '.join(TYPES)}. Take one of SmilingWolf's.")
    return session, inputs[0]


def _errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises for a file that is no model; its errors have no class in common."""
    from onnxruntime.capi import onnxruntime_pybind11_state as library

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
    return (OSError, *(getattr(library, name) for name in names))
