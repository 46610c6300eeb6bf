"""What identifies an item of the cache: everything that decides its content, each field by itself; and its bytes."""

import dataclasses
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainer.data import cache as caching
from trainer.data.cache import Cache
from trainer.data.records import ImageRecord, View

IMAGE = ImageRecord(
    "a.png", Path("/pictures/a.png"), "1" * 64, 64, 48, 0, 0, "a cat", mask_file=Path("/masks/a.png"),
    mask_sha256="2" * 64,
)  # fmt: skip
VIEW = View((64, 48), (66, 50), (1, 2), flip=True, colour=7, interpolation="lanczos")
CACHE = Cache(Path("/cache"), vae="3" * 64, encoders="4" * 64)
# Fields of an image's record that its latents do not depend on → why.
WITHOUT_EFFECT = {
    "name": "the bytes decide; a renamed image is the same",
    "file": "where the bytes are",
    "width": "follows from the bytes",
    "height": "follows from the bytes",
    "dataset": "decides the view, which is in the key",
    "subset": "decides the view, which is in the key",
    "caption": "has an item of its own",
    "has_alpha": "follows from the bytes",
    "mask_file": "the mask's bytes are in the key",
    "part_of": "where the image is listed",
    "convention": "how often it is repeated",
    "caption_file": "where the caption was read",
    "captioned_by": "the caption has an item of its own",
    "caption_encoding": "how the caption was read; the caption has an item of its own",
    "span": "where the bytes are",
}


def other(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, tuple):
        return (*value[:-1], value[-1] + 1)
    if isinstance(value, Path):
        return Path(f"{value}x")
    return f"x{value}" if value is not None else 1


def each_changed(record):
    """(the field's name, a copy of `record` with another value there) for every field that there is."""
    for field in dataclasses.fields(record):
        yield field.name, dataclasses.replace(record, **{field.name: other(getattr(record, field.name))})


def test_the_names_of_items_are_fixed():
    """By hand: under another name, everything on every volume would be encoded again."""
    view = '{"colour":7,"flip":true,"interpolation":"lanczos","offset":[1,2],"scaled":[66,50],"size":[64,48]}'
    latents = f'"sha256":"{"1" * 64}","vae":"{"3" * 64}","version":1,"view":{view}}}'
    text = f'{{"caption":"a cat","encoders":"{"4" * 64}","version":1}}'
    masked, plain = (
        hashlib.sha256(f"{begin}{latents}".encode()).hexdigest() for begin in (f'{{"mask":"{"2" * 64}",', "{")
    )
    caption = hashlib.sha256(text.encode()).hexdigest()
    assert str(CACHE.image_path(IMAGE, VIEW)) == f"/cache/latents/{masked[:2]}/{masked}.safetensors"
    without = dataclasses.replace(IMAGE, mask_sha256=None)
    assert str(CACHE.image_path(without, VIEW)) == f"/cache/latents/{plain[:2]}/{plain}.safetensors"
    assert str(CACHE.text_path("a cat")) == f"/cache/text/{caption[:2]}/{caption}.safetensors"


def test_every_field_of_a_view_gives_another_item():
    paths = {CACHE.image_path(IMAGE, view) for _, view in each_changed(VIEW)}
    assert len(paths | {CACHE.image_path(IMAGE, VIEW)}) == len(dataclasses.fields(View)) + 1
    halves = [dataclasses.replace(VIEW, offset=(9, 2)), dataclasses.replace(VIEW, size=(9, 48), scaled=(9, 50))]
    assert len({CACHE.image_path(IMAGE, view) for view in (*halves, VIEW)}) == 3  # the first of two numbers too


def test_every_field_of_an_image_gives_another_item_or_is_known_to_be_without_effect():
    same = CACHE.image_path(IMAGE, VIEW)
    unchanged = {name for name, image in each_changed(IMAGE) if CACHE.image_path(image, VIEW) == same}
    assert unchanged == WITHOUT_EFFECT.keys()
    without = dataclasses.replace(IMAGE, mask_file=None, mask_sha256=None)
    alpha = dataclasses.replace(IMAGE, mask_file=None, mask_sha256="alpha")
    assert len({CACHE.image_path(image, VIEW) for image in (IMAGE, without, alpha)}) == 3


