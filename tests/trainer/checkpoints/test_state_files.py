"""States on disk: complete or absent."""

import dataclasses
import errno
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from entrypoint.planning import starting_point
from trainer.checkpoints import state_files
from trainer.spec.errors import SettingsError, StorageError
from trainer.storage import atomic, run_records
from trainer.training import random_state


def tree(value):
    return {"a": torch.full((3,), value), "b": {0: [torch.arange(4), None, True, 1.5, "text"]}, "empty": {}}


def test_a_state_reads_back_as_it_was_written(tmp_path):
    state_files.save(tmp_path, 7, tree(1.0))
    state = state_files.latest(tmp_path)
    assert state.step == 7
    assert torch.equal(state.tree["a"], torch.ones(3))
    assert torch.equal(state.tree["b"][0][0], torch.arange(4))
    assert state.tree["b"][0][1:] == [None, True, 1.5, "text"] and state.tree["empty"] == {}


def test_all_of_a_state_is_on_the_disk_before_its_name_and_the_name_before_it_is_told(tmp_path, monkeypatch):
    """The order survives a power cut."""
    order, rename = [], Path.rename
    monkeypatch.setattr(atomic, "flush", lambda path: order.append(("flush", path.name)))
    monkeypatch.setattr(Path, "rename", lambda self, to: order.append(("rename", self.name)) or rename(self, to))
    state_files.save(tmp_path / "state", 7, tree(1.0))
    temporary = ".step-00000007.kiln.tmp"
    assert sorted(order[:2]) == [("flush", "state.json"), ("flush", "state.safetensors")]
    assert order[2:] == [("flush", temporary), ("rename", temporary), ("flush", "state")]


def test_a_text_is_never_taken_for_a_tensor(tmp_path):
    """Names of pictures and trigger words are part of a state."""
    texts = {"a": torch.ones(1), "b": "tensor:0", "tensor": "0", "tuple": [1], "dict": [["a", 1]]}
    state_files.save(tmp_path, 1, texts)
    back = state_files.latest(tmp_path).tree
    assert torch.equal(back.pop("a"), texts.pop("a")) and back == texts


def test_what_a_state_began_with_is_read_without_torch(tmp_path, job_plan):
    plan = job_plan("flux", PARAMS_OPTIMIZER_ARGS="betas=0.9,0.99")
    folder = state_files.save(tmp_path, 7, {"essence": plan.essence(), "data": {"a": "b"}, **tree(1.0)})
    header = run_records.read_state_header(folder)
    assert header.step == 7 and header.tree == {"essence": plan.essence(), "data": {"a": "b"}}
    (folder / "state.json").write_text("{damaged")
    assert run_records.read_state_header(folder) is None  # the trainer looks closer


def test_a_changed_plan_is_refused_with_the_state_that_was_asked_for(tmp_path, job_plan):
    plan = job_plan("flux")
    folder = str(state_files.save(tmp_path / "elsewhere", 7, {"essence": plan.essence()}))
    asked = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, resume_from=folder))
    starting_point.check_state(asked)
    changed = dataclasses.replace(asked, optim=dataclasses.replace(asked.optim, name="adamw"))
    named = rf"PARAMS_RESUME_FROM={folder} (?s:.*)PARAMS_OPTIMIZER_TYPE: prodigy → adamw\n"
    with pytest.raises(SettingsError, match=named):
        starting_point.check_state(changed)
    going_on = dataclasses.replace(changed, output=dataclasses.replace(changed.output, resume_with_changes=True))
    with pytest.raises(SettingsError, match="does not fit"):
        starting_point.check_state(going_on)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_state_is_renamed_and_the_one_before_is_used(tmp_path, name, damage):
    for step in (10, 20):
        state_files.save(tmp_path, step, tree(float(step)))
    victim = tmp_path / "step-00000020" / name
    data = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    else:
        data[-2] ^= 1  # of the last tensor's data; of the digits of a hash or the end of the text
        victim.write_bytes(data if damage == "flip" else data[:-3])
    assert state_files.latest(tmp_path).step == 10
    assert (tmp_path / "step-00000020.damaged").is_dir()


@pytest.mark.parametrize(("taken", "free"), [((), ""), (("",), "-2"), (("", "-2"), "-3"), (("-2",), "")])
def test_a_damaged_state_takes_the_next_free_name(tmp_path, taken, free):
    for number in taken:
        (tmp_path / f"step-00000020.damaged{number}").mkdir()
    for step in (10, 20):
        state_files.save(tmp_path, step, tree(float(step)))
    (tmp_path / "step-00000020" / "state.json").write_text("{}")
    assert state_files.latest(tmp_path).step == 10
    assert (tmp_path / f"step-00000020.damaged{free}" / "state.json").read_text() == "{}"


