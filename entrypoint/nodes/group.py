"""One node's view of all: they begin together, and they end together.

| what happens | what follows |
| --- | --- |
| a node does not come within NODES_TIMEOUT | 75 on those that came |
| the terms differ (`terms`) | 78 on all, with every difference |
| a node fails, in whatever phase | its exit code on all, and its message |
| a node is killed, cut off or switched off | 75 on all, at most `wire.SILENT_S` later |
| the first node is | the same: nobody takes its place; whoever restarts the nodes restarts all of them |
| a node is asked to stop | the first saves and ends; then all, with 143 or 130 |
| a node starts again while the others still run | these end with 75, so that all meet anew |

The first node decides: what it says last, the verdict, is the exit code of all. A trainer that fails only because
another one is gone (PeerError) decides nothing; where only such failures are known after `VICTIM_S`, it is 75.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from entrypoint.nodes import meeting
from entrypoint.nodes.cluster import Place
from entrypoint.nodes.interfaces import interface_of
from entrypoint.nodes.terms import Terms, differences, refusal
from entrypoint.nodes.wire import LARGEST_FILE, PING_S, Connection, LostError
from trainer.process import vitals
from trainer.process.guard import stopped_how
from trainer.spec.errors import KilnError, PeerError, SettingsError, StopRequestedError, UnreachableError
from trainer.spec.plan import FIRST_NODE_VARIABLE
from trainer.storage import atomic
from trainer.storage.read import read_regular

log = logging.getLogger(__name__)
TICK_S = 0.1
VICTIM_S = 10.0
LEAVE_S = 20.0  # for the main thread to end after a verdict, before the process ends without it
DISMISS_S = 60.0
PART_S = 3.0  # for the others to read the last word
STOP_GRACE_S = 8.0  # for this process to tell the others of a stop before there is anything to save
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What the first trainer leaves in its folder for the others, by the first part of the name (trainer.training).
SHARED_FILES = ("prepared", "turn", "store", "stop")


class NodesEndedError(KilnError):
    """Another node has ended this job; the exit code is its own."""

    advice = "The log of that node has the reason. Start all nodes again: the job resumes automatically."

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Verdict:
    """How the job ended, for all nodes."""

    code: int
    message: str


class Nodes:
    """This node among all. As a context: whatever ends the context's body ends all nodes."""

    def __init__(self, place: Place, *, timeout_s: float = 900.0, environment: Mapping[str, str] | None = None) -> None:
        self.place = place
        self.timeout_s = timeout_s
        self.verdict: Verdict | None = None
        self.stop: int | None = None  # the signal that asked for it, on any node
        self._environment = environment or {}
        self._links: dict[int, Connection] = {}  # of the first to all others; of another to the first
        self._terms: dict[int, Terms] = {}
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._begun = False  # all have met
        self._dismissed = False  # this first node goes on alone
        self._told_stop = False
        self._training = False  # the main thread looks at `verdict` itself
        self._folder: Path | None = None
        self._sent: set[str] = set()
        self._early: dict[str, bytes] = {}  # files that came while this node still fetches
        self._files = threading.Lock()
        self._gone: set[int] = set()
        self._undo = contextlib.ExitStack()

    @property
    def several(self) -> bool:
        return self.place.count > 1

    @property
    def is_first(self) -> bool:
        return self.place.is_first

    # ---- the beginning

    def __enter__(self) -> Nodes:
        if self.several:
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGTERM:
                    self._undo.callback(signal.signal, number, signal.signal(number, self._on_stop_signal))
            self._undo.callback(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, self._on_verdict_signal))
            self.keep_grace()
        return self

    def keep_grace(self) -> None:
        """From now on a stop is passed to this process, which tells the others before it ends."""
        vitals.allow(self._environment, STOP_GRACE_S)

    def agree(self, terms: Terms) -> bool:
        """Wait for all nodes; True when all have the same terms, False where the job is done already.

        Raises SettingsError where they differ, and UnreachableError after NODES_TIMEOUT.
        """
        if not self.several:
            return True
        log.info("NODES: this is %s. Waiting for the others.", self.place.describe())
        started = time.monotonic()
        if self.is_first:
            self._gather(terms)
        else:
            self._join(terms)
        if self.verdict is not None:
            log.info("%s", self.verdict.message)
            return False
        self._begun = True
        log.info("All %d nodes are here and agree, after %.1f s.", self.place.count, time.monotonic() - started)
        return True

    def dismiss(self, message: str) -> None:
        """There is nothing to train: the others, who may not come at all, need not wait.

        This first node may go on, to upload what is done: how that ends is its own exit code.
        """
        log.info("Telling the other nodes that this job is done, for %.0f s at most.", min(DISMISS_S, self.timeout_s))
        self._collect(min(DISMISS_S, self.timeout_s))
        self.end(0, message)
        self._dismissed = True

    def _gather(self, terms: Terms) -> None:
        """The first node's part of `agree`."""
        missing = self._collect(self.timeout_s)
        self._raise_verdict()
        others = {rank: self._terms[rank] for rank in self._links}
        lines = differences(terms, others)
        if lines:
            raise SettingsError(refusal(lines))
        if missing:
            raise UnreachableError(
                f"NODES={self.place.count}: after NODES_TIMEOUT={self.timeout_s:g} s, these nodes have not come to "
                f"{self.place.address}:{self.place.port}: {', '.join(map(str, missing))}. Check that they were "
                "started, that their logs name the same address, and that the port is open between them."
            )
        self._send_all({"go": True})

    def _collect(self, timeout_s: float) -> list[int]:
        """Wait until all other nodes are here; returns those that are not."""
        server = meeting.listen(self.place, timeout_s=self.timeout_s)
        self._undo.callback(server.close)
        threading.Thread(target=self._keep, name="nodes", daemon=True).start()
        threading.Thread(target=meeting.accept, args=(server, self._greet), name="nodes", daemon=True).start()
        wanted = self.place.count - 1
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while len(self._links) < wanted and self.verdict is None:
                self._changed.wait(TICK_S)
                if time.monotonic() > deadline:
                    break
            return sorted(set(range(1, self.place.count)) - self._links.keys())

    def _greet(self, link: Connection, hello: dict[str, Any]) -> None:
        """A node has come to the first one."""
        rank = hello["rank"]
        if not 0 < rank < self.place.count:
            problem = f"Node {rank} ({link.peer_address}) has come, but NODES={self.place.count} on node 0."
            self._refuse(link, Verdict(SettingsError.exit_code, f"{problem} Fix: the same NODES on all nodes."))
            return
        with self._changed:
            before = self._links.get(rank)
            if before is not None and self._begun:
                link.close()
                self._decide(Verdict(75, f"Node {rank} has started again while the others were at work."))
                return
            if before is not None and before.peer_address != link.peer_address:
                both = f"{before.peer_address} and {link.peer_address}"
                problem = f"Two machines, {both}, say that they are node {rank}. Fix: a NODE_RANK of its own for each."
                self._refuse(link, Verdict(SettingsError.exit_code, problem))
                return
            if before is not None:  # it was started again before the job began
                before.close()
            self._links[rank] = link
            self._terms[rank] = hello["terms"]
            log.info("Node %d (%s) is here: %d of %d.", rank, link.peer_address, len(self._links) + 1, self.place.count)
            self._changed.notify_all()
        threading.Thread(target=self._listen, args=(rank, link), name=f"node {rank}", daemon=True).start()

    def _refuse(self, link: Connection, verdict: Verdict) -> None:
        with contextlib.suppress(LostError):
            link.send({"end": verdict.code, "message": verdict.message})
        link.close()
        self._decide(verdict)

    def _join(self, terms: Terms) -> None:
        """Another node's part of `agree`."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            link = meeting.connect(self.place, terms, deadline=deadline, timeout_s=self.timeout_s)
            self._links[0] = link
            try:
                message: dict[str, Any] = {}
                while not message.keys() & {"go", "end"}:
                    message, _ = link.receive()
            except LostError as problem:  # it was restarted, or still ends an earlier job
                log.info("Node 0 does not take part yet (%s). Trying again.", problem)
                link.close()
                time.sleep(meeting.RETRY_S)
                continue
            if "end" in message:
                if message.get("last") is True:
                    vitals.write_last(self._environment)
                self.verdict = Verdict(int(message["end"]), str(message["message"]))
                self._raise_verdict()
            break
        threading.Thread(target=self._keep, name="nodes", daemon=True).start()
        threading.Thread(target=self._listen, args=(0, link), name="node 0", daemon=True).start()

    # ---- while the job runs

    def trainer_environment(self) -> dict[str, str]:
        """The variables by which the trainers of this node reach those of the others."""
        if not self.several:
            return {}
        link = next(iter(self._links.values()))
        own = {FIRST_NODE_VARIABLE: link.own_address if self.is_first else link.peer_address}
        interface = interface_of(link.own_address)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if self._environment.get(name):
                own[name] = self._environment[name]
            elif interface:
                own[name] = interface
        return own

    def share(self, folder: Path) -> None:
        """Until the end, what the first trainer leaves for the others in its folder also comes to their folders."""
        with self._files:
            self._folder = folder
            for name, content in self._early.items():
                self._put(folder / name, content)
            self._early.clear()

    def watch_from_here(self) -> None:
        """From here on the main thread looks at `verdict`, and stops are passed to the trainers."""
        self._training = True

    def ask_stop(self, number: int) -> None:
        """Let all nodes stop. Safe inside a signal handler."""
        self.stop = self.stop or (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    def report(self, code: int, message: str) -> Verdict:
        """Say that the trainers of this node have failed; returns what that means for all."""
        if self.is_first:
            if code != PeerError.exit_code:
                self._decide(Verdict(code, message))
            return self._wait(VICTIM_S) or Verdict(75, "The nodes have lost each other.")
        self._send_all({"ended": code, "message": message})
        verdict = self._wait(VICTIM_S + PING_S)
        return verdict or Verdict(75 if code == PeerError.exit_code else code, message)

    def wait_for_verdict(self) -> Verdict:
        """Of another node than the first: until that one has saved, exported and uploaded all."""
        while True:
            verdict = self._wait(60.0)
            if verdict is not None:
                return verdict

    def _wait(self, seconds: float) -> Verdict | None:
        deadline = time.monotonic() + seconds
        with self._changed:
            while self.verdict is None and time.monotonic() < deadline:
                self._changed.wait(TICK_S)
        return self.verdict

    # ---- threads

    def _keep(self) -> None:
        """Every moment: pass on a stop and new files; now and then a sign of life."""
        pinged = 0.0
        while not self._closed.wait(TICK_S):
            if self.stop is not None and not self._told_stop:
                self._told_stop = True
                self._send_all({"stop": int(self.stop), "last": vitals.is_last(self._environment)})
            if self.is_first and self._folder is not None:
                self._send_files(self._folder)
            if time.monotonic() > pinged + PING_S:
                pinged = time.monotonic()
                self._send_all({"ping": True})

    def _send_files(self, folder: Path) -> None:
        names = []
        with contextlib.suppress(OSError):  # the job has ended
            names = [path.name for path in folder.iterdir() if path.name.startswith(SHARED_FILES)]
        for name in sorted(set(names) - self._sent):
            self._send_all({"file": name}, read_regular(folder / name, limit=LARGEST_FILE))
            self._sent.add(name)

    def _send_all(self, message: dict[str, Any], content: bytes = b"") -> None:
        for link in list(self._links.values()):
            with contextlib.suppress(LostError):  # the thread that listens there learns it too
                link.send(message, content)

    def _send_verdict(self, verdict: Verdict) -> None:
        """With it comes whether the engine is to leave it at that: a limit ends all machines, and their bill."""
        last = vitals.is_last(self._environment)
        self._send_all({"end": verdict.code, "message": verdict.message, "last": last})

    def _listen(self, rank: int, link: Connection) -> None:
        """Until the connection to node `rank` ends."""
        try:
            while True:
                message, content = link.receive()
                if message.get("last") is True:
                    vitals.write_last(self._environment)
                if "stop" in message:
                    self._on_stop_elsewhere(rank, int(message["stop"]))
                elif "file" in message:
                    self._take_file(str(message["file"]), content)
                elif "end" in message:
                    self._decide(Verdict(int(message["end"]), str(message["message"])))
                    link.close()
                elif "ended" in message:
                    self._on_failure(rank, int(message["ended"]), str(message["message"]))
        except LostError as problem:
            self._on_lost(rank, link, problem)

    def _on_lost(self, rank: int, link: Connection, problem: LostError) -> None:
        with self._changed:
            if self._links.get(rank) is not link or self.verdict is not None:
                self._gone.add(rank)
                self._changed.notify_all()
                return
            if not self._begun and self.is_first:  # it may come again
                del self._links[rank]
                return
        if self.stop is not None:
            self._decide(Verdict(128 + self.stop, f"{stopped_how(self.stop, on_page=False)}."))
            return
        where = link.peer_address if rank else f"{self.place.address}, the first"
        self._decide(Verdict(75, f"Node {rank} ({where}) is lost: {problem}. It was killed, or is cut off."))

    def _on_stop_elsewhere(self, rank: int, number: int) -> None:
        known, self.stop = self.stop, self.stop or number
        if self.is_first and known is None:
            log.info("Node %d was asked to stop, so all nodes stop.", rank)
            os.kill(os.getpid(), number)

    def _on_failure(self, rank: int, code: int, message: str) -> None:
        if code == PeerError.exit_code:
            verdict = Verdict(75, f"The trainers of node {rank} have lost another node: {message}")
            threading.Timer(VICTIM_S, self._decide, (verdict,)).start()
        else:
            self._decide(Verdict(code, f"Node {rank}: {message}" if code < 128 else message))

    def _take_file(self, name: str, content: bytes) -> None:
        if "/" in name or not name.startswith(SHARED_FILES):
            return
        with self._files:
            if self._folder is None:  # what else the first node says must be heard meanwhile
                self._early[name] = content
            else:
                self._put(self._folder / name, content)

    def _put(self, path: Path, content: bytes) -> None:
        with contextlib.suppress(OSError), atomic.replacing(path) as temporary:  # the job has ended
            temporary.write_bytes(content)

    # ---- the end

    def _decide(self, verdict: Verdict) -> None:
        with self._changed:
            if self.verdict is not None:
                return
            self.verdict = verdict
            self._changed.notify_all()
        if self.is_first:
            self._send_verdict(verdict)
        if not self._training and not self._closed.is_set():
            os.kill(os.getpid(), signal.SIGUSR1)
            threading.Thread(target=self._leave, args=(verdict,), name="nodes", daemon=True).start()

    def _leave(self, verdict: Verdict) -> None:
        """End the process where the main thread does not."""
        if not self._closed.wait(LEAVE_S):
            log.error("%s [exit %d]", verdict.message, verdict.code)
            os._exit(verdict.code)

    def _raise_verdict(self) -> None:
        if self.verdict is None or self.verdict.code == 0:
            return
        if self.verdict.code > 128:
            raise StopRequestedError(self.verdict.message, exit_code=self.verdict.code)
        raise NodesEndedError(self.verdict.message, self.verdict.code)

    def _on_verdict_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self._training and not self._closed.is_set():
            self._raise_verdict()

    def _on_stop_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._closed.is_set():
            return
        self.ask_stop(number)
        code = 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        when = "after training" if self._training else "before training began"
        raise StopRequestedError(f"{stopped_how(number, on_page=False)} {when}.", exit_code=code)

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if self.several:
            if kind is not None:
                code = problem.exit_code if isinstance(problem, KilnError) else KilnError.exit_code
                self.end(code, str(problem))
            self._part()
            self._closed.set()
            self._undo.close()
            for link in list(self._links.values()):
                link.close()
            if problem is not None and not isinstance(problem, KilnError):
                self._raise_verdict()  # it was raised inside a library, which has made another error of it

    def end(self, code: int, message: str) -> int:
        """The last word of this node; returns the exit code of all, or its own where it has dismissed the others."""
        if not self.several or self._dismissed:
            return code
        if self.verdict is None:
            if self.is_first:
                self.verdict = Verdict(code, message)
                self._send_verdict(self.verdict)
            elif code:
                self._send_all({"ended": code, "message": message})
                self._wait(PART_S)
        return self.verdict.code if self.verdict else code

    def _part(self) -> None:
        """Wait until the others have read the last word: a connection that is closed before that may lose it."""
        deadline = time.monotonic() + PART_S
        with self._changed:
            while self.is_first and self._gone < self._links.keys() and time.monotonic() < deadline:
                self._changed.wait(TICK_S)
