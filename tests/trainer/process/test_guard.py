"""The parent of a command ends it when asked, whatever it does, and passes its exit code on."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BEGIN = """
import os, signal, sys, time
from trainer.process import guard, vitals
guard.begin(sys.argv[1] if sys.argv[1:] else "trainer.process.guard")
"""
READY = "print('ready', os.getpid(), flush=True)\n"
SLEEP = READY + "time.sleep(600)"
FOR_EVER = {
    "a pipe that nobody fills": "os.mkfifo(sys.argv[2])\n" + READY + "open(sys.argv[2]).read()",
    "a call that keeps Python's lock": "import ctypes\n" + READY + "ctypes.PyDLL(None).sleep(600)",
    "an expression that takes for ever": "import re\n" + READY + "re.match('(a*)*b', 'a' * 60)",
    "a process that ignores all": "[signal.signal(n, signal.SIG_IGN) for n in (15, 2, 1)]\n" + SLEEP,
    "a process that is stopped": READY + "os.kill(os.getpid(), signal.SIGSTOP)",
    "a process with a grace that does not answer": "vitals.allow(os.environ, 0.3)\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP,
}


@pytest.fixture
def start(tmp_path):
    """`start(code, ...)`: a program that begins with the guard, after it has said so; and the number of its child."""
    started = []
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup

    def begun(code, farewell="trainer.process.guard", **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True, **options}
        arguments = [sys.executable, "-S", "-c", BEGIN + code, farewell, str(tmp_path / "fifo")]
        process = subprocess.Popen(arguments, cwd=ROOT, **options)
        started.append(process)
        child = int(process.stdout.readline().split()[1]) if "ready" in code else 0
        return process, child

    yield begun
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    signal.signal(signal.SIGHUP, before)


def ends(process, number, within=2.0):
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert time.monotonic() - began < within
    return process.returncode, errors.decode()


@pytest.mark.parametrize("what", FOR_EVER)
def test_a_stop_is_a_stop(start, what):
    process, child = start(FOR_EVER[what])
    assert ends(process, signal.SIGTERM) == (143, "Stopped by SIGTERM. [exit 143]\n")
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_each_signal_has_its_code_and_more_of_them_are_one(start, number, code):
    process, _ = start(SLEEP)
    for _ in range(3):
        process.send_signal(number)
    assert ends(process, number)[0] == code


def test_ctrl_c_reaches_all_processes_of_a_terminal_and_is_one_stop(start):
    process, _ = start(SLEEP)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(5) == 130 and process.stderr.read() == b"Stopped by Ctrl-C. [exit 130]\n"


def test_who_answers_is_waited_for(start):
    """Its own exit code counts, and it has said itself how it ended."""
    answers = "vitals.allow(os.environ, 60)\ndef answer(*_):\n  time.sleep(1)\n  os._exit(74)\n"
    process, _ = start(answers + "signal.signal(signal.SIGTERM, answer)\n" + SLEEP)
    assert ends(process, signal.SIGTERM) == (74, "")


def test_a_grace_may_be_prolonged_after_the_signal(start):
    answers = "shared = vitals.Vitals.of(os.environ)\nshared.allow(0.4)\n"
    answers += "def answer(*_):\n  shared.answer()\n  shared.allow(0)\n  time.sleep(1)\n  os._exit(143)\n"
    process, _ = start(answers + "signal.signal(signal.SIGTERM, answer)\n" + SLEEP)
    assert ends(process, signal.SIGTERM) == (143, "")


def ignoring(*numbers):
    def prepare():
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    return prepare


def test_nohup_protects_and_a_stop_still_stops(start):
    process, _ = start(SLEEP, preexec_fn=ignoring(signal.SIGHUP))
    os.killpg(process.pid, signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    assert ends(process, signal.SIGTERM)[0] == 143


def test_ctrl_c_is_not_for_a_job_in_the_background_of_a_script_but_kill_is(start):
    """Shells start such jobs with SIGINT ignored."""
    ours, theirs = pty.openpty()

    def in_terminal():
        os.setsid()
        os.close(os.open(os.ttyname(theirs), os.O_RDWR))  # becomes the terminal that controls it
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process, _ = start(SLEEP, preexec_fn=in_terminal, start_new_session=False, stdin=theirs)
    os.write(ours, b"\x03")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    assert ends(process, signal.SIGINT)[0] == 130
    os.close(ours)
    os.close(theirs)


def blocking():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})


@pytest.mark.parametrize("prepare", [ignoring(signal.SIGCHLD), blocking])
def test_what_a_launcher_has_left_of_signals_changes_nothing(start, prepare):
    process, _ = start(SLEEP, preexec_fn=prepare)
    assert ends(process, signal.SIGTERM)[0] == 143
    process, _ = start("sys.exit(3)", preexec_fn=prepare)
    assert process.wait(5) == 3


@pytest.mark.parametrize(
    ("code", "expected"), [("pass", 0), ("sys.exit(78)", 78), ("1 / 0", 1), ("os.kill(os.getpid(), 11)", 139)]
)
def test_the_exit_code_is_the_childs(start, code, expected):
    process, _ = start(code)
    assert process.wait(5) == expected


def test_a_child_that_is_killed_is_worth_another_try(start):
    process, child = start(SLEEP)
    os.kill(child, signal.SIGKILL)
    assert process.wait(5) == 75
    said = process.stderr.read().decode()
    assert said.startswith("The program was killed") and "Fix: " in said and said.endswith("[exit 75]\n")


def test_nothing_is_left_behind(start, tmp_path):
    """Neither a process, in whatever session, nor the temporary files."""
    scratch = tmp_path / "scratch"
    (scratch / "below").mkdir(parents=True)
    orphan = "import subprocess\nown = subprocess.Popen([sys.executable, '-S', '-c', 'import os, time; "
    orphan += "os.fork() and os._exit(0); os.setsid(); time.sleep(600)'])\nown.wait()\n"
    process, _ = start(orphan + f"vitals.Vitals.of(os.environ).write_scratch({str(scratch)!r})\n" + SLEEP)
    session = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if b"os.setsid" in read(path)]
    assert len(session) >= 3  # the parent, the child, and what it has left in a session of its own
    assert ends(process, signal.SIGTERM)[0] == 143
    assert not scratch.exists()
    assert [number for number in session if Path(f"/proc/{number}").exists() and number not in (os.getpid(),)] == []


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_when_the_parent_is_killed_the_child_ends(start):
    process, child = start(SLEEP)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}/cmdline").exists() and read(Path(f"/proc/{child}/cmdline")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_farewell_that_hangs_is_given_up(start, tmp_path):
    (tmp_path / "hanging.py").write_text("import time\ndef say(ending):\n    time.sleep(600)\n")
    process, _ = start(SLEEP, farewell="hanging", env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert ends(process, signal.SIGTERM)[0] == 143


def test_descriptors_that_were_closed_are_not_given_to_other_files(start, tmp_path):
    file = tmp_path / "file"
    process, _ = start(
        f"open({str(file)!r}, 'w').write(str(sorted(map(int, os.listdir('/proc/self/fd')))[:3]))",
        preexec_fn=lambda: os.closerange(0, 3), stdout=None, stderr=None,
    )  # fmt: skip
    assert process.wait(5) == 0 and file.read_text() == "[0, 1, 2]"