def test_when_all_states_are_damaged_it_is_an_error(tmp_path):
    state_files.save(tmp_path, 10, tree(1.0))
    """At every start: one that is started again by itself must not begin anew."""
    (tmp_path / "step-00000010" / "state.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"All 1 states in .* are damaged"):
            state_files.latest(tmp_path)


def test_the_newest_states_are_kept_and_orphans_removed(tmp_path):
    """Only those of the run; a user's files in their folders, and his folders beside them, stay."""
    (tmp_path / ".step-00000099.kiln.tmp").mkdir(parents=True)
    (tmp_path / ".step-00000098.kiln.tmp").mkdir()
    (tmp_path / ".step-00000098.kiln.tmp" / "mine").write_text("mine")
    for step in (5, 10, 20, 30, 40):
        state_files.save(tmp_path, step, tree(1.0))
    (tmp_path / "step-00000020" / "notes.txt").write_text("mine")
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / ".step-notes.tmp").mkdir()
    own = [f"step-{step:08d}" for step in (7, 10, 20, 30, 40)]
    assert state_files.prune(tmp_path, 2, own=own) == ["step-00000010", "step-00000020"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(".step-00000098.kiln.tmp", ".step-notes.tmp", "step-00000005", "step-00000007", "step-00000020"),
        *("step-00000030", "step-00000040"),
    ]
    assert [p.name for p in (tmp_path / "step-00000020").iterdir()] == ["notes.txt"]
    assert state_files.latest(tmp_path).step == 40


