"""What a digest of weights notices: every file's name and size, the header, and both ends of every tensor."""

import hashlib
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from trainer.storage import digests


@pytest.fixture
def folder(tmp_path):
    """Tensors of 4 bytes, of just under, of exactly and of more than both edges; a config and vocabularies."""
    weights = tmp_path / "weights"
    (weights / "tokenizer").mkdir(parents=True)
    tensors = {f"t{count}": torch.arange(float(count)) for count in (1, 127, 128, 255, 256, 257, 2000)}
    save_file(tensors, weights / "model.safetensors")
    for name in ("config.json", "tokenizer/merges.txt", "tokenizer/spiece.model"):
        (weights / name).write_text(f'{{"name": "{name}"}}')
    return weights


def data_regions(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            found[name] = tuple(8 + length + at for at in entry["data_offsets"])
    return length, found


def changed_at(path, good, at):
    data = bytearray(good)
    data[at] ^= 1
    path.write_bytes(data)


def test_the_first_and_the_last_512_bytes_of_every_tensor_count(folder):
    path = folder / "model.safetensors"
    good, before = path.read_bytes(), (digests.weights_digest(folder), digests.file_digest(path))
    length, regions = data_regions(path)
    assert len(regions) == 7
    for name, (begin, end) in regions.items():
        inside = {begin, end - 1, min(begin + 511, end - 1), max(end - 512, begin)}
        for at in inside:
            changed_at(path, good, at)
            assert digests.weights_digest(folder) != before[0] and digests.file_digest(path) != before[1], (name, at)
        for at in {begin + 512, end - 513}:  # of what lies between, a glance: it is why 10 GB take milliseconds
            if end - begin > 1024:
                changed_at(path, good, at)
                assert digests.weights_digest(folder) == before[0]
    at = good.index(b'"t257"') + 1  # a name in the header
    changed_at(path, good, at)
    assert digests.file_digest(path) != before[1]
    path.write_bytes(good)
    assert (digests.weights_digest(folder), digests.file_digest(path)) == before
    assert at < 8 + length


def test_the_digest_is_that_of_the_header_and_of_both_ends_in_the_order_of_the_names(folder):
    """By hand: keys of caches on disk depend on it."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length, found = data_regions(path)
    total = hashlib.sha256(data[8 : 8 + length])
    for name in sorted(found):
        tensor = data[slice(*found[name])]
        total.update(tensor[:512] + tensor[-512:])
    assert digests.file_digest(path) == total.hexdigest()
    whole = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer/merges.txt", "tokenizer/spiece.model"):
        content = (folder / name).read_bytes()
        whole.update(f"{name}:{len(content)}\n".encode())
        if name != "model.safetensors":
            whole.update(content)
            continue
        whole.update(content[8 : 8 + length])
        for tensor in sorted(found):
            ends = content[slice(*found[tensor])]
            whole.update(ends[:512] + ends[-512:])
    assert digests.weights_digest(folder) == whole.hexdigest()


def test_a_damaged_file_is_a_value_error(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError):
        digests.weights_digest(folder)


def test_every_other_file_counts_with_its_name_its_place_and_its_size(folder):
    before, seen = digests.weights_digest(folder), set()
    for name in ("config.json", "tokenizer/merges.txt", "tokenizer/spiece.model"):
        path = folder / name
        text = path.read_text()
        for other in (text.upper(), text + " ", ""):
            path.write_text(other)
            seen.add(digests.weights_digest(folder))
        path.write_text(text)
        for moved in (path.with_stem("other"), folder / "elsewhere" / path.name):
            moved.parent.mkdir(exist_ok=True)
            path.rename(moved)
            seen.add(digests.weights_digest(folder))
            moved.rename(path)
        path.unlink()
        seen.add(digests.weights_digest(folder))
        path.write_text(text)
    assert before not in seen and len(seen) == 3 * 6
    (folder / "README.md").write_text("of no weight")
    assert digests.weights_digest(folder) == before
    (folder / "new.json").write_text("{}")
    assert digests.weights_digest(folder) != before


def test_the_digest_does_not_depend_on_where_the_folder_is(folder, tmp_path):
    before = digests.weights_digest(folder)
    assert digests.weights_digest(folder.rename(tmp_path / "elsewhere")) == before


def test_a_file_has_the_hash_of_its_bytes(tmp_path):
    data = bytes(range(256)) * 3000
    (tmp_path / "a").write_bytes(data)
    assert digests.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_the_canonical_form_of_a_value():
    """By hand: sorted keys, no blanks, ASCII. Keys of caches on disk depend on it."""
    value = {"b": [1, 2.5, None, True], "a": "ä"}
    expected = hashlib.sha256(b'{"a":"\\u00e4","b":[1,2.5,null,true]}').hexdigest()
    assert digests.digest(value) == digests.digest(dict(reversed(value.items()))) == expected
    others = [{**value, "a": "a"}, {**value, "b": [1, 2.5, None]}, {"a": value["a"]}, [value], None, math.pi]
    assert len({digests.digest(other) for other in (*others, value)}) == len(others) + 1
