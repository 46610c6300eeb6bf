"""Which size an image is trained at."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.buckets import _nearest_crop, bucket_sizes, fit, nearest
from trainer.spec.errors import SettingsError
from trainer.spec.plan import Dataset

SIDE = st.integers(1, 12_000)
RESOLUTION = st.tuples(st.integers(64, 1536), st.integers(64, 1536))
STEP = st.sampled_from([8, 16, 32, 64])


def dataset(resolution=(512, 512), **keys) -> Dataset:
    return Dataset((), resolution, enable_bucket=keys.pop("enable_bucket", True), **keys)


def sizes(resolution=(512, 512), smallest=256, largest=1024, step=64):
    return bucket_sizes(resolution, smallest=smallest, largest=largest, step=step)


def test_the_sizes_at_512():
    assert sizes() == (
        (256, 832),
        (256, 896),
        (256, 960),
        (256, 1024),
        (320, 704),
        (320, 768),
        (384, 640),
        (448, 576),
        (512, 512),
        (576, 448),
        (640, 384),
        (704, 320),
        (768, 320),
        (832, 256),
        (896, 256),
        (960, 256),
        (1024, 256),
    )


def test_the_resolution_itself_is_a_size():
    assert (832, 1216) in sizes((832, 1216))
    assert sizes((128, 128)) == ((128, 128),)  # although sides begin at 256


def test_limits_move_outwards_to_multiples_of_the_step():
    assert sizes(smallest=300, largest=800) == sizes(smallest=256, largest=832)


def test_a_step_above_the_resolution_is_refused():
    with pytest.raises(SettingsError, match="bucket_reso_steps 64 is larger than the resolution"):
        sizes((32, 32))


@given(RESOLUTION, st.integers(64, 512), st.integers(512, 2048), STEP)
def test_sizes_are_multiples_of_the_step_within_the_area_and_the_limits(resolution, smallest, largest, step):
    for width, height in sizes(resolution, smallest, largest, step):
        assert width % step == height % step == 0
        assert 0 < width * height <= resolution[0] * resolution[1]
        assert max(width, height) < max(largest, *resolution) + step


@given(SIDE, SIDE, RESOLUTION, STEP)
def test_the_nearest_aspect_ratio_is_chosen(width, height, resolution, step):
    options = sizes(resolution, step=step)
    chosen = nearest((width, height), options)
    best = min(abs(w / h - width / height) for w, h in options)
    assert (width, height) == chosen or abs(chosen[0] / chosen[1] - width / height) == best


def covers(cut, image) -> bool:
    """Both sides reach the bucket, at least one of them just so, and the shape stays as it was up to a pixel."""
    (sw, sh), (bw, bh) = cut.scaled, cut.size
    just = sw == bw or sh == bh
    same = abs(sw - sh * image[0] / image[1]) <= max(1, image[0] / image[1]) or sw == bw
    return sw >= bw and sh >= bh and just and same


@given(SIDE, SIDE, RESOLUTION, STEP)
def test_an_image_is_scaled_to_just_cover_its_bucket(width, height, resolution, step):
    cut = fit((width, height), dataset(resolution, bucket_reso_steps=step))
    assert cut.size in sizes(resolution, step=step)
    assert covers(cut, (width, height))


@given(SIDE, SIDE, RESOLUTION)
def test_without_buckets_everything_covers_the_resolution(width, height, resolution):
    cut = fit((width, height), dataset(resolution, enable_bucket=False))
    assert cut.size == resolution and covers(cut, (width, height))


@given(SIDE, SIDE, RESOLUTION)
def test_both_sides_grow_by_one_factor_rounded_to_the_nearest_pixel(width, height, resolution):
    """In exact fractions: the larger factor of the two, halves up."""
    cut = fit((width, height), dataset(resolution, enable_bucket=False))
    factor = max(Fraction(resolution[0], width), Fraction(resolution[1], height))
    assert cut.scaled == tuple(math.floor(side * factor + Fraction(1, 2)) for side in (width, height))


@given(SIDE, SIDE, RESOLUTION, STEP)
def test_no_upscale_never_enlarges(width, height, resolution, step):
    cut = fit((width, height), dataset(resolution, bucket_no_upscale=True, bucket_reso_steps=step))
    area = math.prod(resolution)
    if cut is None:  # only what leaves less than a step of one side
        scale = min(1.0, math.sqrt(area / (width * height)))
        assert min(width, height) * scale < 2 * step
        return
    (sw, sh), (bw, bh) = cut.scaled, cut.size
    assert bw <= sw <= width and bh <= sh <= height
    assert bw % step == bh % step == 0 and bw * bh <= area
    assert sw - bw < step and sh - bh < step
    if width * height <= area:
        assert (sw, sh) == (width, height)


def test_no_upscale_by_example():
    keys = {"bucket_no_upscale": True}
    small = fit((500, 333), dataset(**keys))
    assert (small.scaled, small.size) == ((500, 333), (448, 320))
    large = fit((4000, 3000), dataset(**keys))
    assert (large.scaled, large.size) == ((512, 384), (512, 384))
    assert fit((60, 500), dataset(**keys)) is None


def test_real_shapes():
    for image, size in {
        (4032, 3024): (576, 448),
        (3024, 4032): (448, 576),
        (1920, 1080): (640, 384),
        (1000, 1000): (512, 512),
        (300, 3000): (256, 1024),
    }.items():
        assert fit(image, dataset()).size == size


@pytest.mark.parametrize(("image", "scaled"), [((1717, 2864), (384, 641)), ((3032, 1010), (864, 288))])
def test_where_both_sides_may_meet_as_well_the_width_does(image, scaled):
    """The crop is the same either way, and has the same aspect ratio; only the scale differs, by a pixel."""
    found = fit(image, dataset(bucket_no_upscale=True, bucket_reso_steps=32))
    assert found.scaled == scaled


@pytest.mark.parametrize(
    ("image", "options", "chosen"),
    [
        ((300, 100), [(161, 57), (170, 58)], (168, 56)),  # 2.86 and 3, of 3
        ((300, 100), [(170, 58), (161, 57)], (168, 56)),
        ((100, 300), [(57, 161), (58, 170)], (56, 168)),
        ((300, 200), [(120, 56), (72, 56)], (72, 56)),  # 2.14 and 1.29, of 1.5: also where the other is larger
        ((100, 100), [(16, 16), (32, 32), (24, 24)], (32, 32)),  # all of one aspect ratio: the largest
        ((100, 100), [(104, 104), (96, 88)], (96, 88)),  # 104 × 104 is above the area
        ((100, 100), [(7, 90), (80, 7)], None),  # less than a step
    ],
)
def test_of_two_crops_the_one_nearest_to_the_images_aspect_ratio_is_taken(image, options, chosen):
    found = _nearest_crop(options, image, step=8, area=10_000)
    assert (found and found.size) == chosen
    assert found is None or (found.scaled in options and found.scaled[0] // 8 * 8 == chosen[0])
