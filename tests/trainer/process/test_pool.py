"""Work that several processes share through pipes: in order, complete, and with the end that its worst part has."""

import multiprocessing
import os
import signal
import threading
import time
import warnings

import pytest

from trainer.process.pool import KilledWorkerError, in_processes


def nothing():
    pass


def no_warnings():
    warnings.simplefilter("error")


def doubled(number):
    return 2 * number


def first_waits_for_last(thing):
    """`thing`: a number, and the file that the last one makes."""
    number, mark = thing
    if number == 39:
        mark.touch()
    deadline = time.monotonic() + 60
    while number == 0 and not mark.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return number


def refused_from_five(number):
    if number >= 5:
        raise ValueError(f"{number} is too large")
    return number


def killed_at_five(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


class OddError(Exception):
    """As many libraries' are: pickled, it would be made again from its text alone."""

    def __init__(self, number, file):
        super().__init__(f"{number} in {file} is odd")


class LockedError(Exception):
    """Holds what cannot be pickled."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


def odd(number):
    if number == 2:
        raise OddError(number, "x.png")
    return number


def locked(number):
    if number == 2:
        raise LockedError("2 is locked")
    return number


def warned(number):
    warnings.warn("old", stacklevel=1)
    return number


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("things", [0, 1, 2, 50])
def test_each_has_its_result_in_order(count, things):
    assert list(in_processes(doubled, range(things), count=count, enter=nothing)) == [2 * i for i in range(things)]
    assert multiprocessing.active_children() == []


def test_others_go_on_while_one_is_slow(tmp_path):
    things = [(number, tmp_path / "mark") for number in range(40)]
    assert list(in_processes(first_waits_for_last, things, count=2, enter=nothing)) == list(range(40))


def test_what_is_raised_comes_in_its_place_with_its_stack():
    found = in_processes(refused_from_five, range(9), count=2, enter=nothing)
    assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="5 is too large") as raised:
        next(found)
    assert "in refused_from_five" in raised.value.__notes__[0]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("function", "said"), [(odd, "OddError: 2 in x.png is odd"), (locked, "LockedError: 2 is locked")]
)
def test_an_error_that_cannot_be_pickled_comes_with_its_name_and_text(function, said):
    found = in_processes(function, range(5), count=2, enter=nothing)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(RuntimeError) as raised:
        next(found)
    assert str(raised.value) == said
    assert f"in {function.__name__}" in raised.value.__notes__[0]


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_process_names_what_it_had(count):
    with pytest.raises(KilledWorkerError) as raised:
        list(in_processes(killed_at_five, range(9), count=count, enter=nothing))
    assert raised.value.thing == 5 and multiprocessing.active_children() == []


def test_every_process_enters_first():
    with pytest.raises(UserWarning, match="old"):
        list(in_processes(warned, range(3), count=2, enter=no_warnings))


def test_whoever_stops_asking_leaves_no_process():
    found = in_processes(doubled, range(1000), count=2, enter=nothing)
    assert next(found) == 0
    found.close()
    assert multiprocessing.active_children() == []
