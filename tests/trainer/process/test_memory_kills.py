"""Whether a process was killed for memory, by the kernel's own counters. The kernel's files are made up here."""

import os

import pytest

from trainer.process import memory_kills
from trainer.process.memory_kills import Counts

GIB = 2**30


@pytest.fixture(params=["2", "2 in a container", "1", "1 in a container"])
def kernel(tmp_path, request):
    """`kernel(kills, limit)`: the folders of a control group, and of the machine's figures."""
    version, _, contained = request.param.partition(" ")
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    path = "/docker/abc"
    top = groups if version == "2" else groups / "memory"
    folder = top if contained else top / path.strip("/")
    folder.mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(f"0::{path}\n" if version == "2" else f"9:cpu:/\n4:memory:{path}\n0::/\n")

    def write(kills, limit, machine=0):
        text = f"low 0\noom {kills}\noom_kill {kills}\n" if version == "2" else f"under_oom 0\noom_kill {kills}\n"
        (folder / ("memory.events" if version == "2" else "memory.oom_control")).write_text(text)
        none = "max" if version == "2" else str(2**63 - 4096)
        (folder / ("memory.max" if version == "2" else "memory.limit_in_bytes")).write_text(str(limit or none))
        (proc / "vmstat").write_text(f"nr_free_pages 5\noom_kill {machine}\n")
        (proc / "meminfo").write_text(f"MemTotal:       {32 * 2**20} kB\nMemFree: 1 kB\n")
        return {"groups": str(groups), "proc": str(proc)}

    return write


def test_a_container_that_reached_its_limit(kernel):
    before = memory_kills.count(**kernel(2, 8 * GIB))
    assert before == Counts(2, 0)
    found = memory_kills.explain(before, {"trainer 0": 7 * GIB, "uploader": GIB // 4}, **kernel(3, 8 * GIB, machine=1))
    assert "was killed by the kernel for memory: the container's limit of 8.0 GiB was reached" in found
    assert "in use: trainer 0 7.0 GiB, uploader 0.2 GiB. Fix: " in found and "probably" not in found


def test_a_machine_without_a_limit(kernel):
    before = memory_kills.count(**kernel(0, None))
    found = memory_kills.explain(before, **kernel(0, None, machine=1))
    assert "was killed by the kernel for memory: the machine's 32.0 GiB were used up" in found


def test_someone_else_may_have_done_it(kernel):
    where = kernel(2, 8 * GIB, machine=5)
    found = memory_kills.explain(memory_kills.count(**where), **where)
    assert "by someone, or probably for memory" in found and "of which the container may use 8.0 GiB" in found


def test_a_system_that_says_nothing(tmp_path):
    nowhere = {"groups": str(tmp_path / "a"), "proc": str(tmp_path / "b")}
    assert memory_kills.count(**nowhere) == Counts(None, None)
    assert "probably" in memory_kills.explain(Counts(None, None), **nowhere)


def test_memory_of_a_process_and_its_children():
    assert 2**20 < memory_kills.resident(os.getpid()) < 2**40
    assert memory_kills.resident(2**22 + 1) == 0
