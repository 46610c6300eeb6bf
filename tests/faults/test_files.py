"""C6 and C7: files of users stay as they are, and files of a job that are damaged are set aside and made anew."""

import os
import random
import shutil

import pytest

DRAWS = int(os.environ.get("DRAWS", "12"))
STOP = {"kind": "signals", "step": 5, "signals": [15]}


@pytest.fixture
def stopped(run):
    """The tiny job, stopped after step 5: with two saves, one of them of step 4."""
    assert run(STOP) == 143, run.said()
    return run


# ---- damage


def flip(path):
    data = bytearray(path.read_bytes() or b"x")
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def flip_the_first(path):
    data = bytearray(path.read_bytes() or b"x")
    data[0] ^= 128
    path.write_bytes(data)


def instead(make):
    def replace(path):
        path.unlink()
        make(path)

    return replace


DAMAGE = {
    "flip": flip,
    "flip the first": flip_the_first,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(random.Random(1).randbytes(3000)),
    "nul": lambda path: path.write_bytes(bytes(500)),
    "another type": lambda path: path.write_text("[1, 2]"),
    "another object": lambda path: path.write_text('{"notes": "mine"}'),
    "deep": lambda path: path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000),
    "gone": instead(lambda _: None),
    "folder": instead(lambda path: path.mkdir()),
    "pipe": instead(os.mkfifo),
    "full": instead(lambda path: path.symlink_to("/dev/full")),
    "zeros": instead(lambda path: path.symlink_to("/dev/zero")),
    "loop": instead(lambda path: path.symlink_to(path.name)),
    "nowhere": instead(lambda path: path.symlink_to("/nonexistent/a")),
}


def written(out):
    """Every file of a job but its states and LoRA files, which follow rules of their own."""
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    return sorted(path for path in files if "state" not in path.relative_to(out).parts)


def ends_well(run, tiny):
    code = run.wait(timeout=120) if run.start() else None
    assert code == 0, (code, run.said()[-3000:])
    assert "Traceback" not in run.said() and "Resumed at step 5 of 24" in run.said()
    assert run.final == tiny.reference
    assert run.orphans() == []


def test_one_flipped_bit_in_each_file_is_set_aside_or_does_not_matter(stopped, tiny):
    files = written(stopped.out)
    assert {"metrics.jsonl", "plan.json", "run.json", "status.json", "run.log"} <= {path.name for path in files}
    for path in files:
        flip(path)
    ends_well(stopped, tiny)
    assert (stopped.out / "run.json.set-aside").is_file() and "run.json.set-aside" in stopped.said()
    assert [row["step"] for row in stopped.metrics()][-1] == 24


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_all_files_of_a_job_are_damaged_at_once(stopped, tiny, kind):
    for path in written(stopped.out):
        DAMAGE[kind](path)
    ends_well(stopped, tiny)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "loop", "pipe"])
def test_folders_of_a_job_are_something_else(stopped, tiny, kind):
    for name in ("logs", "sample", "runs"):
        shutil.rmtree(stopped.out / name, ignore_errors=True)
        if kind == "file":
            (stopped.out / name).write_text("mine")
        elif kind == "loop":
            (stopped.out / name).symlink_to(name)
        else:
            os.mkfifo(stopped.out / name)
    ends_well(stopped, tiny)


@pytest.mark.slow
def test_random_files_are_damaged_at_random(run, tiny, tmp_path):
    assert run(STOP) == 143, run.said()
    shutil.copytree(run.out, tmp_path / "before")
    dice = random.Random(18)
    for _ in range(DRAWS):
        shutil.rmtree(run.out)
        shutil.copytree(tmp_path / "before", run.out)
        run.log.unlink()
        for path in dice.sample(written(run.out), 3):
            kind = dice.choice(list(DAMAGE))
            print(f"{path.relative_to(run.out)}: {kind}")
            DAMAGE[kind](path)
        ends_well(run, tiny)


# ---- files of users

