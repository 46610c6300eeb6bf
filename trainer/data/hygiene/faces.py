"""Where the faces of an image are, if OpenCV is installed in a version that brings a detector with it (below 5).

The cascade of Viola and Jones (2001) for faces from the front. It misses faces, and sees some where there are none:
enough to look at an image again, and for nothing else.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from PIL import Image

SIDE = 640  # pixels of the longer side of what is looked at
LEAST_FACE = 32  # pixels there
CASCADE = "haarcascade_frontalface_default.xml"
STEP, NEIGHBOURS = 1.1, 6  # each scale is so much larger than the last; so many hits make a face

Face = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the image's sides


def find_faces(grey: Image.Image) -> tuple[Face, ...]:
    """The faces in an image of mode "L"; none without a detector."""
    found = _detector()
    if found is None:
        return ()
    cascade, as_array = found
    if max(grey.size) > SIDE:
        grey = grey.copy()
        grey.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    boxes = cascade.detectMultiScale(as_array(grey), STEP, NEIGHBOURS, minSize=(LEAST_FACE, LEAST_FACE))
    faces: list[Face] = []
    for left, top, width, height in boxes:
        right, bottom = left + width, top + height
        faces.append((left / grey.width, top / grey.height, right / grey.width, bottom / grey.height))
    return tuple(faces)


@functools.cache
def _detector() -> tuple[Any, Any] | None:
    """The cascade, and the function that makes an array of an image; None where OpenCV is not, or has none."""
    try:
        cv2, numpy = importlib.import_module("cv2"), importlib.import_module("numpy")
        cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / CASCADE))
    except (ImportError, AttributeError):
        return None
    cv2.setNumThreads(1)  # images are read by several processes already
    return None if cascade.empty() else (cascade, numpy.asarray)
