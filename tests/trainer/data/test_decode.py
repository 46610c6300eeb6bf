"""Whatever a file holds becomes upright 8-bit sRGB, or a named reason."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from trainer.data import decode
from trainer.data.decode import UnusableImageError, inspect, open_mask, open_upright, resize_crop, vary_colour

ROOT = Path(__file__).parents[3]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def flat(mode: str, colour) -> Image.Image:
    return Image.new(mode, (8, 6), colour)


def colour_of(data: bytes) -> tuple[int, ...]:
    """The one colour of a flat image."""
    pixels = np.asarray(open_upright(data)[0]).reshape(-1, 3)
    assert (pixels == pixels[0]).all()
    return tuple(int(v) for v in pixels[0])


def near(colour, expected, by: int = 1) -> bool:
    return all(abs(a - b) <= by for a, b in zip(colour, expected, strict=True))


def reason(data: bytes) -> str:
    """Why `data` is refused: the scan and the rendering must agree."""
    with pytest.raises(UnusableImageError) as opened:
        open_upright(data)
    with pytest.raises(UnusableImageError) as inspected:
        inspect(data)
    assert str(opened.value) == str(inspected.value)
    return str(opened.value)


# ---- orientation

INVERSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_the_eight_orientations_give_the_same_picture(draw, kind):
    upright = draw(48, 32)
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(kind, {})
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright.transpose(INVERSE[orientation]) if orientation > 1 else upright
        data = encoded(stored, kind, exif=exif.tobytes(), **options)
        got = np.asarray(open_upright(data)[0]).astype(int)
        assert got.shape == (32, 48, 3)
        error = np.abs(got - np.asarray(upright))
        assert error.mean() < 2 if kind == "JPEG" else error.max() == 0, orientation
        assert inspect(data)[:2] == (48, 32)


def test_an_impossible_orientation_is_upright(draw):
    exif = Image.Exif()
    exif[0x0112] = 99
    assert inspect(encoded(draw(20, 10), exif=exif.tobytes()))[:3] == (20, 10, False)


def test_alpha_is_turned_with_the_colours():
    image = Image.new("RGBA", (20, 10), (10, 20, 30, 255))
    image.putpixel((0, 0), (10, 20, 30, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: the first pixel belongs at the right
    colours, alpha = open_upright(encoded(image, exif=exif.tobytes()))
    assert colours.size == alpha.size == (10, 20)
    assert alpha.getpixel((9, 0)) == 0 and colours.getpixel((9, 0)) == (255, 255, 255)


# ---- kinds of pixels


def test_grey_palette_and_one_bit():
    assert colour_of(encoded(flat("L", 77))) == (77, 77, 77)
    assert colour_of(encoded(flat("1", 1))) == (255, 255, 255)
    palette = flat("P", 3)
    palette.putpalette([0, 0, 0, 1, 1, 1, 2, 2, 2, 200, 100, 50])
    assert colour_of(encoded(palette)) == (200, 100, 50)
    assert colour_of(encoded(palette, "GIF")) == (200, 100, 50)
    assert colour_of(encoded(palette, "BMP")) == (200, 100, 50)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("value", [0, 128, 257, 30000, 65535])
def test_16_bit_grey_is_scaled_not_clipped(kind, value):
    image = Image.fromarray(np.full((6, 8), value, np.uint16))
    assert near(colour_of(encoded(image, kind)), (value / 257,) * 3, by=0.5)


def test_16_bit_rgb_is_scaled():
    assert near(colour_of(png(np.array([30000, 65535, 256], ">u2"), depth=16, kind=2)), (116.7, 255, 1))
    assert near(colour_of(png(np.array([30000, 65535, 256, 65535], ">u2"), depth=16, kind=6)), (116.7, 255, 1))
    assert near(colour_of(png(np.array([30000, 65535], ">u2"), depth=16, kind=4)), (116.7,) * 3)


def png(pixel: np.ndarray, *, depth: int, kind: int, size: tuple[int, int] = (8, 6)) -> bytes:
    """A flat PNG that Pillow cannot write; `kind` is the colour type, `pixel` its samples."""
    row = b"\0" + pixel.tobytes() * size[0]
    header = b"".join(v.to_bytes(4, "big") for v in size) + bytes([depth, kind, 0, 0, 0])
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row * size[1], 9)), (b"IEND", b"")]
    parts = [
        len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big") for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_floats_between_0_and_1_are_scaled_and_others_refused():
    assert near(colour_of(encoded(Image.fromarray(np.full((6, 8), 0.5, np.float32)), "TIFF")), (127.5,) * 3)
    assert reason(encoded(Image.fromarray(np.full((6, 8), 40.0, np.float32)), "TIFF")) == decode.UNKNOWN_RANGE
    assert reason(encoded(Image.fromarray(np.full((6, 8), np.nan, np.float32)), "TIFF")) == decode.UNKNOWN_RANGE
    assert reason(encoded(Image.fromarray(np.full((6, 8), 1 << 20, np.int32)), "TIFF")) == decode.UNKNOWN_RANGE


def test_transparency_is_laid_over_white_and_kept():
    for image in (flat("RGBA", (100, 50, 0, 51)), flat("LA", (100, 51))):
        colours, alpha = open_upright(encoded(image))
        expected = [255 + (v - 255) * 51 / 255 for v in image.convert("RGB").getpixel((0, 0))]
        assert near(colours.getpixel((0, 0)), expected)
        assert alpha.getpixel((0, 0)) == 51
        assert inspect(encoded(image))[2]


def test_a_transparent_palette_entry_is_white():
    palette = Image.new("P", (8, 6), 0)
    palette.putpalette([200, 100, 50, 10, 20, 30])
    palette.putpixel((0, 0), 1)
    colours, alpha = open_upright(encoded(palette, transparency=0))
    assert colours.getpixel((5, 5)) == (255, 255, 255) and alpha.getpixel((5, 5)) == 0
    assert colours.getpixel((0, 0)) == (10, 20, 30) and alpha.getpixel((0, 0)) == 255


def test_a_transparent_colour_of_rgb_is_white():
    image = flat("RGB", (1, 2, 3))
    image.putpixel((0, 0), (9, 9, 9))
    colours, _ = open_upright(encoded(image, transparency=(1, 2, 3)))
    assert colours.getpixel((5, 5)) == (255, 255, 255) and colours.getpixel((0, 0)) == (9, 9, 9)


def test_an_opaque_alpha_channel_is_no_transparency():
    data = encoded(flat("RGBA", (1, 2, 3, 255)))
    assert colour_of(data) == (1, 2, 3)
    assert open_upright(data)[1] is None and inspect(data)[2] is False


def test_nothing_visible_is_refused():
    assert reason(encoded(flat("RGBA", (1, 2, 3, 0)))) == decode.TRANSPARENT


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    options = {"quality": 100} if kind == "JPEG" else {}
    got = colour_of(encoded(flat("CMYK", (0, 255, 255, 0)), kind, **options))
    assert near(got, (255, 0, 0), by=2)
    assert near(colour_of(encoded(flat("CMYK", (51, 0, 0, 102)), kind, **options)), (122, 153, 153), by=2)


def test_ycck_and_grey_jpeg():
    assert near(colour_of(encoded(flat("YCbCr", (128, 128, 128)), "JPEG")), (128, 128, 128))
    assert colour_of(encoded(flat("L", 90), "JPEG", quality=100)) == (90, 90, 90)


# ---- colour profiles


def matrix_profile(*, swap: bool = False, gamma: float | None = None) -> bytes:
    """sRGB's profile with red and green swapped, or with another tone curve: so that the answer is known."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    tags = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    if swap:
        a, b = tags[b"rXYZ"] + 4, tags[b"gXYZ"] + 4
        profile[a : a + 8], profile[b : b + 8] = profile[b : b + 8], profile[a : a + 8]
    if gamma is not None:
        place = len(profile)
        profile += b"curv\0\0\0\0\0\0\0\1" + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
        for tag in (b"rTRC", b"gTRC", b"bTRC"):
            start = tags[tag] + 4
            profile[start : start + 8] = place.to_bytes(4, "big") + (14).to_bytes(4, "big")
        profile[0:4] = len(profile).to_bytes(4, "big")
    return bytes(profile).replace("sRGB built-in".encode("utf-16-be"), "test built-in".encode("utf-16-be"))


