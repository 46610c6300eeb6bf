"""A stranger's address leads to public hosts alone, whatever it looks like and wherever it leads."""

import contextlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from entrypoint.system.public_addresses import is_public, problem_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "number",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "100.127.255.255", "224.0.0.1", "239.1.1.1", "255.255.255.255", "240.0.0.1"),
        *("192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1"),
        *("::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:7f00:1", "::127.0.0.1", "fe80::1", "fe80::1%eth0"),
        *(
            "fec0::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
            "2001:db8::1",
            "2001::1",
            "2002:7f00:1::",
            "64:ff9b::a00:1",
        ),
        *("localhost", "example.com", "", "8.8.8.8.nip.io", "2130706433", "0x7f.1", "127.1"),
    ],
)
def test_a_number_inside_or_a_name_is_not_public(number):
    assert not is_public(number)


@pytest.mark.parametrize("number", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111"])
def test_a_number_outside_is_public(number):
    assert is_public(number)


@pytest.mark.parametrize(
    "host",
    [
        *(
            "localhost",
            "LOCALHOST",
            "localhost.",
            "a.localhost",
            "metadata",
            "metadata.google.internal",
            "printer.local",
        ),
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0177.0.0.1", "017700000001", "0", "10.1"),
        *(
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[fd00:ec2::254]",
            "[fe80::1%25eth0]",
            "169.254.169.254",
            "169.254.169.254.",
            "a",
        ),
        *(
            "user:pw@example.com",
            "user@example.com",
            "127.0.0.1:443",
            "①②⑦.⓪.⓪.①",
            "exa mple.com",
            "a..com",
            "-a.com",
            "",
        ),
        *(
            "example.com\\@127.0.0.1",
            "host.docker.internal",
            "router.home.arpa",
            "[bad",
            "example.com:port",
            "127.0.0.1%2f",
        ),
    ],
)
def test_an_address_that_names_no_public_host_is_refused_as_it_is_written(host):
    assert problem_of(f"https://{host}/x.zip")


@pytest.mark.parametrize("url", ["http://example.com/x", "HTTP://example.com", "ftp://example.com", "//example.com"])
def test_an_address_is_https(url):
    assert problem_of(url)


@pytest.mark.parametrize("host", ["example.com", "a-b.example.co.uk", "example.com.", "example.com:8443", "8.8.8.8"])
def test_a_public_host_is_taken(host):
    assert problem_of(f"https://{host}/x.zip?sig=a%2Fb#c") is None


class _Server(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(302 if self.path == "/elsewhere" else 200)
        self.send_header("Location", f"http://127.0.0.1:{self.server.elsewhere}/secret")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(elsewhere=9):
    running = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    running.asked, running.elsewhere = [], elsewhere
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def server():
    with serving() as running:
        yield running


# Ways to the same local server, each of which gives the name of what it raised, or "reached".
WAYS = """
import asyncio, json, socket, sys, urllib.request
import httpx
from entrypoint.system import public_addresses
port, environment = int(sys.argv[1]), json.loads(sys.argv[2])
resolve = socket.getaddrinfo
def rebound(host, *arguments, **options):  # as a name server would that gives an address inside
    return resolve("127.0.0.1" if host == "rebind.example.com" else host, *arguments, **options)
socket.getaddrinfo = rebound
if sys.argv[3] == "forbid":
    public_addresses.forbid()
else:
    public_addresses.guard(environment)
async def streams():
    await asyncio.open_connection("127.0.0.1", port)
def raw():
    with socket.socket() as connection:
        connection.connect(("127.0.0.1", port))
def by_name():
    with socket.socket() as connection:
        connection.connect_ex(("localhost", port))
def datagram():
    with socket.socket(type=socket.SOCK_DGRAM) as connection:
        connection.sendto(b"x", ("127.0.0.1", port))
def pair():
    import os, tempfile
    place = os.path.join(tempfile.mkdtemp(), "s")
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as connection:
        listening.bind(place); listening.listen(); connection.connect(place)
ways = {
    "httpx": lambda: httpx.get(f"http://127.0.0.1:{port}/", trust_env=False),
    "rebound": lambda: httpx.get(f"http://rebind.example.com:{port}/", trust_env=False),
    "mapped": lambda: httpx.get(f"http://[::ffff:127.0.0.1]:{port}/", trust_env=False),
    "redirect": lambda: httpx.get(f"http://127.0.0.1:{port}/elsewhere", trust_env=False, follow_redirects=True),
    "decimal": lambda: httpx.get(f"http://2130706433:{port}/", trust_env=False),
    "urllib": lambda: urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/"),
    "asyncio": lambda: asyncio.run(streams()),
    "raw": raw, "by name": by_name, "datagram": datagram, "unix": pair,
}
found = {}
for name, way in ways.items():
    try:
        way()
        found[name] = "reached"
    except Exception as problem:
        found[name] = type(problem).__name__
print(json.dumps(found))
"""


def ways(server, environment, mode="guard"):
    arguments = [sys.executable, "-c", WAYS, str(server.server_port), json.dumps(environment), mode]
    done = subprocess.run(arguments, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_is_connected_to_counts_and_no_library_goes_around_it(server):
    found = ways(server, {"KILN_PUBLIC_ADDRESSES": "1"})
    assert found.pop("unix") == "reached"
    assert set(found.values()) == {"SettingsError"} and len(found) == 10 and server.asked == []


def test_without_a_stranger_all_are_reached(server):
    found = ways(server, {})
    assert found.pop("redirect") == "ConnectError"  # nobody is there
    assert set(found.values()) == {"reached"} and len(server.asked) >= 4


def test_the_operators_own_hub_may_be_inside_and_leads_nowhere_else():
    with serving() as inside, serving(elsewhere=inside.server_port) as hub:
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        found = ways(hub, {"KILN_PUBLIC_ADDRESSES": "1", "HF_ENDPOINT": endpoint})
        assert found["httpx"] == found["rebound"] == "reached" and found["mapped"] == "SettingsError"
        assert found["redirect"] == "SettingsError" and "/elsewhere" in hub.asked and inside.asked == []


def test_the_reader_of_datasets_connects_to_nothing(server):
    found = ways(server, {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}, mode="forbid")
    assert found.pop("unix") == "reached" and set(found.values()) == {"SettingsError"}
