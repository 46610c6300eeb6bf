"""Runs the commands of a document, as somebody who follows it does: in bash, block after block, in one folder.

`.venv/bin/python` there hands its arguments and environment to the test, which starts our program with them. So a
`cat`, `export` or `cd` of the document counts, and a program starts from the process that has imported everything.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.programs import ROOT, Programs, basic_environment

ASK = """#!/usr/bin/env bash
call="$DOCUMENT_CALLS/$$"
env -0 > "$call.environment"
printf '%s\\0' "$@" > "$call.arguments"
touch "$call.asked"
until [ -e "$call.code" ]; do sleep 0.05; done
cat "$call.printed"
exit "$(cat "$call.code")"
"""


def blocks(document: str, language: str = "sh") -> list[str]:
    """The fenced blocks of a document in that language, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@dataclass
class Reader:
    """Somebody who follows a document: with a home, a folder to work in, and programs to start."""

    place: Path
    programs: Programs
    own_interpreter: bool = False
    variables: dict[str, str] = field(default_factory=dict)  # that are set before the first command
    calls: list[list[str]] = field(default_factory=list)  # the arguments of each call of Python, in order

    def __post_init__(self) -> None:
        for folder in (self.home, self.work / ".venv" / "bin", self.place / "bin", self.place / "calls"):
            folder.mkdir(parents=True, exist_ok=True)
        self.put(self.work / ".venv" / "bin" / "python", ASK)

    @property
    def home(self) -> Path:
        return self.place / "home"

    @property
    def work(self) -> Path:
        return self.place / "work"

    def put(self, path: Path, script: str) -> None:
        """A program at `path`."""
        path.write_text(script, encoding="utf-8")
        path.chmod(0o755)

    def stand_in(self, name: str, script: str) -> None:
        """A program of this name that comes before all others."""
        self.put(self.place / "bin" / name, f"#!/usr/bin/env bash\n{script}\n")

    def follow(self, script: str) -> tuple[int, str]:
        """The exit code of the commands, and all that was printed; they end with the first that fails."""
        calls = self.place / "calls"
        environment = {
            **basic_environment(),
            "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "DOCUMENT_CALLS": str(calls),
            **self.variables,
        }
        printed = self.place / "printed.txt"
        with printed.open("wb") as output:
            shell = subprocess.Popen(
                ["bash", "-c", f"set -euo pipefail\n{script}"],
                cwd=self.work, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
            while shell.poll() is None:
                for asked in sorted(calls.glob("*.asked")):
                    asked.unlink()
                    self._answer(asked.with_suffix(""))
                time.sleep(0.02)
        return shell.returncode, printed.read_text(encoding="utf-8", errors="replace")

    def _answer(self, call: Path) -> None:
        """Start what `call` asks for, wait for its end, and hand its output and exit code to the shell."""
        given = call.with_suffix(".environment").read_bytes().decode().rstrip("\0").split("\0")
        environment = dict(line.split("=", 1) for line in given)
        arguments = call.with_suffix(".arguments").read_bytes().decode().rstrip("\0").split("\0")
        self.calls.append(arguments)
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
        program = self.programs.start(
            *arguments, environment={**environment, **own}, cwd=self.work,
            output=call.with_suffix(".printed"), own_interpreter=self.own_interpreter,
        )  # fmt: skip
        code = program.wait(900)
        waiting = call.with_suffix(".waiting")
        waiting.write_text(str(code), encoding="utf-8")
        waiting.rename(call.with_suffix(".code"))


def pattern(line: str) -> str:
    """A line of a log without what differs from run to run: its time, numbers, and the reader's home."""
    line = re.sub(r"^\d\d:\d\d:\d\d ", "", line.strip())
    line = re.sub(r"(?:/[\w./-]*)?/home(?:/me)?(?=/)", "~", line)
    line = line.replace("mini-", "")
    line = re.sub(r"[KMG]iB", "GiB", line)
    return re.sub(r"\d[\d,.:]*(?:e[+-]\d+)?", "#", line)