def srgb(linear: float) -> float:
    return 255 * (12.92 * linear if linear <= 0.0031308 else 1.055 * linear ** (1 / 2.4) - 0.055)


def test_a_profile_is_converted_to_srgb():
    swapped = matrix_profile(swap=True)
    assert near(colour_of(encoded(flat("RGB", (200, 10, 60)), icc_profile=swapped)), (10, 200, 60))
    curved = matrix_profile(gamma=1.0)
    expected = [srgb(v / 255) for v in (128, 20, 250)]
    assert near(colour_of(encoded(flat("RGB", (128, 20, 250)), icc_profile=curved)), expected)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_a_profile_counts_with_alpha_and_palettes(mode):
    swapped = matrix_profile(swap=True)
    image = flat("RGB", (200, 10, 60))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    got = colour_of(encoded(image, icc_profile=swapped))
    red, green, blue = image.convert("RGB").getpixel((0, 0))
    assert near(got, (green, red, blue))


def test_srgb_and_damaged_profiles_change_nothing():
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (plain, b"no profile at all", plain[:200]):
        assert colour_of(encoded(flat("RGB", (200, 10, 60)), icc_profile=profile)) == (200, 10, 60)


def test_16_bit_grey_keeps_its_value_with_an_rgb_profile():
    image = Image.fromarray(np.full((6, 8), 30000, np.uint16))
    assert near(colour_of(encoded(image, icc_profile=matrix_profile())), (116.7,) * 3)


