"""What processes that train together tell each other. The second of two is a fork of this one, and really connected."""

import datetime
import math
from pathlib import Path

import pytest
import torch

from trainer.process.vitals import SAMPLE, SAVE, Vitals
from trainer.spec.errors import KilnError, PeerError, SettingsError, StopRequestedError
from trainer.spec.plan import RANK_VARIABLE, TEAM_VARIABLE
from trainer.training import distributed
from trainer.training.distributed import StepTotals, Workers, process_rank, workers_from_environment
from trainer.training.page_requests import NOTHING, NowDue, PageRequests
from trainer.training.stop_flag import StopFlag


def differ(workers, values):
    try:
        workers.check_same([torch.tensor(value) for value in values])
    except KilnError as problem:
        return str(problem)
    return None


def test_answers_and_weights_are_compared_over_both(pair):
    def meet(workers):
        first = workers.is_first
        agreed = [workers.all_agree(answer) for answer in (True, first, not first, False)]
        told = [
            differ(workers, [1.5, -2.0]),
            differ(workers, [1.0 if first else 1.0000001, 2.0]),
            differ(workers, [2.0, 1.0 if first else -1.0]),
            differ(workers, [1.0, 2.0] if first else [2.0, 1.0]),  # the same in all, and not the same
        ]
        return agreed, told

    words = "The 2 processes have different weights, which must not happen."
    expected = ([True, False, False, False], [None, words, words, words])
    assert pair(meet) == (expected, expected)


def test_the_step_is_the_mean_over_the_images_of_both(pair):
    """By hand: losses 1, 2, 3 and 6 here, with the mean gradient (1, 2); 10 there, with (6, -8).

    Noise levels: 0.1, 0.9, 0.24 and 1 here, 0.75 there, so that the bands have 1 and 3; none; none; 2, 6 and 10.
    """

    def step(workers, losses, times, gradient):
        flat = torch.tensor(gradient)
        totals_T = workers.mean_gradient(flat, list(map(torch.tensor, losses)), list(map(torch.tensor, times)))
        found = workers.read_totals(totals_T, torch.tensor(7.0))
        return [found.loss, found.images, found.norm, flat.tolist(), workers.stopping, found.band_losses]

    def meet(workers):
        first = workers.is_first
        own = ([[1.0, 2.0, 3.0], [6.0]], [[0.1, 0.9, 0.24], [1.0]], [1.0, 2.0])
        own = own if first else ([[10.0]], [[0.75]], [6.0, -8.0])
        told = [step(workers, *own), step(workers, *own)]
        told.append(step(workers, *(own if first else ([], [], [0.0, 0.0]))))  # nothing for the second to do
        if first:
            workers._stop.signal = 15
        assert workers.stopping is False  # not before all know
        told.append(step(workers, *own))
        return told

    bands = (2.0, None, None, pytest.approx(6.0))
    both = [22 / 5, 5, 7.0, pytest.approx([2.0, 0.0]), False, bands]
    alone = [12 / 4, 4, 7.0, [1.0, 2.0], False, (2.0, None, None, 4.0)]
    expected = [both, both, alone, [*both[:4], True, bands]]
    mine, theirs = pair(meet)
    assert mine == [[pytest.approx(row[0]), *row[1:]] for row in expected] and theirs == mine


def test_what_the_page_asks_of_the_first_is_due_in_both_after_the_same_step(pair):
    def meet(workers):
        vitals, _ = Vitals.make()
        if workers.is_first:
            workers.requests = PageRequests(vitals)
        told = []
        for number in range(4):
            if workers.is_first and number == 1:
                vitals.write(SAVE, 1.0)
                vitals.write(SAMPLE, 2.0)
            totals = workers.mean_gradient(torch.zeros(2), [torch.ones(1)], [torch.ones(1)])
            workers.read_totals(totals, torch.tensor(1.0))
            told.append(workers.asked())
        vitals.close()
        return told

    mine, theirs = pair(meet)
    assert mine == theirs == [NOTHING, NowDue(save=True, sample=True), NOTHING, NOTHING]


def test_what_one_process_says_reaches_all(pair):
    content = bytes(range(256)) * 5

    def meet(workers):
        said = [workers.from_process(giver, content[workers.process_rank :]) for giver in (0, 1)]
        return [*said, workers.from_process(1, b"")]

    mine, theirs = pair(meet)
    assert mine == theirs == [content, content[1:], b""]
    assert Workers().from_process(0, content) == content


