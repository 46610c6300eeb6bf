"""Start the trainers, hand them plan.json, forward signals to them, and return the exit code of the job.

They are started before everything is fetched, since they load torch and diffusers first: for 5 s on a machine that has
done so before, for half a minute on one that has not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from entrypoint.fetch import flash_attention
from entrypoint.nodes.cluster import Place
from entrypoint.nodes.group import Nodes
from entrypoint.system.environment import FORWARDED, VISIBLE, child_environment
from entrypoint.system.private_folders import compile_caches
from trainer.process import memory_kills, vitals
from trainer.process.guard import KILLED_EXIT_CODE, stopped_how
from trainer.process.memory_kills import Counts
from trainer.process.vitals import Vitals
from trainer.spec.errors import HangError, KilnError, PeerError, StorageError
from trainer.spec.plan import RANK_VARIABLE, TEAM_VARIABLE, Plan
from trainer.storage import folders

log = logging.getLogger(__name__)
GRACE_S = 5.0  # for the first process to finish cleanly when another has failed
LEAVE_S = 1.0  # for this process to end after a trainer that was stopped
START_GRACE_S = 2.0  # for a trainer that is stopped before it says how long it may take
KILLED = 128 + signal.SIGKILL
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass
class Team:
    """The trainers of a job. `folder` is theirs alone; `shared` is what the first one tells of itself."""

    folder: Path
    shared: Vitals
    kills_before: Counts = field(default_factory=memory_kills.count)
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)
    nodes: Nodes = field(default_factory=lambda: Nodes(Place()))
    held_bytes: dict[str, int] = field(default_factory=dict)  # the memory of each, at most

    @property
    def plan_path(self) -> Path:
        return self.folder / "plan.json"


@dataclass(frozen=True)
class Outcome:
    """How the trainers ended: the job's exit code, the process that it comes from, and why, if that cannot say."""

    code: int
    blamed: int = 0
    message: str = ""


class Trainers:
    """The trainers of a job: inside the context they load their libraries, and wait for `run`.

    They get no secrets and need no network: what they read is on local paths by the time that they begin.
    """

    def __init__(self, plan: Plan, *, environment: Mapping[str, str], nodes: Nodes | None = None) -> None:
        """`plan`: for what it says of processes and caches; what is trained is said to `run`. `nodes`: have met."""
        self._plan = plan
        self._environment = environment
        self._nodes = nodes or Nodes(Place())
        self._open = contextlib.ExitStack()
        self.stopped = False  # a signal has asked the job to end: somebody waits for that

    def __enter__(self) -> Trainers:
        shared, path = _shared(self._environment)
        self._open.callback(shared.close)
        self._team = Team(Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="kiln-"))), shared)
        self._team.nodes = self._nodes
        self._open.callback(self._end_all)
        # A list of arguments, no shell: nothing in the plan can become a command.
        arguments = [sys.executable, "-m", "trainer", "--wait", str(self._team.plan_path)]
        # They inherit it blocked, and take it once they have a handler: before that, Ctrl-C would be a traceback.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for own in _environments(self._plan, self._team.folder, self._environment, self._nodes):
                if not self._team.children and self._nodes.is_first:
                    own[vitals.VARIABLE] = path
                self._team.children.append(subprocess.Popen(arguments, env=own, stdin=subprocess.PIPE))  # noqa: S603
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, *_problem: object) -> None:
        self._open.close()

    def run(self, plan: Plan) -> int:
        """Let them train `plan`; the exit code is 75 if they hung or were killed, 128 + n if signal n ended them.

        With NUM_GPUS above 1, the first process leads: it gets the signals, and when it ends, the job ends. If another
        one fails, the rest is stopped, and its exit code is the job's. Of several nodes, this is so for the first
        process of the first node; the other nodes end when that one says how.
        """
        team = self._team
        nodes = self._nodes
        nodes.share(team.folder)
        team.plan_path.write_text(plan.to_json(), encoding="utf-8")
        stopped_at: list[float] = []

        def forward(number: int, _frame: FrameType | None) -> None:
            self.stopped = True
            stopped_at.append(time.monotonic())
            nodes.ask_stop(number)
            if nodes.is_first:
                team.children[0].send_signal(number)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        nodes.watch_from_here()
        # From here on a stop is passed on. The first node may save as long as it likes.
        team.shared.allow(START_GRACE_S if nodes.is_first else vitals.ANSWERED_GRACE_S)
        try:
            for child in team.children:
                _begin(child)
            outcome = _watch(team) if nodes.is_first else _watch_other(team)
        finally:
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)
            # The grace counts from the signal on; a trainer that was stopped in order leaves us time to say so.
            team.shared.allow(time.monotonic() - stopped_at[0] + LEAVE_S if stopped_at else 0)
            if nodes.several and not stopped_at:  # while the first uploads, a stop of it is one of all
                nodes.keep_grace()
        return _reported(plan, team, _agreed(team, outcome))

    def _end_all(self) -> None:
        for child in self._team.children:
            child.kill()
            child.wait()
            if child.stdin is not None:
                child.stdin.close()


