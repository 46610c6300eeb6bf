"""From items of the cache to micro-batches: every image has its own latents, text, mask, sizes and weight."""

import dataclasses
import random
import threading
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from trainer.data import batches
from trainer.data.batches import MicroBatch, geometry, longest_caption, micro_batch, stack_texts, text_lengths
from trainer.data.cache import Cache
from trainer.data.order.epoch import Drawn, Epoch
from trainer.data.order.variants import Example, Variants
from trainer.data.records import ImageRecord, View
from trainer.job.session import Session


def example(number, *, view=None, weight=1.0):
    image = ImageRecord(
        f"{number}.png", Path(f"/p/{number}.png"), f"{number:064}", 100 + number, 50 + number, 0, 0, "x"
    )
    return Example(image, view or View((64, 32), (70, 40), (number, 2)), f"caption {number}", weight)


@pytest.fixture
def cache(tmp_path):
    """`cache(examples, masked)`: a cache that has these, with masks for some."""

    def fill(examples, masked=()):
        made = Cache(tmp_path, "v", "e")
        for number, one in enumerate(examples):
            item = {"moments": torch.full((4, 4, 8), float(number))}
            if number in masked:
                item["mask"] = torch.full((1, 4, 8), 0.25)
            text = {"tokens": torch.full((3, 2), float(number)), "pooled": torch.full((5,), -float(number))}
            for path, tensors in ((made.image_path(one.image, one.view), item), (made.text_path(one.caption), text)):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(tensors, path)
        return made

    return fill


def test_every_row_belongs_to_its_own_image(cache):
    examples = (example(0, weight=0.5), example(1), example(2, weight=2.0))
    found = micro_batch(cache(examples, masked=(1,)), examples)
    assert found.moments_B2CHW.shape == (3, 4, 4, 8) and found.moments_B2CHW[:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]
    assert found.text.keys() == {"tokens", "pooled"} and found.text["pooled"][:, 0].tolist() == [0.0, -1.0, -2.0]
    assert found.text["tokens"].shape == (3, 3, 2) and found.weight_B.tolist() == [0.5, 1.0, 2.0]
    assert found.mask_B1HW.shape == (3, 1, 4, 8) and found.mask_B1HW[:, 0, 0, 0].tolist() == [1.0, 0.25, 1.0]
    assert found.names == ("0.png", "1.png", "2.png") and found.captions == ("caption 0", "caption 1", "caption 2")
    assert found.geometry_B6.dtype == torch.float32
    assert found.geometry_B6.tolist() == [[50.0 + n, 100.0 + n, 2.0, n, 32.0, 64.0] for n in range(3)]
    assert micro_batch(cache(examples), examples).mask_B1HW is None


def test_shorter_captions_are_filled_with_zeros_and_marked():
    items = [
        {"tokens": torch.ones(n, 2), "real": torch.ones(n, dtype=torch.bool), "size": torch.tensor(n)}
        for n in (2, 4, 1)
    ]
    found = stack_texts(items)
    assert found["tokens"].tolist() == [[[1.0] * 2] * n + [[0.0] * 2] * (4 - n) for n in (2, 4, 1)]
    assert found["padding"].tolist() == [[False] * n + [True] * (4 - n) for n in (2, 4, 1)]
    assert torch.equal(found["real"], ~found["padding"]) and found["size"].tolist() == [2, 4, 1]
    assert stack_texts(items[:1]).keys() == {"tokens", "real", "size"}


def test_the_rehearsal_has_the_longest_caption_of_all(cache):
    """One long caption makes a batch long; where all are as long, nothing changes."""
    examples = tuple(example(number) for number in range(3))
    made = cache(examples)
    captions = [one.caption for one in examples]
    assert longest_caption(captions, made) is None and text_lengths(captions, made) == {}
    save_file({"tokens": torch.ones(64, 2), "pooled": torch.ones(5)}, made.text_path("caption 2"))
    assert longest_caption(captions, made) == "caption 2"
    first = dataclasses.replace(examples[0], caption="caption 2")
    assert micro_batch(made, (first, examples[1])).text["tokens"].shape == (2, 64, 2)


def test_all_batches_of_a_run_can_have_captions_of_one_length(cache):
    """Else each length would be captured as a CUDA graph of its own. What has one length in any case stays as it is."""
    examples = tuple(example(number) for number in range(3))
    made = cache(examples)
    save_file({"tokens": torch.ones(64, 2), "pooled": torch.ones(5)}, made.text_path("caption 2"))
    lengths = text_lengths([one.caption for one in examples], made)
    assert lengths == {"tokens": 64}
    for one, rows in ((examples[0], 3), (examples[2], 64)):
        text = micro_batch(made, (one,), lengths).text
        assert {name: tuple(tensor.shape) for name, tensor in text.items()} == {
            "tokens": (1, 64, 2), "pooled": (1, 5), "padding": (1, 64),
        }  # fmt: skip
        assert (~text["padding"]).sum() == rows and not text["tokens"][text["padding"]].any()


