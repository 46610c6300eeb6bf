"""Which processes are started with what, and whose exit code is the job's. The processes are small ones here."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from entrypoint.nodes.cluster import Place
from entrypoint.nodes.group import STOP_GRACE_S, Nodes
from entrypoint.processes import launch
from entrypoint.processes.launch import member_environment
from entrypoint.system.environment import RANKS, child_environment
from trainer.process import vitals
from trainer.process.vitals import Vitals
from trainer.spec.errors import KilnError, PeerError, UnreachableError

SLEEP = "import time; time.sleep(60)"
STOPS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); print(flush=True); " + SLEEP
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); " + SLEEP
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def ends(code: int, after: float = 0.0) -> str:
    return f"import sys, time; time.sleep({after}); sys.exit({code})"


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """`watched(program, ...)`: the job's exit code and whose it is; how long it took; what became of each."""
    monkeypatch.setattr(launch, "GRACE_S", 1.0)
    started: list[subprocess.Popen[bytes]] = []

    def run(*programs: str) -> tuple[tuple[int, int], float, list[int | None]]:
        for program in programs:
            child = subprocess.Popen([sys.executable, "-S", "-c", program], env={}, stdout=subprocess.PIPE)
            started.append(child)
            if "print" in program:  # its handler is there
                assert child.stdout is not None
                child.stdout.readline()
        began = time.monotonic()
        outcome = launch._watch(launch.Team(tmp_path, Vitals.make()[0], children=started))
        return (outcome.code, outcome.blamed), time.monotonic() - began, [child.poll() for child in started]

    yield run
    for child in started:
        child.kill()
        child.wait()


LOST = PeerError.exit_code


@pytest.mark.parametrize(
    ("programs", "expected"),
    [
        ((ends(0),), (0, 0)),
        ((ends(78),), (78, 0)),
        ((KILLED,), (137, 0)),
        ((ends(0), SLEEP), (0, 0)),  # the first is the job
        ((ends(143), SLEEP), (143, 0)),
        ((ends(0, after=0.4), ends(0)), (0, 0)),
        ((STOPS, ends(75)), (75, 1)),
        ((STOPS, KILLED), (137, 1)),
        ((STUBBORN, SLEEP, ends(70)), (70, 2)),
        ((ends(LOST), ends(75, after=0.4)), (75, 1)),  # it saw the end of the other before we did
        ((ends(LOST), ends(LOST), KILLED), (137, 2)),
        ((KILLED, ends(LOST)), (137, 0)),
        ((ends(LOST), ends(LOST)), (KilnError.exit_code, 0)),
        ((ends(70), ends(70)), (70, 0)),  # what all have found
    ],
)
def test_the_jobs_exit_code_is_that_of_the_one_to_blame(watched, programs, expected):
    found, took, _ = watched(*programs)
    assert found == expected and took < 5