def _begin(child: subprocess.Popen[bytes]) -> None:
    """What a trainer waits for is the end of its input."""
    assert child.stdin is not None
    child.stdin.close()


def launch(plan: Plan, *, environment: Mapping[str, str]) -> int:
    """Run the trainers on `plan`, of which nothing is to be fetched any more; returns the job's exit code."""
    with Trainers(plan, environment=environment) as trainers:
        return trainers.run(plan)


def _shared(environment: Mapping[str, str]) -> tuple[Vitals, str]:
    """What this process and the trainers share with the parent of all, or among themselves, and its path."""
    shared = Vitals.of(environment)
    if shared is None:
        return Vitals.make()
    return shared, environment[vitals.VARIABLE]


def _environments(plan: Plan, folder: Path, environment: Mapping[str, str], nodes: Nodes) -> list[dict[str, str]]:
    """The environment of each process of this node."""
    size = plan.engine.num_gpus
    cache = Path(plan.output.cache)
    common = child_environment(environment)
    common.pop(vitals.VARIABLE, None)
    common |= compile_caches(common, cache, scratch=folder)
    if plan.engine.attention == "flash_4":
        common |= flash_attention.environment(cache, common)
    if size == 1 and not nodes.several:
        return [common]
    found = []
    for rank in range(size):
        member = member_environment(common, folder, rank, size=size, node=nodes.place.rank)
        if nodes.several:  # the loopback device leads to no other machine
            for name in INTERFACES:
                del member[name]
        found.append({**common, **member, **nodes.trainer_environment()})
    return found


