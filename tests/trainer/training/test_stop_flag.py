"""Which signals ask for a stop, which of them counts, and what the parent is told of it. Real signals."""

import ctypes
import os
import signal
import threading

import pytest

from trainer.process import vitals as shared
from trainer.process.vitals import Vitals
from trainer.spec.errors import StopRequestedError
from trainer.training.stop_flag import StopFlag

OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2  # linux/prctl.h


def signal_at_parents_death():
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(PR_GET_PDEATHSIG, ctypes.byref(number))
    return number.value


@pytest.fixture(autouse=True)
def restored():
    """The handlers, the mask and what the parent's death sends are afterwards as they were."""
    handlers = {number: signal.getsignal(number) for number in OURS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    at_death = signal_at_parents_death()
    yield
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, at_death)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.fixture
def vitals():
    one, _ = Vitals.make()
    yield one
    one.close()


@pytest.mark.parametrize(
    ("received", "code", "name"),
    [
        ([signal.SIGTERM], 143, "SIGTERM"),
        ([signal.SIGINT], 130, "Ctrl-C"),
        ([signal.SIGHUP], 143, "SIGTERM"),
        ([signal.SIGINT, signal.SIGTERM], 130, "Ctrl-C"),
        ([signal.SIGHUP, signal.SIGINT], 143, "SIGTERM"),
    ],
)
def test_the_first_signal_decides_how_the_job_ends(received, code, name):
    flag = StopFlag()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    flag.listen()
    flag.check(" never")
    assert not flag.requested
    for number in received:
        os.kill(os.getpid(), number)
    assert flag.requested
    with pytest.raises(StopRequestedError, match=f"^Stopped by {name} while it slept\\.$") as problem:
        flag.check(" while it slept")
    assert problem.value.exit_code == code
    with pytest.raises(StopRequestedError, match=f"^Stopped by {name}\\.$"):
        flag.check()


def test_signals_that_a_parent_has_blocked_arrive_and_its_death_is_one():
    signal.pthread_sigmask(signal.SIG_BLOCK, OURS)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)
    StopFlag().listen()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(OURS)
    assert signal_at_parents_death() == signal.SIGTERM


def test_a_hangup_that_is_ignored_stays_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    flag = StopFlag()
    flag.listen()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGHUP)
    assert not flag.requested


def test_a_process_beside_the_first_ignores_all_three():
    flag = StopFlag()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    flag.listen()
    flag.ignore()
    for number in OURS:
        os.kill(os.getpid(), number)
    assert not flag.requested


def test_the_parent_learns_of_a_stop_when_the_main_thread_asks(vitals):
    flag = StopFlag(vitals)
    assert not flag.requested and vitals.read(shared.GRACE) is None
    flag._received(signal.SIGTERM, None)
    seen = []
    other = threading.Thread(target=lambda: seen.append(flag.requested))
    other.start()
    other.join()
    assert seen == [True] and vitals.read(shared.GRACE) is None  # that thread saves nothing
    assert flag.requested and vitals.read(shared.GRACE) == 300.0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_before_training_a_signal_ends_the_process_at_once(monkeypatch, capfd, vitals, number, code):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    flag = StopFlag()
    flag._received(number, None)
    assert ended == [] and capfd.readouterr().err == ""
    flag.ends_at_once = True
    flag._received(number, None)
    line = capfd.readouterr().err
    assert ended == [code] and " before training began. " in line and line.endswith(f"[exit {code}]\n")
    guarded = StopFlag(vitals)
    guarded.ends_at_once = True
    guarded._received(number, None)
    assert ended == [code, code] and capfd.readouterr().err == ""  # the parent says it