def test_a_stop_of_the_first_is_noticed_by_all_between_two_steps(tmp_path):
    """Of any other process by that one alone: it is told in the next step."""
    first, second = Workers(0, 2, tmp_path), Workers(1, 2, tmp_path)
    assert not first.notices_stop() and not second.notices_stop()
    second._stop.signal = 15
    assert second.notices_stop() and not first.notices_stop()
    third = Workers(1, 2, tmp_path)
    first._stop.signal = 15
    assert not third.notices_stop()  # the first has not looked yet
    assert first.notices_stop() and third.notices_stop() and not third.stopping
    alone = Workers(folder=tmp_path / "none")
    alone._stop.signal = 15
    assert alone.notices_stop()


def test_a_process_that_has_ended_is_an_error_of_its_own(pair):
    def meet(workers):
        if not workers.is_first:
            return None
        with pytest.raises(PeerError, match=r"^Another process of this job does not answer: .*\.$"):
            for _ in range(3):
                workers.all_agree(True)
        with pytest.raises(PeerError):
            workers.mean_gradient(torch.zeros(2), [torch.ones(1)], [torch.ones(1)])
        return "told"

    assert pair(meet)[0] == "told"


def test_processes_that_do_not_reach_each_other_name_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "NO_TIMEOUT", datetime.timedelta(milliseconds=1))
    with pytest.raises(SettingsError, match=r"^NUM_GPUS=2: the processes cannot talk .* --ipc=host"):
        Workers(0, 2, tmp_path).connect("cpu")


def test_a_process_alone_asks_nobody():
    flag = StopFlag()
    alone = Workers(stop=flag)
    alone.connect("cpu")
    flat = torch.tensor([3.0])
    times = [torch.tensor([0.0, 0.5]), torch.tensor([0.5])]
    totals = alone.mean_gradient(flat, [torch.tensor([1.0, 2.0]), torch.tensor([6.0])], times)
    assert alone.read_totals(totals, torch.tensor(0.5)) == StepTotals(3.0, 3, 0.5, (1.0, None, 4.0, None))
    assert flat.tolist() == [3.0]
    assert alone.all_agree(True) and not alone.all_agree(False) and not alone.stopping
    assert alone.smallest(7) == 7
    flag.signal = 15
    assert alone.stopping and differ(alone, [math.nan]) is None
    alone.disconnect()


def test_who_waits_ends_with_who_started_it(tmp_path):
    waiting = Workers(1, 2, tmp_path)
    calls = []
    waiting._parent = -1  # another process has adopted this one
    with pytest.raises(StopRequestedError) as problem:
        waiting.wait_for(tmp_path / "never", lambda: calls.append(1))
    assert problem.value.exit_code == 143 and calls == [1]
    (tmp_path / "there").touch()
    waiting.wait_for(tmp_path / "there", lambda: calls.append(2))
    assert calls == [1]
    again = Workers(1, 2, tmp_path)
    again.on_first(lambda: calls.append("never"), (tmp_path / "turn-1").touch)
    assert calls == [1]


def test_only_work_of_several_leaves_a_mark(tmp_path):
    done = []
    Workers(0, 1, tmp_path).on_first(lambda: done.append(1), lambda: None)
    assert done == [1] and list(tmp_path.iterdir()) == []
    first = Workers(0, 2, tmp_path)
    for _ in range(2):
        first.on_first(lambda: done.append(2), lambda: None)
    assert done == [1, 2, 2] and sorted(path.name for path in tmp_path.iterdir()) == ["turn-1", "turn-2"]


def test_the_place_of_a_process_is_in_its_environment():
    flag = StopFlag()
    flag.signal = 15
    given = {RANK_VARIABLE: "1", TEAM_VARIABLE: "/team"}
    second = workers_from_environment(2, given, flag)
    assert (second.process_rank, second.size, second.folder) == (1, 2, Path("/team"))
    assert not second.is_first and second.own_folder == Path("/team/rank-1")
    with pytest.raises(SettingsError, match="NUM_GPUS=2 processes, but this one was started alone"):
        workers_from_environment(2, {RANK_VARIABLE: "1"}, flag)
    assert workers_from_environment(1, given, flag).stopping and process_rank({}) == 0
    flat = torch.zeros(1)
    assert second._stop is flag and not second.stopping and workers_from_environment(1, {}, flag).is_first
    totals = workers_from_environment(1, {}, flag).mean_gradient(flat, [torch.ones(2)], [torch.zeros(2)])
    assert totals[:5].tolist() == [1.0, 2.0, 0.0, 0.0, 0.0]


def test_of_an_error_of_torch_the_first_lines_are_told_without_its_hints():
    words = "closed by peer. This is typically a crash\nb\nc\nd\nframe 1\nframe 2"
    with pytest.raises(PeerError, match=r"^Another process of this job does not answer: closed by peer; b; c; d\.$"):
        with distributed._peer_errors():
            raise RuntimeError(words)
    with pytest.raises(torch.OutOfMemoryError), distributed._peer_errors():
        raise torch.OutOfMemoryError("no memory")
