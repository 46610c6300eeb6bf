"""Programs of ours that tests start, from a process that has imported everything once (forking_server.py)."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# As trainers get them (entrypoint/system/environment.py), and as they set them before they import the libraries.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONPATH": str(ROOT), "KILN_ROOM": "." * 2**15,  # where a fork's own environment is shown (forked.py)
}  # fmt: skip
START_S = 240.0  # for the imports, on a busy machine


def basic_environment() -> dict[str, str]:
    """What every program needs, and no port: nothing else that changes what ours do."""
    return {"MONITOR_PORT": "0", **{k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}}


class Program:
    """A running program: what tests use of `subprocess.Popen`. What it prints goes to a file, so it never waits."""

    def __init__(
        self, connection: socket.socket, arguments: list[str], output: Path, errors: Path, server_errors: Path
    ) -> None:
        self.args, self.returncode = arguments, None
        self._connection, self._output, self._errors = connection, output, errors
        self._server_errors = server_errors
        self.pid: int = self._answer(START_S)["pid"]

    def _answer(self, timeout: float | None) -> dict[str, int]:
        """The next answer; {} where there is none within `timeout` seconds."""
        if not select.select([self._connection], [], [], timeout)[0]:
            return {}
        message = self._connection.recv(4096)
        assert message, f"the forking process is gone: {_text(self._server_errors)}"
        return json.loads(message)

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            answer = self._answer(timeout)
            if not answer:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = answer["code"]
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it printed, and its errors: "" where these are among what it printed."""
        self.wait(timeout)
        return self.printed(), _text(self._errors) if self._errors != self._output else ""

    def printed(self) -> str:
        """So far."""
        return _text(self._output)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self) -> None:
        """Kill it and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


class Interpreter(subprocess.Popen):
    """A program that is an interpreter of its own, with the same ways to look at it."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], cwd: Path, output: Path, errors: Path):
        self._output, self._errors = output, errors
        with output.open("ab") as out, errors.open("ab") as err:
            super().__init__(
                [sys.executable, *arguments], env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out,
                stderr=err, process_group=0,
            )  # fmt: skip

    communicate = Program.communicate  # type: ignore[assignment]
    printed = Program.printed
    end = Program.end


class Programs:
    """Starts programs. The process that forks them starts with the first, and ends with `close`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kiln-tests-")
        self._server: subprocess.Popen[bytes] | None = None
        self._forks = True
        self._started: list[Program | Interpreter] = []
        self._count = 0

    def start(
        self,
        *arguments: str,
        environment: Mapping[str, str],
        cwd: Path = ROOT,
        output: Path | None = None,
        errors: Path | None = None,
        own_interpreter: bool = False,
    ) -> Program | Interpreter:
        """`python ARGUMENTS` with that environment alone and no input. What it prints is appended to `output`.

        Errors go there too, unless `errors` is another file. With `own_interpreter` it is not forked.
        """
        self._count += 1
        output = output or Path(self._folder.name) / f"{self._count}.txt"
        errors = errors or output
        if own_interpreter or not self.is_forking():
            program: Program | Interpreter = Interpreter([*arguments], environment, cwd, output, errors)
        else:
            program = self._fork([*arguments], environment, cwd, output, errors)
        self._started.append(program)
        return program

    def run(self, *arguments: str, environment: Mapping[str, str], timeout: float = 240, **options: object):
        """As `subprocess.run` that captures output and errors apart."""
        self._count += 1
        files = [Path(self._folder.name) / f"{self._count}.{name}.txt" for name in ("out", "err")]
        program = self.start(*arguments, environment=environment, output=files[0], errors=files[1], **options)
        output, errors = program.communicate(timeout)
        return subprocess.CompletedProcess(program.args, program.returncode, output, errors)

    def end_all(self) -> None:
        """End what a test has left running."""
        for program in self._started:
            if program.poll() is None:
                program.end()
        self._started.clear()

    def close(self) -> None:
        self.end_all()
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait(timeout=60)
            self._server.stdout.close()
        self._folder.cleanup()

    def is_forking(self) -> bool:
        """Whether programs are forked here; the first call waits for the process that forks them."""
        if self._server is None:
            own = {**basic_environment(), **ENVIRONMENT, "HF_HOME": str(Path(self._folder.name) / "hf")}
            command = [sys.executable, "-m", "tests.support.forking_server", str(self._socket)]
            with self._server_errors.open("wb") as err:
                self._server = subprocess.Popen(
                    command, cwd=ROOT, env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=err,
                    process_group=0,
                )  # fmt: skip
            said = self._server.stdout.readline().strip()
            assert said in (b"ready", b"accelerator"), _text(self._server_errors)
            self._forks = said == b"ready"
        return self._forks

    @property
    def _server_errors(self) -> Path:
        return Path(self._folder.name) / "forking-server.txt"

    @property
    def _socket(self) -> Path:
        return Path(self._folder.name) / "socket"

    def _fork(
        self, arguments: list[str], environment: Mapping[str, str], cwd: Path, output: Path, errors: Path
    ) -> Program:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(self._socket))
        asked = json.dumps({"arguments": arguments, "environment": dict(environment), "cwd": str(cwd)}).encode()
        with open(os.devnull, "rb") as nothing, output.open("ab") as out, errors.open("ab") as err:
            socket.send_fds(connection, [asked], [f.fileno() for f in (nothing, out, err)])
        return Program(connection, [sys.executable, *arguments], output, errors, self._server_errors)


def wait_for(condition, seconds: float = 60.0) -> None:
    """Return as soon as `condition()` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