NAMES = (
    *("x-step00000001-my-favourite.safetensors", "x-step00000004.safetensors.bak", "x.safetensors.bak"),
    *(".my.tmp.notes", ".x.tmp.safetensors", ".x-step00000004.notes.tmp.safetensors", ".status.tmp.json"),
    *(
        ".step-mine.tmp",
        "mine.damaged",
        "step-mine.png",
        "step-00000000-00.mine.png",
        "notes.txt",
        ".hidden",
        "README.md",
    ),
)


def put_decoys(run):
    """Files of a user in every folder that a job writes in; path → content."""
    cache = run.folder / "cache"
    (run.out / "runs").mkdir(exist_ok=True)
    (run.out / "sample").mkdir(exist_ok=True)
    (run.out / "state" / "step-00000002").mkdir()
    (run.out / "state" / ".step-00000003.mine.tmp").mkdir()
    (cache / "datasets").mkdir(parents=True, exist_ok=True)
    (cache / "mine").mkdir()
    decoys = {}
    for folder in [run.out, cache, *(path for top in (run.out, cache) for path in top.rglob("*") if path.is_dir())]:
        for name in NAMES:
            path = folder / name
            content = f"mine: {path}"
            path.write_text(content)
            decoys[path] = content
    return decoys


def changed(decoys):
    return [path for path, content in decoys.items() if not path.is_file() or path.read_text() != content]


@pytest.mark.slow
def test_files_of_a_user_stay_whatever_becomes_of_a_job(run, tiny):
    """A whole job with pruning, stopped and resumed; a second run; and one that fails."""
    own = {"cache": str(run.folder / "cache"), "keep_checkpoints": 1}
    assert run(STOP, output=own) == 143, run.said()
    decoys = put_decoys(run)
    assert len(decoys) > 100
    assert run(output=own) == 0 and run.final == tiny.reference, run.said()
    assert changed(decoys) == []
    assert not (run.out / "x-step00000004.safetensors").exists(), "pruned"
    assert sorted(path.name for path in run.out.glob("state/step-*/state.json")) == ["state.json"]
    assert run(output=own, train={"seed": 7}) == 0 and changed(decoys) == []
    assert (run.out / "x-2.safetensors").is_file()
    bad = {"kind": "grad", "factor": "nan", "step": 1, "times": 10_000}
    assert run(bad, output=own, train={"seed": 8}) == 70 and changed(decoys) == []
    assert run(output=own) == 0 and changed(decoys) == []


MINE = {
    "status.json": '{"mine": 1}',
    "plan.json": '{"plan": "of something else"}',
    "run.json": '{"name": "mine"} ',
    "crashes.json": '{"plan": "mine"}',
    "upload.json": '{"mine": 1}',
    "metrics.jsonl": '{"step": 1, "accuracy": 0.5}\n{"step": 2, "accuracy": 0.6}\n',
    "run.log": "what I did today\n",
    "hang.txt": "a rope\n",
    "dataset-report.txt": "my report\n",
    "dataset-report.csv": "a,b\n",
    "dataset-images.jsonl": "my list\n",
    ".lease": "mine",
}


def test_a_users_files_of_the_names_that_a_job_writes_are_kept(run):
    run.out.mkdir(parents=True)
    for name, content in MINE.items():
        (run.out / name).write_text(content)
    assert run(train={"max_steps": 4}) == 0, run.said()
    for name, content in MINE.items():
        if name != "run.json":  # a record that says nothing but a name is that of an older version
            assert (run.out / f"{name}.set-aside").read_text() == content, name
            assert f"{name}.set-aside" in run.said()


@pytest.mark.slow
def test_a_users_lora_of_the_name_of_a_later_save_is_kept(stopped, tiny):
    (stopped.out / "x-step00000008.safetensors").write_text("mine")
    (stopped.out / "x.safetensors.unverified").write_text("mine")
    ends_well(stopped, tiny)
    for name in ("x-step00000008.safetensors", "x.safetensors.unverified"):
        assert (stopped.out / f"{name}.set-aside").read_text() == "mine"