def test_the_weights_of_the_encoder_give_another_item_and_those_of_the_other_do_not(monkeypatch):
    changed = dict(each_changed(CACHE))
    assert changed.keys() == {"folder", "vae", "encoders"}

    def named(one):
        image, text = one.image_path(IMAGE, VIEW), one.text_path("a cat")
        return image.relative_to(one.folder), text.relative_to(one.folder)

    image, text = named(CACHE)
    assert named(changed["folder"]) == (image, text)
    assert named(changed["vae"])[0] != image and named(changed["vae"])[1] == text
    assert named(changed["encoders"])[0] == image and named(changed["encoders"])[1] != text
    assert image.parts[0] == "latents" and text.parts[0] == "text"
    for path in (image, text):
        assert len(path.stem) == 64 and path.parts[1] == path.stem[:2] and path.suffix == ".safetensors"
    monkeypatch.setattr(caching, "VERSION", caching.VERSION + 1)
    assert not {*named(CACHE)} & {image, text}


@pytest.mark.parametrize("caption", ["a cat ", "A cat", "a\ncat", "", "a cät", "a ca\u0308t"])
def test_every_letter_of_a_caption_gives_another_item(caption):
    assert CACHE.text_path(caption) != CACHE.text_path("a cat")
    assert CACHE.text_path("a c\u00e4t") != CACHE.text_path("a ca\u0308t")


# ---- damage


@pytest.fixture
def item(tmp_path):
    path = tmp_path / "item.safetensors"
    tensors = {
        "moments": torch.arange(24.0).reshape(4, 2, 3),
        "mask": torch.ones(1, 2, 3),
        "bf16": torch.rand(5).bfloat16(),
    }
    caching._write(path, tensors)
    return path, tensors


def test_a_written_item_is_intact_and_reads_back(item):
    path, tensors = item
    assert caching._is_intact(path) and caching.load(path).keys() == tensors.keys()
    assert all(torch.equal(caching.load(path)[name], tensors[name]) for name in tensors)
    assert not caching._is_intact(path.with_name("none"))
    turned = torch.arange(6.0).reshape(2, 3).t()
    caching._write(path, {"turned": turned})
    assert caching._is_intact(path) and torch.equal(caching.load(path)["turned"], turned)


def test_a_changed_byte_of_each_region_is_noticed(item):
    """First, middle and last byte of every tensor's data, of the header and of its length."""
    path, _ = item
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    regions = [(0, 8)]
    regions += [tuple(8 + length + at for at in entry["data_offsets"]) for k, entry in header.items() if k[0] != "_"]
    assert len(regions) == 4 and max(end for _, end in regions) == len(good)
    for begin, end in regions:
        for at in (begin, (begin + end) // 2, end - 1):
            for bit in (1, 128):
                data = bytearray(good)
                data[at] ^= bit
                path.write_bytes(data)
                assert not caching._is_intact(path), (begin, end, at, bit)
    for name in ("moments", "mask", "bf16"):  # of the header: names, the hash, shapes
        path.write_bytes(good.replace(name.encode(), name[::-1].encode(), 1))
        assert not caching._is_intact(path)
    digest = header["__metadata__"]["sha256"].encode()
    path.write_bytes(good.replace(digest, digest[::-1]))
    assert not caching._is_intact(path)
    for data in (good[:-1], good + b"\0", b""):
        path.write_bytes(data)
        assert not caching._is_intact(path)
    path.write_bytes(good)
    assert caching._is_intact(path)


def test_swapped_names_are_noticed(tmp_path):
    """The same bytes under each other's names."""
    path = tmp_path / "a.safetensors"
    caching._write(path, {"one": torch.ones(3), "two": torch.zeros(3)})
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"one"', b'"zzz"').replace(b'"two"', b'"one"').replace(b'"zzz"', b'"two"'))
    assert not caching._is_intact(path)


# ---- encoding


def encode_moments(seen):
    def encode(pixels_B3HW):
        seen.append(tuple(pixels_B3HW.shape))
        assert pixels_B3HW.min() >= -1 and pixels_B3HW.max() <= 1
        mean = torch.nn.functional.avg_pool2d(pixels_B3HW, 8)
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)

    return encode