def test_random_generators_continue_after_a_restore(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    draw()
    state_files.save(tmp_path, 1, {"random": random_state.random_state()})
    expected = draw()
    draw()
    random_state.set_random_state(state_files.latest(tmp_path).tree["random"])
    assert draw() == expected


# ---- every region of both files

RICH = {
    "adapters": {"a.lora_A.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.rand(5)}}, "param_groups": [{"lr": 1e-4}]},
    "guard": {"recent": [0.5, 0.25], "skipped": 1, "scale": 1.0},
    "flags": [True, False, None, 7, "a text", (1, 2)],
    "bytes": torch.arange(250, 256, dtype=torch.uint8),
}


def regions(path):
    """Of a safetensors file: a name for each region → its first, a middle and its last byte."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    found = {"header's length": (0, 8), "header": (8, 8 + length)}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[f"tensor {name}"] = (8 + length + begin, 8 + length + end)
    assert max(end for _, end in found.values()) == len(data)
    return {name: sorted({begin, (begin + end) // 2, end - 1}) for name, (begin, end) in found.items()}


def test_every_region_of_the_tensors_is_watched(tmp_path):
    """The length, the header, and the first, a middle and the last byte of each tensor's data; each bit by itself."""
    folder = state_files.save(tmp_path, 4, RICH)
    path = folder / "state.safetensors"
    good, tried = path.read_bytes(), 0
    found = regions(path)
    assert len(found) == 2 + 5
    for name, places in found.items():
        for at in places:
            for bit in (1, 16, 128):
                data = bytearray(good)
                data[at] ^= bit
                path.write_bytes(data)
                with pytest.raises(ValueError):
                    state_files.read(folder)
                    pytest.fail(f"bit {bit} of byte {at} of {name}")
                tried += 1
    for data in (good + b"\0", good[:-1], b"", good[8:], good[:8]):
        path.write_bytes(data)
        with pytest.raises(ValueError):
            state_files.read(folder)
    path.write_bytes(good)
    assert state_files.read(folder).step == 4 and tried >= 3 * 2 * len(found)


def scalars(value, path=()):
    if isinstance(value, dict):
        for key, child in value.items():
            yield from scalars(child, (*path, key))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from scalars(child, (*path, i))
    else:
        yield path, value


def test_every_value_of_the_json_is_watched(tmp_path):
    """As somebody with an editor would change it: a good JSON of another content."""
    folder = state_files.save(tmp_path, 4, RICH)
    path = folder / "state.json"
    good = json.loads(path.read_text())
    record = json.loads(good["text"])
    places = [(place, value) for place, value in scalars(record)]
    assert {"step", "sha256", "tree"} == {place[0] for place, _ in places} and len(places) > 30
    for place, value in places:
        other = json.loads(good["text"])
        holder = other
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = "another" if value is None else (not value if isinstance(value, bool) else value * 2 or 1)
        path.write_text(json.dumps({**good, "text": json.dumps(other)}))
        with pytest.raises(ValueError, match=r"state\.json is not what was written"):
            state_files.read(folder)
        assert run_records.read_state_header(folder) is None
    for outer in ({**good, "sha256": good["sha256"][::-1]}, {"text": good["text"]}, {"sha256": good["sha256"]}, [], {}):
        path.write_text(json.dumps(outer))
        with pytest.raises(ValueError):
            state_files.read(folder)
        assert run_records.read_state_header(folder) is None


def test_no_flipped_bit_of_the_json_changes_what_is_read(tmp_path):
    """Every byte of the file. What lies between two values may become another blank, and reads the same."""
    folder = state_files.save(tmp_path, 4, {"a": torch.ones(2), "b": [1, "é"], "essence": {"train.seed": 1}})
    path, expected = folder / "state.json", state_files.read(folder)
    good, unnoticed = path.read_bytes(), 0
    for at in range(len(good)):
        data = bytearray(good)
        data[at] ^= 1 << (at % 7)
        path.write_bytes(data)
        try:
            found = state_files.read(folder)
        except ValueError:
            continue
        unnoticed += 1
        assert found.step == expected.step and torch.equal(found.tree.pop("a"), torch.ones(2))
        assert found.tree == {"b": [1, "é"], "essence": {"train.seed": 1}}
    assert unnoticed <= 4


def test_the_tensors_of_another_state_are_noticed(tmp_path):
    """Both files are whole, and do not belong together."""
    first, second = (state_files.save(tmp_path, step, tree(float(step))) for step in (1, 2))
    (second / "state.safetensors").write_bytes((first / "state.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"state\.safetensors is not what was written"):
        state_files.read(second)


def test_what_does_not_read_back_leaves_nothing(tmp_path, monkeypatch):
    """A disk that stores other bytes than it was given."""
    state_files.save(tmp_path, 1, tree(1.0))
    for damage in (lambda back: back.popitem(), lambda back: back["0"].add_(1)):

        def load(path, damage=damage):
            back = load_file(path)
            damage(back)
            return back

        monkeypatch.setattr(state_files, "load_file", load)
        with pytest.raises(StorageError, match=rf"^{tmp_path}/step-00000001 does not read back as it was written\.$"):
            state_files.save(tmp_path, 1, tree(2.0))
        monkeypatch.undo()
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        assert torch.equal(state_files.latest(tmp_path).tree["a"], torch.ones(3))


def test_a_state_of_the_same_step_is_replaced(tmp_path):
    state_files.save(tmp_path, 1, tree(1.0))
    state_files.save(tmp_path, 1, tree(2.0))
    assert torch.equal(state_files.latest(tmp_path).tree["a"], torch.full((3,), 2.0))


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 4, 9])
def test_the_newest_states_by_step_stay(tmp_path, keep):
    steps = [40, 100, 20, 1000]
    for step in steps:
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    (tmp_path / "step-00000007.damaged").mkdir()
    (tmp_path / "step-12").mkdir()
    kept = sorted(steps)[-keep:] if keep else sorted(steps)
    own = [f"step-{step:08d}" for step in (12, *steps)]
    gone = sorted(set(steps) - set(kept))
    assert state_files.prune(tmp_path, keep, own=own) == [f"step-{step:08d}" for step in gone]
    assert {p.name for p in tmp_path.iterdir()} == {
        "step-00000007.damaged", "step-12", *(f"step-{s:08d}" for s in kept)
    }  # fmt: skip


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.int64(7), (1, (2, [3])), {"tensor": 1, "dict": {}}, {3: "three"}, -0.0, 1e300, 2**70]
)
def test_values_keep_their_kind(tmp_path, value):
    state_files.save(tmp_path, 1, {"value": value})
    found = state_files.latest(tmp_path).tree["value"]
    assert found == value and type(found) is type(getattr(value, "item", lambda: value)())


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="a state cannot hold set"):
        state_files.save(tmp_path, 1, {"value": {1, 2}})


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_states_that_cannot_be_looked_at_are_no_reason_to_begin_anew(tmp_path, monkeypatch, number):
    state_files.save(tmp_path, 10, tree(1.0))
    state_files.save(tmp_path, 20, tree(2.0))
    listdir = os.listdir

    def failing(at):
        def call(path):
            if Path(path) == at:
                raise OSError(number, os.strerror(number))
            return listdir(path)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", failing(tmp_path))
        with pytest.raises(StorageError, match=rf"{tmp_path} cannot be read: {os.strerror(number)}"):
            state_files.latest(tmp_path)
    (tmp_path / "step-00000020" / "state.json").unlink()
    (tmp_path / "step-00000020" / "state.safetensors").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", failing(tmp_path / "step-00000020"))
        assert state_files.latest(tmp_path).step == 10
    assert (tmp_path / "step-00000020.damaged").is_dir()
