"""Two nodes on the loopback device, in one process: what one of them learns of the other, and when."""

from __future__ import annotations

import threading
import time

import pytest

from entrypoint.nodes import group
from entrypoint.nodes.cluster import Place
from entrypoint.nodes.group import Nodes
from entrypoint.processes import launch
from tests.support.ports import free_port
from trainer.process import vitals
from trainer.process.vitals import Vitals

TERMS = {"a": "b"}


@pytest.fixture
def guards():
    """What each of two machines shares with the parent of its program, and the variables that name it."""
    made = [Vitals.make() for _ in range(2)]
    yield [shared for shared, _ in made], [{vitals.VARIABLE: path} for _, path in made]
    for shared, _ in made:
        shared.close()


@pytest.fixture
def two(guards):
    """Two nodes that have not met."""
    port = free_port()
    nodes = [Nodes(Place(rank, 2, "127.0.0.1", port), timeout_s=20, environment=guards[1][rank]) for rank in range(2)]
    for node in nodes:
        node.watch_from_here()  # nobody sends signals to this process
    yield nodes
    for node in nodes:
        node._closed.set()
        node._undo.close()
        for link in node._links.values():
            link.close()


def meet(two):
    other = threading.Thread(target=two[1].agree, args=(TERMS,))
    other.start()
    assert two[0].agree(TERMS)
    other.join(20)
    assert two[1]._begun


def test_the_first_node_that_lets_the_others_go_ends_as_its_own_upload_does(two):
    """Where the engine ends a machine after 0, its results would be lost with it."""
    agreed = []
    other = threading.Thread(target=lambda: agreed.append(two[1].agree(TERMS)))
    other.start()
    two[0].dismiss("This job is done.")
    other.join(20)
    assert agreed == [False] and two[1].end(0, "") == 0
    assert two[0].end(75, "") == 75 and two[0].end(0, "") == 0


def test_a_node_that_still_fetches_hears_how_the_job_ends_and_gets_its_files_later(two, tmp_path):
    meet(two)
    first, other = tmp_path / "first", tmp_path / "other"
    first.mkdir()
    other.mkdir()
    (first / "prepared.json").write_text("{}")
    (first / "plan.json").write_text("not for others")
    two[0].share(first)
    deadline = time.monotonic() + 20
    while "prepared.json" not in two[0]._sent:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    two[0].end(77, "The upload was refused.")
    assert two[1]._wait(5) == group.Verdict(77, "The upload was refused.")
    two[1].share(other)
    assert [path.name for path in other.iterdir()] == ["prepared.json"]
    assert (other / "prepared.json").read_text() == "{}"


@pytest.mark.parametrize("place", [vitals.LIMIT, vitals.STOP])
def test_a_limit_of_the_first_node_is_the_last_start_of_all(two, guards, place):
    shared, environments = guards
    meet(two)
    shared[0].write(place, time.monotonic() - 1)
    two[0].end(143, "")
    assert two[1]._wait(5) == group.Verdict(143, "")
    assert vitals.is_last(environments[1])


def test_a_limit_of_another_node_is_the_last_start_of_the_first(two, guards, monkeypatch):
    shared, environments = guards
    asked = threading.Event()
    monkeypatch.setattr(group.os, "kill", lambda process, number: asked.set())
    meet(two)
    shared[1].write(vitals.LIMIT, time.monotonic() - 1)
    two[1].ask_stop(15)
    assert asked.wait(5) and vitals.is_last(environments[0])


def test_an_end_that_another_start_may_follow_says_nothing_of_the_last_one(two, guards):
    shared, environments = guards
    meet(two)
    shared[0].write(vitals.LIMIT, time.monotonic() + 60)
    two[0].end(143, "")
    assert two[1]._wait(5) is not None and not vitals.is_last(environments[1])


def test_the_loopback_device_is_never_named_to_trainers_of_several_machines(two, monkeypatch, tmp_path, job_plan):
    """An address that no interface is known to have: the library looks for it."""
    meet(two)
    plan = job_plan("flux")
    for found, expected in ((None, None), ("eth1", "eth1")):
        monkeypatch.setattr(group, "interface_of", lambda address, found=found: found)
        (own,) = launch._environments(plan, tmp_path, {}, two[1])
        assert own.get("GLOO_SOCKET_IFNAME") == own.get("NCCL_SOCKET_IFNAME") == expected


@pytest.mark.parametrize(
    ("code", "said"), [(0, "Node 0 has done its work."), (75, "Node 0 has ended with exit code 75: its log has the ")]
)
def test_what_another_node_says_of_an_end_without_a_word(two, tmp_path, code, said):
    meet(two)
    two[0].end(code, "")
    two[1]._wait(5)
    outcome = launch._watch_other(launch.Team(tmp_path, Vitals.make()[0], nodes=two[1]))
    assert outcome.code == code and outcome.message.startswith(said)