@pytest.mark.parametrize(("capturing", "wanted"), [(True, {64}), (False, {3, 64})])
def test_a_run_fills_captions_up_only_where_its_steps_are_captured(cache, capturing, wanted):
    examples = tuple(example(number) for number in range(3))
    made = cache(examples)
    save_file({"tokens": torch.ones(64, 2), "pooled": torch.ones(5)}, made.text_path("caption 2"))
    drawn = Drawn()
    for number in range(3):
        drawn.append(number, 0, 0)
    epoch = Epoch(
        drawn, lambda i: Variants(examples[i].image, (examples[i].view,), (examples[i].caption,), 1, 1.0), str
    )
    for number in range(3):
        epoch.add_bucket(array("I", [number]), 1)
    epoch.end_window(0, random.Random(0))
    run = object.__new__(Session)
    run.__dict__ |= {
        "plan": SimpleNamespace(train=SimpleNamespace(gradient_accumulation=1), engine=SimpleNamespace(device="cpu")),
        "workers": SimpleNamespace(size=1, process_rank=0),
        "sampler": SimpleNamespace(epoch=lambda _: epoch, all_captions=lambda _: [one.caption for one in examples]),
        "runner": SimpleNamespace(capturing=capturing),
        "cache": made,
        "total": 3,
        "steps_per_epoch": 3,
    }
    steps = list(run.groups(0, 3))
    assert {batch.text["tokens"].shape[1] for _, group in steps for batch in group} == wanted
    assert {"padding" in batch.text for _, group in steps for batch in group} == {capturing}


def test_sizes_are_those_of_the_paper_height_first_and_top_before_left():
    """SDXL, arXiv:2307.01952, 2.2: the original's height and width, the crop's top and left, the target's size."""
    one = example(3, view=View((64, 32), (80, 40), (10, 4)))
    assert geometry(one) == (53, 103, 4, 10, 32, 64)
    flipped = dataclasses.replace(one, view=dataclasses.replace(one.view, flip=True))
    assert geometry(flipped) == (53, 103, 4, 80 - 64 - 10, 32, 64)  # what was cut off at the right is at the left


def whole():
    return MicroBatch(
        torch.rand(4, 2, 2, 2), {"a": torch.rand(4, 3), "b": torch.rand(4)}, torch.rand(4, 6), torch.rand(4, 1, 2, 2),
        torch.rand(4), ("a", "b", "c", "d"), ("1", "2", "3", "4"),
    )  # fmt: skip


def test_a_part_has_the_same_rows_of_every_field():
    one = whole()
    part = one.part(slice(1, 3))
    for field in dataclasses.fields(MicroBatch):
        value, cut = getattr(one, field.name), getattr(part, field.name)
        if isinstance(value, dict):
            assert cut.keys() == value.keys() and all(torch.equal(cut[key], value[key][1:3]) for key in value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(cut, value[1:3])
        else:
            assert cut == value[1:3]


def test_every_tensor_is_changed_and_nothing_else():
    one = whole()
    doubled = one.each(lambda tensor: tensor * 2)
    for field in dataclasses.fields(MicroBatch):
        value, changed = getattr(one, field.name), getattr(doubled, field.name)
        if isinstance(value, dict):
            assert all(torch.equal(changed[key], value[key] * 2) for key in value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(changed, value * 2)
        else:
            assert changed == value
    assert dataclasses.replace(one, mask_B1HW=None).each(lambda tensor: tensor * 2).mask_B1HW is None
    assert one.to("meta").moments_B2CHW.device.type == "meta" and one.to("meta").text["b"].device.type == "meta"


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_items_come_in_order_and_a_bounded_number_ahead(depth):
    made, taken = [], threading.Event()

    def source():
        for number in range(9):
            made.append(number)
            yield number
        taken.set()

    items = batches.prefetched(source(), depth)
    assert next(items) == 0 and len(made) <= depth + 1
    assert list(items) == list(range(1, 9)) and taken.is_set()
    assert list(batches.prefetched(iter(()), depth)) == []


def test_an_error_while_reading_comes_after_the_items_before_it():
    def source():
        yield 1
        yield 2
        raise OSError("gone")

    items = batches.prefetched(source())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(items)
