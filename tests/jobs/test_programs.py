"""Programs that are forked from a process which has imported everything behave as those of a new interpreter."""

import signal
from pathlib import Path

import pytest

from tests.support.programs import basic_environment, wait_for

EVERY = pytest.mark.parametrize("own_interpreter", [False, True], ids=["forked", "own interpreter"])
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "trainer", sys.argv[1]], env={**os.environ, "PARAMS_SEED": "17"})
print(os.getpid(), child.pid, flush=True)
print(child.wait(), flush=True)
"""
WAITING = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); print(1, flush=True)"


@pytest.fixture
def run(programs):
    """`run(code, *arguments, own_interpreter, **variables)`."""

    def run(code, *arguments, own_interpreter=False, **variables):
        environment = {**basic_environment(), **variables}
        return programs.run("-c", code, *arguments, environment=environment, own_interpreter=own_interpreter)

    return run


@EVERY
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("import sys; sys.exit(78)", 78),
        ("import sys; sys.exit('a message')", 1),
        ("1 / 0", 1),
        ("import os; os._exit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15),
        # A shell starts its background jobs with SIGINT ignored, and a child of the tests inherits that.
        (
            "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "os.kill(os.getpid(), signal.SIGINT)",
            -2,
        ),
    ],
)
def test_exit_codes(run, own_interpreter, code, expected):
    done = run(code, own_interpreter=own_interpreter)
    assert done.returncode == expected and done.stdout == ""
    assert ("a message" in done.stderr) == ("message" in code)
    assert ("ZeroDivisionError: division by zero" in done.stderr) == ("/" in code)


@EVERY
def test_a_program_has_its_own_arguments_environment_and_streams(run, own_interpreter):
    code = "import os, sys; print(sys.argv, *sorted(os.environ)); print(os.getcwd(), file=sys.stderr);"
    code += "print(repr(sys.stdin.read()), open('/proc/self/environ').read().rstrip(chr(0)).split(chr(0))[-1])"
    done = run(code, "one", "two", own_interpreter=own_interpreter, KILN_X="7")
    first, second = done.stdout.splitlines()
    assert first.startswith("['-c', 'one', 'two'] ") and "KILN_X" in first and "HF_HUB_OFFLINE" not in first
    assert second == "'' KILN_X=7"
    assert done.stderr == f"{Path(__file__).parents[2]}\n"


@EVERY
def test_threads_are_waited_for_and_what_is_registered_is_done_at_the_end(run, own_interpreter):
    code = "import atexit, threading, time; atexit.register(print, 'end');"
    code += "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()"
    assert run(code, own_interpreter=own_interpreter).stdout == "thread\nend\n"


@EVERY
def test_a_signal_reaches_the_program(programs, own_interpreter):
    arguments = ("-c", f"{WAITING}; time.sleep(60)")
    program = programs.start(*arguments, environment=basic_environment(), own_interpreter=own_interpreter)
    wait_for(program.printed)
    program.send_signal(signal.SIGTERM)
    assert program.wait(20) == 9


@EVERY
def test_a_trainer_is_a_child_of_its_entrypoint_and_its_failure_is_seen(run, own_interpreter, tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text("{")
    done = run(PARENT, str(plan), own_interpreter=own_interpreter, OMP_NUM_THREADS="1")
    numbers, code = done.stdout.splitlines()
    assert len(set(numbers.split())) == 2 and code == "78"
    assert f"ERROR {plan}: " in done.stderr and "[exit 78]" in done.stderr and done.returncode == 0


def test_programs_left_running_are_ended_with_all_that_they_started(all_programs):
    code = f"import subprocess; subprocess.Popen(['sleep', '60']); {WAITING}; time.sleep(60)"
    program = all_programs.start("-c", code, environment=basic_environment())
    wait_for(program.printed)
    (sleeper,) = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    all_programs.end_all()
    assert program.returncode == -signal.SIGKILL
    wait_for(lambda: ended(sleeper))


def ended(number):
    stat = Path(f"/proc/{number}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