@pytest.fixture
def variants(make_folder):
    from tests.support.drawings import draw
    from trainer.storage import digests

    folder = make_folder("pictures", 6, captions=False)
    out = []
    for i in range(6):
        file = folder / f"{i:02}.png"
        assert draw(64, 48, seed=i).size == (64, 48)
        record = ImageRecord(file.name, file, digests.sha256(file), 64, 48, 0, 0, None)
        size = (64, 48) if i < 5 else (48, 48)
        out.append((record, View(size, (64, 48), ((64 - size[0]) // 2, 0))))
    return out


def encode(cache, variants, seen, *, megapixels=0.012288, check_in=lambda: None):
    missing = caching.find_missing(variants, lambda v: cache.image_path(*v), threads=2)
    return caching.encode_images(
        cache, missing, encode=encode_moments(seen), cpu_workers=2, max_megapixels=megapixels, check_in=check_in
    )


def test_only_what_is_missing_is_encoded_in_batches_of_one_size(variants, tmp_path):
    """Four images of 64 × 48 have exactly the pixels that the limit allows."""
    cache, seen, checks = Cache(tmp_path / "cache", "v", "e"), [], []
    assert encode(cache, variants, seen, check_in=lambda: checks.append(1)) == (6, [])
    assert seen == [(4, 3, 48, 64), (1, 3, 48, 64), (1, 3, 48, 48)] and len(checks) == 3
    for image, view in variants:
        left = view.offset[0]
        pixels = np.asarray(__import__("PIL.Image").Image.open(image.file).convert("RGB"))
        pixels = pixels[:, left : left + view.size[0]].astype(np.float64) / 127.5 - 1
        blocks = pixels.reshape(6, 8, view.size[0] // 8, 8, 3).mean((1, 3)).transpose(2, 0, 1)
        found = caching.load(cache.image_path(image, view))
        assert found.keys() == {"moments"}
        assert np.allclose(found["moments"][:3], blocks, atol=1e-5) and not found["moments"][3:].any()
    seen.clear()
    assert encode(cache, variants, seen) == (0, []) and seen == []
    path = cache.image_path(*variants[2])
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert encode(cache, variants, seen) == (1, []) and seen == [(1, 3, 48, 64)]
    seen.clear()
    assert encode(Cache(tmp_path / "one", "v", "e"), variants, seen, megapixels=0.000001)[0] == 6
    assert [shape[0] for shape in seen] == [1] * 6


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_encoded(variants, tmp_path):
    variants[1][0].file.write_bytes(b"no image")
    cache, seen = Cache(tmp_path / "cache", "v", "e"), []
    encoded, unusable = encode(cache, variants, seen, megapixels=1.0)
    assert encoded == 5 and [image.name for image, _ in unusable] == ["01.png"] and unusable[0][1]
    assert seen == [(4, 3, 48, 64), (1, 3, 48, 48)]


@pytest.mark.parametrize("extra", [-1, 1])
def test_an_encoder_that_returns_another_number_of_latents_is_an_error(variants, tmp_path, extra):
    """Each would be kept under the name of another image."""

    def encode(pixels_B3HW):
        return torch.zeros(len(pixels_B3HW) + extra, 8, 6, 8)

    cache = Cache(tmp_path, "v", "e")
    with pytest.raises(ValueError, match="zip"):
        caching.encode_images(
            cache, variants[:3], encode=encode, cpu_workers=1, max_megapixels=1.0, check_in=lambda: None
        )


def test_several_processes_share_the_batches_of_one_and_write_the_same_bytes(variants, tmp_path):
    """Which images are encoded together decides the last bits: so it does not depend on the number of processes."""
    alone, shared = Cache(tmp_path / "alone", "v", "e"), Cache(tmp_path / "shared", "v", "e")
    together = []
    encode(alone, variants, together)
    each = [[], [], []]
    for index, seen in enumerate(each):
        share = caching.Share(index, 3)
        options = {"cpu_workers": 2, "max_megapixels": 0.012288, "check_in": lambda: None, "share": share}
        count, _ = caching.encode_images(shared, variants, encode=encode_moments(seen), **options)
        assert count == sum(shape[0] for shape in seen)
    assert [batch for seen in each for batch in seen] == together
    for variant in variants:
        assert alone.image_path(*variant).read_bytes() == shared.image_path(*variant).read_bytes()
    parts = [caching.Share(index, 2) for index in range(2)]
    texts = [[], []]
    for share, seen in zip(parts, texts, strict=True):

        def encoder(captions, seen=seen):
            seen.append(captions)
            return [{"tokens": torch.zeros(1)} for _ in captions]

        caching.encode_texts(shared, list("abcde"), encode=encoder, batch_size=2, check_in=lambda: None, share=share)
    assert texts == [[["a", "b"], ["e"]], [["c", "d"]]]


def test_each_process_looks_at_its_part_of_the_cache_and_all_know_what_is_missing(tmp_path):
    (tmp_path / "b").touch()
    names, seen = list("abcd"), []

    def merge(own):
        seen.append(own)
        return [max(pair) for pair in zip(own, [0, 1, 0, 1], strict=True)]

    assert caching.find_missing(names, tmp_path.joinpath, caching.Share(0, 2, merge)) == ["a", "b", "c", "d"]
    assert seen == [[1, 0, 1, 0]]


def test_a_mask_is_stored_at_the_size_of_the_latents_by_the_share_of_its_pixels(variants, tmp_path):
    from PIL import Image

    from trainer.storage import digests

    mask = np.zeros((48, 64), np.uint8)
    mask[:, :36] = 255
    file = tmp_path / "mask.png"
    Image.fromarray(mask).save(file)
    image, view = variants[0]
    masked = dataclasses.replace(image, mask_file=file, mask_sha256=digests.sha256(file))
    cache = Cache(tmp_path / "cache", "v", "e")
    encode(cache, [(masked, view)], [])
    found = caching.load(cache.image_path(masked, view))["mask"]
    assert found.shape == (1, 6, 8)
    assert torch.allclose(found[0], torch.tensor([1.0] * 4 + [0.5] + [0.0] * 3).expand(6, 8), atol=1e-3)


def test_each_caption_is_encoded_once_in_batches_of_the_size_asked_for(tmp_path):
    cache, seen, checks = Cache(tmp_path, "v", "e"), [], []

    def encoder(captions):
        seen.append(captions)
        return [{"tokens": torch.full((2,), float(len(caption)))} for caption in captions]

    def run(captions):
        missing = caching.find_missing(list(dict.fromkeys(captions)), cache.text_path)
        return caching.encode_texts(cache, missing, encode=encoder, batch_size=2, check_in=lambda: checks.append(1))

    assert run(["a", "bb", "a", "ccc", "dddd", "eeeee"]) == 5 and len(checks) == 3
    assert seen == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]
    assert load_file(cache.text_path("ccc"))["tokens"].tolist() == [3.0, 3.0]
    assert run(["eeeee", "ff", "a"]) == 1 and seen[-1] == ["ff"]
    with pytest.raises(ValueError, match="zip"):
        caching.encode_texts(cache, ["new"], encode=lambda batch: [], batch_size=2, check_in=lambda: None)


def test_work_is_begun_a_bounded_number_ahead_and_comes_in_order():
    begun = []

    def work(number):
        begun.append(number)
        return number * number

    with ThreadPoolExecutor(2) as pool:
        results = caching._map_ahead(pool, work, iter(range(20)))
        assert next(results) == (0, 0)
        assert len(begun) <= 5  # twice the threads, and the one that was handed out
        assert list(results) == [(number, number * number) for number in range(1, 20)]
