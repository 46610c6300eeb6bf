"""What a scan sees in an image: near-duplicates, blur, black bars; and the lines that say it."""

import io
import random

import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from trainer.data import decode
from trainer.data.hygiene.looks import LEAST_BITS, look
from trainer.data.hygiene.remarks import ALIKE_BITS, BLURRED, near_duplicates
from trainer.data.records import ImageRecord
from trainer.data.scan import scan
from trainer.spec.plan import DataPlan, Dataset, Source, Subset


def scene(seed: int, size: tuple[int, int] = (1280, 960)) -> Image.Image:
    """Shapes of all sizes with fine texture, as a photograph has both."""
    draw_from = random.Random(seed)
    image = Image.new("RGB", size, tuple(draw_from.randrange(60, 200) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(200):
        x, y = draw_from.randrange(size[0]), draw_from.randrange(size[1])
        w = draw_from.choice((4, 10, 30, 120, 300))
        pen.ellipse((x, y, x + w, y + w * 0.7), tuple(draw_from.randrange(256) for _ in range(3)))
    return image


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def seen(image: Image.Image, **options):
    """As a scan sees a JPEG of it, which is decoded at a part of its size."""
    return decode.inspect(jpeg(image, **options)).looks


def apart(a: Image.Image, b: Image.Image) -> int:
    return (seen(a).hash ^ seen(b).hash).bit_count()


@pytest.mark.parametrize(
    "changed",
    [
        lambda image: image.resize((500, 375)),
        lambda image: Image.open(io.BytesIO(jpeg(image, 40))),
        lambda image: ImageEnhance.Brightness(image).enhance(0.85),
        lambda image: image.crop((6, 6, 1274, 954)),
    ],
    ids=["smaller", "compressed", "darker", "trimmed"],
)
@pytest.mark.parametrize("seed", range(5))
def test_a_changed_copy_looks_alike(changed, seed):
    assert apart(scene(seed), changed(scene(seed))) <= ALIKE_BITS


def test_different_images_do_not_look_alike():
    distances = [apart(scene(a), scene(b)) for a in range(8) for b in range(a)]
    assert min(distances) > 3 * ALIKE_BITS


def test_an_even_image_has_no_hash_and_no_sharpness():
    looks = look(Image.new("RGB", (300, 200), "teal"))
    assert looks.hash is None and looks.sharpness is None and not looks.has_bars
    assert LEAST_BITS > 0 and look(Image.new("RGB", (4, 4))) is None


@pytest.mark.parametrize("seed", range(4))
def test_blur_is_seen_and_a_sharp_part_is_enough(seed):
    image = scene(seed)
    assert seen(image).sharpness > 3 * BLURRED
    assert seen(image.filter(ImageFilter.GaussianBlur(6))).sharpness < BLURRED
    soft = image.filter(ImageFilter.GaussianBlur(12))
    soft.paste(image.crop((400, 300, 900, 700)), (400, 300))  # a sharp subject before a soft background
    assert seen(soft).sharpness > BLURRED


@pytest.mark.parametrize("box", [(0, 120), (160, 0)])
def test_black_bars_at_two_sides_are_seen(box):
    image = Image.new("RGB", (1280, 960))
    image.paste(scene(1).resize((1280 - 2 * box[0], 960 - 2 * box[1])), box)
    assert seen(image).has_bars


def test_no_bars_are_a_frame_one_dark_side_or_a_night():
    framed = Image.new("RGB", (1280, 960))
    framed.paste(scene(1).resize((900, 600)), (190, 180))
    one = scene(1)
    one.paste((0, 0, 0), (0, 0, 1280, 100))
    night = ImageEnhance.Brightness(scene(1)).enhance(0.05)
    assert not seen(scene(1)).has_bars and not seen(framed).has_bars
    assert not seen(one).has_bars and not seen(night).has_bars


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "F"])
def test_every_mode_can_be_looked_at(mode):
    image = scene(2, (64, 48)).convert("L").convert(mode) if mode in ("I;16",) else scene(2, (64, 48)).convert(mode)
    if mode == "F":
        image = image.point(lambda value: value / 255)
    out = io.BytesIO()
    image.save(out, "TIFF")
    assert decode.inspect(out.getvalue())[:2] == (64, 48)


def record(name: str, sha256: str) -> ImageRecord:
    return ImageRecord(name, None, sha256.encode().hex(), 100, 100, 0, 0, None)


def test_each_near_duplicate_is_named_once_and_the_far_ones_are_not():
    base = 0x0F0F_3C3C_A5A5_9669
    hashes = {"a": base, "b": base ^ 0b1011, "c": base ^ (0b11111 << 20), "d": base ^ (0b1 << 63), "e": None}
    image = look(scene(0))
    looks = {name: image._replace(hash=bits) for name, bits in hashes.items()} | {"same": image._replace(hash=base)}
    images = [record(name, name) for name in hashes] + [record("same", "a")]
    assert list(near_duplicates(images, looks)) == [("b", "a"), ("d", "a")]


def test_a_scan_says_each_in_one_line_and_uses_all_of_them(tmp_path):
    scene(1).save(tmp_path / "a.jpg")
    scene(1).resize((640, 480)).save(tmp_path / "b.jpg")
    scene(2).filter(ImageFilter.GaussianBlur(9)).save(tmp_path / "soft.jpg")
    scene(3, (300, 225)).save(tmp_path / "tiny.jpg")
    barred = Image.new("RGB", (1280, 960))
    barred.paste(scene(4).resize((1280, 700)), (0, 130))
    barred.save(tmp_path / "wide.jpg")
    subset = Subset(Source("folder", str(tmp_path), path=str(tmp_path)))
    found = scan(DataPlan((Dataset((subset,), (1024, 1024)),)), cpu_workers=0)
    report = found.report()
    assert len(found.images) == 5 and not found.skipped
    assert "1 near-duplicate, all used: b.jpg of a.jpg" in report
    assert "1 image blurred everywhere, used all the same: soft.jpg" in report
    assert "1 image with black bars, which are learnt too: wide.jpg" in report
    assert "2 images enlarged more than 2 times: b.jpg (640x480), tiny.jpg (300x225)" in report