def member_environment(
    environment: Mapping[str, str], folder: Path, local_rank: int, *, size: int, node: int = 0
) -> dict[str, str]:
    """The variables of a process, number `local_rank` of the `size` of a node: its device, and who the others are."""
    own = {RANK_VARIABLE: str(node * size + local_rank), TEAM_VARIABLE: str(folder)}
    for name in VISIBLE:
        if environment.get(name) or name == VISIBLE[-1]:
            devices = [device.strip() for device in environment.get(name, "").split(",") if device.strip()]
            own[name] = devices[local_rank] if local_rank < len(devices) else str(local_rank)
    own |= dict.fromkeys(INTERFACES, "lo")
    # NCCL must not kill a process that waits for another: our own watchdog finds the one that hangs.
    own["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    if "OMP_NUM_THREADS" not in environment:
        own["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // size))
    return own


def _watch_other(team: Team) -> Outcome:
    """The same on another node than the first: until a trainer fails here, or the first node says how the job ended."""
    nodes = team.nodes
    while nodes.verdict is None:
        failed = [i for i, child in enumerate(team.children) if child.poll()]
        if failed:
            return _end_all(team, failed)
        time.sleep(0.2)
    code, message = nodes.verdict.code, nodes.verdict.message
    if not message:
        message = f"Node 0 has ended with exit code {code}: its log has the reason."
        if code == 0:
            message = "Node 0 has done its work."
    return Outcome(code, message=message)


def _agreed(team: Team, outcome: Outcome) -> Outcome:
    """What a failure here is to all nodes. The other nodes learn it."""
    nodes = team.nodes
    if not nodes.several or not outcome.code or (nodes.verdict and outcome.message):
        return outcome
    code, message = _explained(team, outcome)
    if not message:
        is_stop = code in _stopped()
        message = (
            f"{stopped_how(code - 128, on_page=False)}." if is_stop else f"Its trainer ended with exit code {code}."
        )
    verdict = nodes.verdict or nodes.report(code, message)
    if verdict.code == code and nodes.is_first and not outcome.blamed:
        return outcome  # the first trainer has said how it ended
    return Outcome(verdict.code, outcome.blamed, verdict.message)


def _watch(team: Team) -> Outcome:
    """How the job ended; 75 if the first process missed the deadline that it has set itself.

    Its own watchdog (trainer/job/watchdog.py) cannot act while a call holds the GIL, or while the process is stopped.
    """
    children = team.children
    first = children[0]
    while True:
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.5 / len(children))
        failed = [i for i, child in enumerate(children) if child.returncode]
        if failed:
            return _end_all(team, failed)
        if first.returncode == 0:
            return Outcome(0)
        if team.nodes.verdict is not None:
            first.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                first.wait(timeout=GRACE_S)
            return Outcome(team.nodes.verdict.code, message=team.nodes.verdict.message)
        for i, child in enumerate(children):
            name = f"trainer {i}" if len(children) > 1 else "the trainer"
            held = memory_kills.resident(child.pid)
            team.held_bytes[name] = max(held, team.held_bytes.get(name, 0))
        deadline = team.shared.read(vitals.DEADLINE)
        if deadline is not None and time.monotonic() > deadline:
            message = "The trainer hangs, and not even its watchdog answers."
            log.error("%s Ending it. Its stacks:", message)
            for child in children:
                child.send_signal(signal.SIGUSR1)
                child.send_signal(signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                first.wait(timeout=2)
            _log_stacks(team.folder)
            return Outcome(HangError.exit_code, message=f"{message} {HangError.advice}")


def _log_stacks(folder: Path) -> None:
    """Log the Python stacks that the processes wrote on request."""
    for path in sorted(folder.glob("stacks-*.txt")):
        if text := path.read_text(encoding="utf-8", errors="replace"):
            log.error("Process %s:\n%s", path.stem.removeprefix("stacks-"), text.rstrip())


def _end_all(team: Team, failed: Sequence[int]) -> Outcome:
    """End all processes after some have failed; returns the exit code of the one to blame, and its number.

    The others may wait for it in a call that no signal interrupts. A process that ended only because another did
    (PeerError) is not to blame.
    """
    children = team.children
    first, deadline = children[0], time.monotonic() + GRACE_S

    def to_blame() -> list[int]:
        return [i for i, child in enumerate(children) if child.poll() not in (None, 0, PeerError.exit_code)]

    if len(children) > 1 and failed[0]:
        log.error("Process %d of %d has failed. Ending the others.", failed[0], len(children))
    while not to_blame() and time.monotonic() < deadline:  # the one to blame may still be writing its status
        time.sleep(0.05)
    blamed = to_blame()
    if first.poll() is None:  # so that its files are complete and its status says how it ended
        first.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            first.wait(timeout=max(0.0, deadline - time.monotonic()))
    if first.returncode == HangError.exit_code:
        for child in children[1:]:
            child.send_signal(signal.SIGUSR1)  # their stacks may show why the first one hung
        time.sleep(0.5 if len(children) > 1 else 0)
        _log_stacks(team.folder)
    if not blamed:
        return Outcome(PeerError.exit_code if team.nodes.several else KilnError.exit_code)
    return Outcome(_code(children[blamed[0]]), blamed[0])


def _code(child: subprocess.Popen[bytes]) -> int:
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _explained(team: Team, outcome: Outcome) -> tuple[int, str]:
    """The exit code, and why a process ended where it could not say so itself."""
    code = outcome.code
    message = outcome.message
    if message:
        return code, message
    who = "The trainer" if len(team.children) == 1 else f"Process {outcome.blamed} of {len(team.children)}"
    if code == KILLED:
        code = KILLED_EXIT_CODE
        message = (
            f"{who} {memory_kills.explain(team.kills_before, team.held_bytes)} The job resumes from its last save."
        )
    elif code > 128 and code not in _stopped():
        message = f"{who} was ended by {signal.Signals(code - 128).name}: a library or the driver crashed."
    elif outcome.blamed or not team.nodes.is_first:  # the first process of all writes its own into OUTPUT_PATH
        rank = team.nodes.place.rank * len(team.children) + outcome.blamed
        own_status = folders.read_json(team.folder / f"rank-{rank}" / "status.json") or {}
        message = own_status.get("message") or f"{who} ended with exit code {code}."
    return code, message


def _reported(plan: Plan, team: Team, outcome: Outcome) -> int:
    """The job's exit code. Logs why a process ended, and puts it into status.json, where it could not do so itself."""
    code, message = _explained(team, outcome)
    if message:
        log.log(logging.INFO if code in (0, *_stopped()) else logging.ERROR, "%s [exit %d]", message, code)
    if message and team.nodes.is_first:  # the others write nothing there
        status = Path(plan.output.path) / "status.json"
        with contextlib.suppress(StorageError):
            ended = {"phase": "failed", "exit_code": code, "message": message}
            folders.write_text(status, json.dumps((folders.read_json(status) or {}) | ended, indent=2) + "\n")
    return code


def _stopped() -> set[int]:
    return {128 + number for number in FORWARDED}