# ---- refused


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_and_pages_are_refused(draw, kind):
    frames = [draw(30, 20, seed=i) for i in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert reason(data) == decode.ANIMATED


def test_a_single_gif_frame_and_a_stereo_jpeg_are_images(draw):
    assert inspect(encoded(draw(30, 20), "GIF"))[:3] == (30, 20, False)
    stereo = encoded(draw(30, 20), "MPO", save_all=True, append_images=[draw(30, 20, seed=1)])
    assert inspect(stereo)[:3] == (30, 20, False)
    assert open_upright(stereo)[0].size == (30, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_file_cut_short_is_damaged(kind, part):
    rng = np.random.default_rng(0)
    data = encoded(Image.fromarray(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)), kind)
    assert reason(data[: int(len(data) * part)]).startswith("damaged or cut short")


def test_a_progressive_jpeg_cut_short_is_damaged(draw):
    data = encoded(draw(400, 300), "JPEG", progressive=True)
    assert reason(data[: len(data) // 2]).startswith("damaged or cut short")


def test_a_cut_png_is_whole_or_refused(draw):
    data = encoded(draw(20, 10))
    for length in range(1, len(data)):
        try:
            got = open_upright(data[:length])[0]
        except UnusableImageError:
            continue
        assert got.tobytes() == draw(20, 10).tobytes()  # only a checksum or the end mark is missing
        assert length > len(data) - 25


@pytest.mark.filterwarnings("ignore")
def test_flipped_bytes_are_used_or_refused_but_never_raise_anything_else(draw):
    rng = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"):
        whole = np.frombuffer(encoded(draw(60, 40), kind), np.uint8)
        for _ in range(60):
            broken = whole.copy()
            places = rng.integers(0, min(len(whole), 400), 3)
            broken[places] = rng.integers(0, 256, 3)
            for use in (inspect, open_upright):
                try:
                    use(broken.tobytes())
                except UnusableImageError as problem:
                    assert str(problem)


def test_empty_files_and_other_files_are_named():
    assert reason(b"") == decode.EMPTY
    assert reason(b"a caption in the wrong place") == decode.NOT_AN_IMAGE
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == decode.NOT_AN_IMAGE
    assert reason(b"8BPS\0\1" + bytes(60)) == decode.NOT_AN_IMAGE


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UnusableImageError, match="cannot be read: No such file"):
        open_upright(tmp_path / "gone.png")


@pytest.mark.parametrize("side", [12_000, 20_000])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    file = tmp_path / "bomb.png"
    file.write_bytes(bomb(side))
    assert file.stat().st_size < 60_000
    program = (
        "import pathlib, resource, sys\n"
        "from trainer.data.decode import *\n"
        "rise = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = rise()\n"
        "for use in (inspect, open_upright):\n"
        "    try: use(pathlib.Path(sys.argv[1]))\n"
        "    except UnusableImageError as problem: print(problem)\n"
        "print(rise() - before)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert lines[:2] == [decode.TOO_LARGE] * 2
    assert int(lines[2]) < 20_000  # KiB


def bomb(side: int) -> bytes:
    """A one-bit PNG of side × side pixels in some 20 to 50 kB."""
    packer = zlib.compressobj(9)
    row = b"\0" + bytes(side // 8)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    parts = [len(b).to_bytes(4, "big") + n + b + zlib.crc32(n + b).to_bytes(4, "big") for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# ---- size and colour


@pytest.mark.parametrize("interpolation", [None, *decode.INTERPOLATIONS])
@pytest.mark.parametrize("scaled", [(61, 41), (150, 101), (100, 67)])
def test_cutting_computes_what_scaling_and_then_cutting_would(draw, interpolation, scaled):
    image = draw(100, 67)
    options = {"scaled": scaled, "interpolation": interpolation}
    whole = np.asarray(resize_crop(image, offset=(0, 0), size=scaled, **options)).astype(int)
    part = np.asarray(resize_crop(image, offset=(7, 5), size=(48, 32), **options))
    # Just between two pixels these three take the one or the other; neighbours differ by 3 in this image.
    tolerance = 3 if interpolation in ("nearest", "box", "area") else 1
    assert np.abs(part - whole[5:37, 7:55]).max() <= tolerance


def test_shrinking_by_area_is_the_mean_of_what_is_covered():
    row = np.array([[0, 90, 240]], np.uint8)
    shrunk = resize_crop(Image.fromarray(row), scaled=(2, 1), offset=(0, 0), size=(2, 1))
    assert np.asarray(shrunk).tolist() == [[30, 190]]  # (0 + 90/2) / 1.5 and (90/2 + 240) / 1.5


def test_the_default_is_area_down_and_lanczos_up(draw):
    image = draw(100, 67)

    def same(scaled, name):
        options = {"scaled": scaled, "offset": (0, 0), "size": scaled}
        return resize_crop(image, **options) == resize_crop(image, interpolation=name, **options)

    assert same((50, 33), "area") and not same((50, 33), "lanczos")
    assert same((200, 134), "lanczos") and not same((200, 134), "area")


def test_a_long_strip_does_not_become_a_giant():
    strip = Image.new("RGB", (20_000, 2), "red")
    cut = resize_crop(strip, scaled=(2_560_000, 256), offset=(1_000_000, 0), size=(1024, 256))
    assert cut.size == (1024, 256) and cut.getpixel((500, 100)) == (255, 0, 0)


def test_a_grey_mask_is_cut_like_its_image(draw):
    mask = Image.new("L", (40, 20), 0)
    mask.paste(255, (20, 0, 40, 20))
    data = encoded(mask)
    cut = resize_crop(open_mask(data), scaled=(20, 10), offset=(5, 0), size=(10, 10))
    assert cut.mode == "L"
    assert np.asarray(cut)[0].tolist() == [0] * 5 + [255] * 5


def test_colours_vary_by_seed_a_little(draw):
    image = draw(60, 40)
    varied = [vary_colour(image, seed) for seed in range(20)]
    assert all(a == vary_colour(image, seed) for seed, a in enumerate(varied))
    assert len({a.tobytes() for a in varied}) > 10
    assert all(a.size == image.size and a.mode == "RGB" for a in varied)
    grey = Image.new("RGB", (4, 4), (128, 128, 128))
    assert all(near(vary_colour(grey, seed).getpixel((0, 0)), (128,) * 3, by=6) for seed in range(20))
