"""Faces that the crop cuts off: found where OpenCV brings a detector, and said by name."""

import warnings
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFilter

from trainer.data.hygiene.faces import _detector, find_faces
from trainer.data.hygiene.looks import Looks
from trainer.data.hygiene.remarks import remarks
from trainer.data.records import ImageRecord
from trainer.spec.plan import Dataset

if _detector() is None:
    warnings.warn("No OpenCV with a detector is here: finding faces is NOT tested.", stacklevel=1)
needs_detector = pytest.mark.skipif(_detector() is None, reason="pip install 'opencv-python-headless<5'")


def portrait(width, height, x, y, radius):
    """A drawn face from the front around (x, y)."""
    image = Image.new("RGB", (width, height), (120, 140, 160))
    pen = ImageDraw.Draw(image)
    pen.ellipse((x - radius * 0.78, y - radius, x + radius * 0.78, y + radius), (225, 190, 165))
    hair = (x - radius * 0.85, y - radius * 1.15, x + radius * 0.85, y + radius * 0.2)
    pen.pieslice(hair, 180, 360, (60, 40, 30))
    for side in (-1, 1):
        eye_x, eye_y = x + side * radius * 0.33, y - radius * 0.12
        brow = (eye_x - radius * 0.22, eye_y - radius * 0.24, eye_x + radius * 0.22, eye_y - radius * 0.15)
        pen.rectangle(brow, (70, 45, 35))
        for share, colour in ((0.17, (250, 250, 250)), (0.08, (30, 30, 30))):
            eye = (eye_x - radius * share, eye_y - radius * 0.09, eye_x + radius * share, eye_y + radius * 0.09)
            pen.ellipse(eye, colour)
    nose = [(x, y - radius * 0.05), (x - radius * 0.12, y + radius * 0.3), (x + radius * 0.12, y + radius * 0.3)]
    pen.polygon(nose, (200, 155, 130))
    pen.ellipse((x - radius * 0.28, y + radius * 0.45, x + radius * 0.28, y + radius * 0.6), (150, 60, 60))
    return image.filter(ImageFilter.GaussianBlur(radius * 0.03)).convert("L")


@needs_detector
@pytest.mark.parametrize(
    ("width", "height", "x", "y"), [(640, 480, 320, 240), (1800, 1200, 300, 600), (600, 900, 300, 150)]
)
def test_a_face_is_found_where_it_is(width, height, x, y):
    radius = min(width, height) / 5
    (face,) = find_faces(portrait(width, height, x, y, radius))
    left, top, right, bottom = (share * side for share, side in zip(face, (width, height) * 2, strict=True))
    assert left < x < right and top < y < bottom and radius < right - left < 3 * radius


@needs_detector
def test_no_face_is_none():
    assert find_faces(Image.new("L", (640, 480), 128)) == ()


def said_of(face, size, dataset):
    image = ImageRecord("a.png", Path("a.png"), "1" * 64, *size, dataset=0, subset=0, caption=None)
    return remarks([image], {"a.png": Looks(None, None, False, (face,))}, dataset)


SQUARE = Dataset((), (512, 512))
CUT = ["1 image with a face that the crop cuts off: a.png"]


@pytest.mark.parametrize(
    ("face", "size", "expected"),
    [
        ((0.4, 0.1, 0.6, 0.3), (600, 1200), CUT),  # the crop keeps the middle half: 0.25 to 0.75
        ((0.4, 0.3, 0.6, 0.5), (600, 1200), []),
        ((0.4, 0.24, 0.6, 0.44), (600, 1200), []),  # a little of the box is not the face
        ((0.05, 0.4, 0.3, 0.6), (1200, 600), CUT),
        ((0.4, 0.0, 0.6, 0.2), (600, 600), []),
    ],
)
def test_a_face_outside_the_crop_is_said(face, size, expected):
    assert said_of(face, size, SQUARE) == expected


def test_a_bucket_that_fits_keeps_it():
    assert said_of((0.4, 0.0, 0.6, 0.2), (600, 1200), Dataset((), (1024, 1024), enable_bucket=True)) == []
