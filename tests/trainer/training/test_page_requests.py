"""What the monitor page asks for is seen between two steps, once, and by all processes in the same step."""

import os
import signal
import time

import pytest

from entrypoint.monitor.actions import Actions
from trainer.process import guard
from trainer.process.vitals import BETWEEN_SAVES_S, VARIABLE, Vitals
from trainer.spec.errors import StopRequestedError
from trainer.training.distributed import Workers
from trainer.training.page_requests import NOTHING, NowDue, PageRequests
from trainer.training.stop_flag import StopFlag


def test_a_request_is_seen_once_and_the_next_one_again():
    vitals, path = Vitals.make()
    now = [0.0]
    requests, actions = PageRequests(vitals, clock=lambda: now[0]), Actions({VARIABLE: path})
    assert requests.take() == NOTHING
    assert actions.ask("save")
    assert requests.take() == NowDue(save=True) and requests.take() == NOTHING
    now[0] = BETWEEN_SAVES_S
    time.sleep(0.002)  # places have milliseconds
    assert actions.ask("sample") and actions.ask("save")
    assert requests.take() == NowDue(save=True, sample=True) and requests.take() == NOTHING
    vitals.close()


def test_no_save_is_begun_while_one_is_written_or_soon_after_the_last():
    """A request that is left out does not come back later."""
    vitals, path = Vitals.make()
    now = [0.0]
    requests = PageRequests(vitals, clock=lambda: now[0])

    def asked_at(moment):
        now[0] = moment
        time.sleep(0.002)
        Actions({VARIABLE: path}).ask("save")
        return requests.take().save

    assert asked_at(0.0) and not asked_at(1.0) and not asked_at(BETWEEN_SAVES_S - 1)
    now[0] = BETWEEN_SAVES_S + 1
    assert requests.take() == NOTHING
    requests.is_saving = lambda: True
    assert not asked_at(BETWEEN_SAVES_S + 2)
    requests.is_saving = lambda: False
    assert asked_at(BETWEEN_SAVES_S + 3)
    vitals.close()


def test_without_a_parent_nothing_can_be_asked():
    assert PageRequests(None).take() == NOTHING
    for nobody in ({}, {VARIABLE: "/proc/1/fd/none"}):
        assert Actions(nobody).names == () and not Actions(nobody).ask("save")


def test_what_is_no_request_changes_nothing():
    vitals, path = Vitals.make()
    assert not Actions({VARIABLE: path}).ask("grace") and not Actions({VARIABLE: path}).ask("../save")
    assert PageRequests(vitals).take() == NOTHING
    vitals.close()


def test_a_process_alone_is_told_by_its_parent():
    vitals, path = Vitals.make()
    workers = Workers(stop=StopFlag(vitals))
    assert workers.asked() == NOTHING
    Actions({VARIABLE: path}).ask("sample")
    assert workers.asked() == NowDue(sample=True) and workers.asked() == NOTHING
    vitals.close()


def test_a_stop_ends_the_job_as_a_limit_does_whatever_it_is_doing(tmp_path):
    """Here it reads from a pipe that nobody fills. A pod does not start such a job again."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def work():
        assert Actions(os.environ).ask("stop")
        pipe.read_text()
        return 0

    began = time.monotonic()
    ended = guard.guarded(work)
    assert (ended.exit_code, ended.limit_reached) == (143, True) and time.monotonic() - began < 5
    assert ended.stopped_how == "Stopped on the monitor page"


def test_a_trainer_that_is_stopped_on_the_page_says_so():
    vitals, path = Vitals.make()
    flag = StopFlag(vitals)
    flag.signal = signal.SIGTERM
    with pytest.raises(StopRequestedError, match="Stopped by SIGTERM at step 3"):
        flag.check(" at step 3")
    Actions({VARIABLE: path}).ask("stop")
    with pytest.raises(StopRequestedError, match="Stopped on the monitor page at step 3"):
        flag.check(" at step 3")
    vitals.close()
