"""Nodes on the loopback device, in one process: who comes, who is refused, what is made of what a stranger sends."""

import dataclasses
import socket
import subprocess
import sys
import threading

import pytest

from bench.network import why_not
from entrypoint.nodes import meeting
from entrypoint.nodes.cluster import Place
from entrypoint.nodes.interfaces import interface_of
from entrypoint.nodes.terms import differences, refusal, terms_of
from entrypoint.nodes.wire import LARGEST_LINE, Connection, LostError
from tests.support.ports import free_port
from trainer.spec.errors import UnreachableError


@pytest.fixture
def pair():
    server = socket.create_server(("127.0.0.1", 0))
    ends = socket.create_connection(server.getsockname()), server.accept()[0]
    server.close()
    yield ends
    for end in ends:
        end.close()


def test_a_message_arrives_with_its_content(pair):
    one, two = map(Connection, pair)
    one.send({"file": "ä\n"}, b"\0\n\xff")
    one.send({"ping": True})
    assert two.receive() == ({"file": "ä\n", "bytes": 3}, b"\0\n\xff") and two.receive() == ({"ping": True}, b"")
    assert one.peer_address == two.own_address == "127.0.0.1"
    one.close()
    with pytest.raises(LostError, match="has ended"):
        two.receive()


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n", b"[]\n", b'{"bytes": -1}\n', b'{"bytes": "x"}\n', b"{" * (LARGEST_LINE + 1)]
)
def test_what_is_no_message_ends_the_connection(pair, sent):
    two = Connection(pair[1])
    threading.Thread(target=pair[0].sendall, args=(sent,), daemon=True).start()
    with pytest.raises(LostError):
        two.receive()


def test_strangers_are_left_alone_and_a_node_is_greeted():
    place = Place(0, 2, "127.0.0.1", free_port())
    server = meeting.listen(place, timeout_s=1)
    greeted, came = [], threading.Event()

    def greet(link, hello):
        greeted.append((link, hello))
        came.set()

    threading.Thread(target=meeting.accept, args=(server, greet), daemon=True).start()
    with socket.create_connection(("127.0.0.1", place.port)) as stranger:
        stranger.sendall(b'{"kiln": 1, "rank": "1"}\n')
        assert stranger.recv(1) == b""
    link = meeting.connect(Place(1, 2, "127.0.0.1", place.port), {"a": "b"}, deadline=float("inf"), timeout_s=1)
    assert came.wait(10) and greeted[0][1] == {"kiln": 1, "rank": 1, "terms": {"a": "b"}}
    link.close()
    greeted[0][0].close()
    server.close()


def test_a_port_that_is_taken_and_a_node_that_is_not_there_are_named(monkeypatch):
    monkeypatch.setattr(meeting, "RETRY_S", 0.01)
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnreachableError, match=f"MASTER_PORT={port}: this port cannot be listened on"):
            meeting.listen(Place(0, 2, "127.0.0.1", port), timeout_s=0.1)
    place = Place(1, 2, "127.0.0.1", free_port())
    with pytest.raises(UnreachableError, match=rf"cannot be reached at 127.0.0.1:{place.port} \(MASTER_ADDR"):
        meeting.connect(place, {}, deadline=0.0, timeout_s=5)


def test_the_interface_of_an_address_is_found():
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.77") is None


SECOND = """
set -e
ip link set lo up
ip link add dummy7 type bridge
ip addr add 10.77.0.1/24 dev dummy7
ip addr add 10.77.0.2/24 dev dummy7
ip addr add 10.77.1.3/32 dev dummy7 label dummy7:x
ip link set dummy7 up
exec "$@"
"""


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.parametrize("address", ["10.77.0.1", "10.77.0.2", "10.77.1.3"])
def test_the_interface_of_its_second_address_is_found(address):
    program = "import sys; from entrypoint.nodes.interfaces import interface_of; print(interface_of(sys.argv[1]))"
    command = ["unshare", "-rn", "bash", "-c", SECOND, "second", sys.executable, "-c", program, address]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "dummy7\n"


def test_terms_name_what_differs(job_plan, images):
    plan = job_plan("flux")
    terms = terms_of(plan)
    assert terms == terms_of(plan) and terms["Kiln"] and terms["torch"]
    other = {**terms, "PARAMS_SEED": "7"}
    lines = differences(terms, {2: other, 1: terms})
    assert lines == [f"PARAMS_SEED: {terms['PARAMS_SEED']} on node 0, 7 on node 2"]
    assert "PARAMS_SEED" in refusal(lines) and "same image" in refusal(lines)


def test_a_file_from_an_address_is_the_same_whole_and_as_an_outline(job_plan, tmp_path):
    """A machine that was replaced has still to fetch what the others have; the path tells the address and version."""
    plan = job_plan("flux")
    file = tmp_path / "files" / "0123456789abcdef" / "0123456789ab" / "vae.safetensors"
    file.parent.mkdir(parents=True)
    plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, parts={"vae": str(file)}))
    found = []
    for content in (b"outline of the file", b"the whole file"):
        file.write_bytes(content)
        found.append((terms_of(plan), terms_of(plan, arrived=[file])))
    (local, arrived), (other_local, other_arrived) = found
    assert differences(arrived, {1: other_arrived}) == []
    assert len(differences(local, {1: other_local})) == 1  # a file of the user's own is compared
    elsewhere = dataclasses.replace(plan, model=dataclasses.replace(plan.model, parts={"vae": f"{file}2"}))
    assert differences(arrived, {1: terms_of(elsewhere, arrived=[tmp_path / f"{file}2"])}) != []
