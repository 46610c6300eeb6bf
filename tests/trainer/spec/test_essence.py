"""The essence of a plan, field by field: what it holds, what another value of each field means for a run, and no field
forgotten, because they are taken from the dataclasses.
"""

import dataclasses
import json
import types
import typing
from typing import Any

import pytest

from trainer.spec.plan import CaptionerPlan, DataPlan, Dataset, Plan, Prompt, Source, Subset
from trainer.spec.rules.resume_rules import changes

# Fields that a resumed run may change. Everything else decides which weights come out. Written down here a second time,
# so that a field does not become neutral by a slip.
NEUTRAL = {
    "model": {"commit", "path", "training_adapter_path"},
    "data": {"captioner"},
    "data.datasets.subsets": {"repeats_chosen", "part_of", "folder", "auto_caption", "caption_prompt"},
    "data.datasets.subsets.source": {"commit", "path", "named_in"},
    "train": {"max_skipped_steps"},
    "engine": {
        "recompute", "kept_blocks", "offload", "turned_weights", "stream_encoders", "host_gib", "tile_vae", "compile",
        "replay", "attention", "deterministic", "memory_limit_gib", "step_timeout_s",
    },
    "": {"output", "prompts", "reasons", "automatic", "warnings", "given", "printed", "quote", "details"},
}  # fmt: skip


def other(value: Any, kind: Any) -> Any:
    """Another value of an annotated type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
        if value is None:
            value = {int: 3, float: 0.5, str: "", bool: False}.get(kind, ())
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, tuple):
        items = typing.get_args(kind)
        return (*value[:-1], value[-1] + 1) if value and isinstance(value[0], int) else (*value, _new(items[0]))
    if isinstance(value, dict):
        return {**value, "new": _new(typing.get_args(kind)[1])}
    raise TypeError(f"{value!r} of {kind}")


def _new(kind: Any) -> Any:
    if kind is typing.Any:
        return 1
    return {str: "new", int: 1, float: 1.0}.get(kind, "new")


def each_field(value: Any, path: str = ""):
    """(path, the field's name, a copy of `value` with another value there) for every field of it, however deep."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        below = f"{path}.{field.name}".lstrip(".")
        if below == "quote":
            yield path, field.name, dataclasses.replace(value, quote=dataclasses.replace(inner, card="another"))
        elif below == "output":
            yield path, field.name, dataclasses.replace(value, output=dataclasses.replace(inner, name="another"))
        elif below == "data.captioner":
            yield path, field.name, dataclasses.replace(value, captioner=CaptionerPlan("org/model"))
        elif below == "prompts":
            yield path, field.name, dataclasses.replace(value, prompts=())
        elif dataclasses.is_dataclass(inner):
            for where, name, changed in each_field(inner, below):
                yield where, name, dataclasses.replace(value, **{field.name: changed})
        elif isinstance(inner, tuple) and inner and dataclasses.is_dataclass(inner[0]):
            for where, name, changed in each_field(inner[0], below):
                yield where, name, dataclasses.replace(value, **{field.name: (changed, *inner[1:])})
        else:
            changed = other(inner, hints[field.name])
            yield path, field.name, dataclasses.replace(value, **{field.name: changed})


@pytest.fixture
def plan(job_plan) -> Plan:
    plan = job_plan("flux")
    (dataset,) = plan.data.datasets
    (subset,) = dataset.subsets
    hub = dataclasses.replace(subset, source=Source("hub", "some/dataset", revision="main"))
    datasets = (dataclasses.replace(dataset, subsets=(subset, hub)), dataset)
    prompt = Prompt("a cat", 64, 64, 1, 2, 3.5, 1.0)
    return dataclasses.replace(plan, data=dataclasses.replace(plan.data, datasets=datasets), prompts=(prompt,))


def test_every_field_is_in_the_essence_or_known_to_be_neutral(plan):
    before, neutral, seen = plan.essence(), {}, 0
    for where, name, changed in each_field(plan):
        after = changed.essence()
        seen += 1
        if after == before:
            neutral.setdefault(where, set()).add(name)
            continue
        keys = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        if name != "part_of":
            assert len(keys) == 1, (where, name, keys)
            assert next(iter(keys)).endswith(name)
        json.dumps(after)
    assert neutral | {"data.datasets.subsets": neutral["data.datasets.subsets"] | {"part_of"}} == NEUTRAL
    assert seen > 100


def test_a_change_of_any_field_of_the_essence_is_told_of_one_kind(plan):
    """A neutral one is no change; all others are a new run, more steps, or a place whose content decides."""
    begun, by_kind = plan.essence(), {}
    for where, name, changed in each_field(plan):
        found = changes(begun, changed)
        kinds = [kind for kind in ("settings", "places", "model", "hardware", "steps") if getattr(found, kind)]
        is_neutral = name in NEUTRAL.get(where, set())
        if is_neutral and name != "part_of":
            assert kinds == [], (where, name)
        elif (where, name) in (("model", "family"), ("data", "strict")):
            assert kinds in ([], ["settings"])
        elif name != "part_of":
            assert len(kinds) == 1, (where, name, kinds)
            by_kind.setdefault(kinds[0], set()).add(name)
    assert by_kind["steps"] == {"max_epochs", "max_steps"}
    assert by_kind["places"] == {"kind", "location", "revision", "metadata_file", "conditioning_data_dir"}
    assert by_kind["model"] == {"source", "revision", "parts"}
    assert "hardware" not in by_kind or by_kind["hardware"] <= {"device", "precision", "dtype", "batch_size"}
    assert {"seed", "rank", "alpha", "name", "noise_offset", "num_repeats"} <= by_kind["settings"]


def test_subsets_that_a_scan_made_are_no_part_of_it(plan):
    dataset = plan.data.datasets[0]
    made = dataclasses.replace(dataset.subsets[0], part_of=0, num_repeats=9)
    longer = dataclasses.replace(dataset, subsets=(*dataset.subsets, made))
    scanned = dataclasses.replace(plan, data=DataPlan((longer, *plan.data.datasets[1:])))
    assert scanned.essence() == plan.essence()


def test_the_keys_say_which_dataset_and_which_subset(plan):
    keys = plan.essence().keys()
    assert {"data.datasets[0].subsets[0].num_repeats", "data.datasets[0].subsets[1].num_repeats"} <= keys
    assert "data.datasets[1].subsets[0].num_repeats" in keys and "data.datasets[1].subsets[1].num_repeats" not in keys
    assert isinstance(plan.data.datasets[0], Dataset) and isinstance(plan.data.datasets[0].subsets[0], Subset)