def test_the_first_process_ends_in_order_when_another_fails(watched):
    (code, of), _, ended = watched(STOPS, ends(75))
    assert (code, of) == (75, 1) and ended[0] == 143


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
        ({"CUDA_VISIBLE_DEVICES": "5, 2,3"}, [{"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "2"}]),
        (
            {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"},
            [{"CUDA_VISIBLE_DEVICES": "GPU-a"}, {"CUDA_VISIBLE_DEVICES": "GPU-b"}],
        ),
        (
            {"HIP_VISIBLE_DEVICES": "2,3"},
            [
                {"HIP_VISIBLE_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "0"},
                {"HIP_VISIBLE_DEVICES": "3", "CUDA_VISIBLE_DEVICES": "1"},
            ],
        ),
    ],
)
def test_each_process_sees_a_device_of_its_own(given, expected):
    found = [member_environment(given, Path("/t"), rank, size=2) for rank in range(2)]
    assert [{k: v for k, v in each.items() if "VISIBLE" in k} for each in found] == expected
    assert [each["KILN_RANK"] for each in found] == ["0", "1"] and {each["KILN_TEAM"] for each in found} == {"/t"}


def test_processes_share_the_cores_unless_the_user_has_said_how():
    cores = len(os.sched_getaffinity(0))
    assert member_environment({}, Path("/t"), 0, size=4 * cores)["OMP_NUM_THREADS"] == "1"
    assert member_environment({}, Path("/t"), 0, size=1)["OMP_NUM_THREADS"] == str(cores)
    assert "OMP_NUM_THREADS" not in member_environment({"OMP_NUM_THREADS": "3"}, Path("/t"), 0, size=2)


def test_what_a_cluster_says_of_ranks_does_not_reach_the_trainer():
    theirs = {**dict.fromkeys(RANKS, "7"), "PET_NNODES": "2", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_USE_FSDP": "1"}
    assert child_environment({**theirs, "NCCL_DEBUG": "INFO"}).keys() & theirs.keys() == set()
    assert child_environment({**theirs, "NCCL_DEBUG": "INFO"})["NCCL_DEBUG"] == "INFO"


def test_what_ended_a_process_is_in_the_status(tmp_path, job_of_two):
    team = launch.Team(tmp_path, Vitals.make()[0], children=[None, None])

    def reported(code: int, process_rank: int = 1) -> tuple[int, str]:
        ended = launch._reported(job_of_two, team, launch.Outcome(code, process_rank))
        status = launch.folders.read_json(tmp_path / "status.json")
        assert status["exit_code"] == ended and status["phase"] == "failed"
        return ended, status["message"]

    ended, message = reported(128 + signal.SIGKILL)
    assert ended == 75 and message.startswith("Process 1 of 2 was killed") and "GiB" in message and "Fix: " in message
    ended, message = reported(128 + signal.SIGSEGV, 0)
    assert ended == 139 and "was ended by SIGSEGV" in message
    launch.folders.write_text(tmp_path / "rank-1" / "status.json", '{"message": "no memory", "phase": "failed"}')
    assert reported(75) == (75, "no memory")
    assert launch.folders.read_json(tmp_path / "status.json") == {
        "phase": "failed",
        "exit_code": 75,
        "message": "no memory",
    }


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """In place of Python: a program that notes its number, waits for the end of its input, and keeps the plan."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho $$ > {tmp_path}/$KILN_RANK.new\nmv {tmp_path}/$KILN_RANK.new '
                       f'{tmp_path}/$KILN_RANK\ncat > {tmp_path}/told\ncp "$4" {tmp_path}/$KILN_RANK.plan\n'
                       f'mv {tmp_path}/$KILN_RANK.plan {tmp_path}/plan.json\n')  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def numbers() -> list[int]:
        places = [tmp_path / "0", tmp_path / "1"]
        end = time.monotonic() + 30
        while not all(place.exists() for place in places):
            assert time.monotonic() < end
            time.sleep(0.01)
        return [int(place.read_text()) for place in places]

    return numbers


def test_trainers_load_while_things_are_fetched_and_train_what_was_fetched(waiting, job_of_two, tmp_path):
    fetched = dataclasses.replace(job_of_two, printed=("what is known after the fetch",))
    with launch.Trainers(job_of_two, environment={"PATH": os.environ["PATH"]}) as trainers:
        waiting()  # both have begun, and nothing says yet what they are to train
        assert not (tmp_path / "plan.json").exists()
        assert trainers.run(fetched) == 0
    assert (tmp_path / "plan.json").read_text() == fetched.to_json() and (tmp_path / "told").read_text() == ""


def test_nothing_is_left_of_trainers_that_have_nothing_to_do(waiting, job_of_two, tmp_path):
    with (
        pytest.raises(UnreachableError),
        launch.Trainers(job_of_two, environment={"PATH": os.environ["PATH"]}),
    ):
        numbers = waiting()
        raise UnreachableError("The Hub does not answer.")
    assert not any(Path(f"/proc/{number}").exists() for number in numbers)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_that_comes_before_a_trainer_listens_is_no_traceback(job_of_two, monkeypatch, capfd, number, code):
    """Nor is it lost where Ctrl-C was ignored, as in a guarded process."""
    one = dataclasses.replace(job_of_two, engine=dataclasses.replace(job_of_two.engine, num_gpus=1))
    monkeypatch.setattr(launch, "_begin", lambda child: os.kill(os.getpid(), number))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with launch.Trainers(one, environment={"PATH": os.environ["PATH"]}) as trainers:
            assert not trainers.stopped and trainers.run(one) == code and trainers.stopped
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Traceback" not in capfd.readouterr().err


def test_a_trainer_without_a_plan_ends_in_silence(programs, tmp_path):
    ended = programs.run("-m", "trainer", "--wait", str(tmp_path / "plan.json"), environment={})
    assert ended.returncode == 0 and "ERROR" not in ended.stderr


@pytest.fixture
def job_of_two(tmp_path):
    from trainer.spec.plan import DataPlan, EnginePlan, LoraPlan, ModelPlan, OptimPlan, OutputPlan, Plan, TrainPlan

    model, output = ModelPlan("a", "a", "a"), OutputPlan(str(tmp_path), "x", "cache")
    return Plan(model, DataPlan(()), LoraPlan(), OptimPlan(), TrainPlan(), EnginePlan(num_gpus=2), output)


@pytest.mark.parametrize(("several", "left"), [(False, 0.0), (True, STOP_GRACE_S)])
def test_a_stop_of_the_first_of_several_machines_while_it_uploads_is_passed_on(waiting, job_of_two, several, left):
    """It has to tell the others; alone, there is nothing that a kill would lose."""
    shared, path = Vitals.make()
    environment = {"PATH": os.environ["PATH"], vitals.VARIABLE: path}
    nodes = Nodes(Place(0, 2 if several else 1, "127.0.0.1"), environment=environment)
    nodes.trainer_environment = dict  # no other machine has come
    with launch.Trainers(job_of_two, environment=environment, nodes=nodes) as trainers:
        assert trainers.run(job_of_two) == 0
    assert shared.read(vitals.GRACE) == left
