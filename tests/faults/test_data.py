"""D6, D7, D8: pictures and caches that change under a job. (The rest of D: tests/trainer/data.)"""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image


def with_pictures(plan, folder):
    """The plan, reading another folder."""
    dataset = plan.data.datasets[0]
    source = dataclasses.replace(dataset.subsets[0].source, location=str(folder), path=str(folder))
    subset = dataclasses.replace(dataset.subsets[0], source=source)
    return {"datasets": (dataclasses.replace(dataset, subsets=(subset,)),)}


@pytest.fixture
def copy(tiny, small_pictures, tmp_path):
    folder = tmp_path / "pictures"
    shutil.copytree(small_pictures, folder)
    return folder


@pytest.mark.slow
def test_a_picture_changed_in_place_is_encoded_again(run, tiny, copy):
    """D6: same name, size and time; only the bytes differ."""
    victim = copy / "03.png"
    before = victim.stat()
    with Image.open(victim) as image:
        changed = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    changed.save(victim)
    data = victim.read_bytes()
    victim.write_bytes(data + b"\0" * max(0, before.st_size - len(data)))
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(data=with_pictures(tiny.plan, copy), train={"max_steps": 1}) == 0, run.said()
    assert "Encoded 1 of 16 latents" in run.said()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["added", "removed", "changed", "captioned"])
def test_other_pictures_begin_a_new_run(run, tiny, copy, change):
    """D7."""
    data = with_pictures(tiny.plan, copy)
    assert run({"kind": "signals", "step": 5, "signals": [15]}, data=data) == 143, run.said()
    if change == "added":
        shutil.copy(copy / "01.png", copy / "01.jpg")  # the same stem: another picture all the same
    elif change == "removed":
        (copy / "01.png").unlink()
    elif change == "changed":
        shutil.copy(copy / "02.png", copy / "01.png")
    else:
        (copy / "01.txt").write_text("something else")
    assert run(data=data) == 0, run.said()
    line = next(line for line in run.said().splitlines() if "New run x-2" in line)
    assert "beside x, because these differ" in line and "01." in line
    assert (run.out / "x-2.safetensors").is_file() and not (run.out / "x.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "pickle"])
def test_a_damaged_cache_is_made_anew(run, tiny, tmp_path, damage):
    """D8: every file of the cache; the result is the same, and nothing is unpickled."""
    marker = tmp_path / "unpickled"
    cache = tmp_path / "cache"
    shutil.copytree(tiny.plan.output.cache, cache)
    files = [p for p in cache.rglob("*.safetensors") if p.parts[-3] in ("latents", "text")]
    assert len(files) >= 16 + 21
    for path in files:
        data = bytearray(path.read_bytes())
        data[-9] ^= 4
        path.write_bytes({"truncate": data[:-20], "flip": data, "empty": b"", "pickle": bomb(marker)}[damage])
    assert run(output={"cache": str(cache)}) == 0, run.said()
    assert "Encoded 16 of 16 latents" in run.said() and "Encoded 21 of 21 captions" in run.said()
    assert run.final == tiny.reference and not marker.exists()


def bomb(marker):
    """A pickle that makes a file when it is loaded."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    return pickle.dumps(Bomb())


def test_the_bomb_goes_off_where_it_is_unpickled(tmp_path):
    """The check above can fail."""
    import pickle

    pickle.loads(bomb(tmp_path / "marker"))
    assert (tmp_path / "marker").exists()


@pytest.mark.slow
def test_a_pickle_is_no_state(run, tiny, tmp_path):
    """H2: a state folder whose tensors are a pickle, with the right hash of it."""
    import json

    from trainer.storage import digests

    marker, folder = tmp_path / "unpickled", tmp_path / "step-00000004"
    assert run({"kind": "signals", "step": 5, "signals": [15]}) == 143
    shutil.copytree(run.out / "state" / "step-00000004", folder)
    (folder / "state.safetensors").write_bytes(bomb(marker))
    record = json.loads(json.loads((folder / "state.json").read_text())["text"])
    text = json.dumps({**record, "sha256": digests.sha256(folder / "state.safetensors")})
    (folder / "state.json").write_text(json.dumps({"sha256": digests.digest(text), "text": text}))
    shutil.rmtree(run.out)
    assert run(lora={"resume_from": str(folder)}) == 78, run.said()
    assert "not a complete state" in run.said() and not marker.exists()
