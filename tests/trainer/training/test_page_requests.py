"""What the monitor page asks for is seen between two steps, once, and by all processes in the same step."""

import os
import time

from entrypoint.monitor.actions import Actions
from trainer.process import guard
from trainer.process.vitals import VARIABLE, Vitals
from trainer.training.distributed import Workers
from trainer.training.page_requests import NOTHING, NowDue, PageRequests
from trainer.training.stop_flag import StopFlag


def test_a_request_is_seen_once_and_the_next_one_again():
    vitals, path = Vitals.make()
    requests, actions = PageRequests(vitals), Actions({VARIABLE: path})
    assert requests.take() == NOTHING
    assert actions.ask("save")
    assert requests.take() == NowDue(save=True) and requests.take() == NOTHING
    time.sleep(0.002)  # places have milliseconds
    assert actions.ask("sample") and actions.ask("save")
    assert requests.take() == NowDue(save=True, sample=True) and requests.take() == NOTHING
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
