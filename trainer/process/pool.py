"""A function applied to many things by several processes, through pipes alone.

Python's own pools share semaphores, which have names in the machine's shared memory: whoever is stopped in the midst of
it leaves them there, and a helper process complains about them on the terminal. They also cannot tell which thing a
worker had before it was killed.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Thing = TypeVar("Thing")
Result = TypeVar("Result")
AHEAD = 2  # things that a worker has at once, so that it never waits for the next one


class KilledWorkerError(Exception):
    """A worker has ended before its work was done. `thing`: what it had then."""

    def __init__(self, thing: Any) -> None:
        super().__init__(str(thing))
        self.thing = thing


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    under_way: deque[int] = field(default_factory=deque)  # places of the things that it has, in the order it takes them


def in_processes(
    function: Callable[[Thing], Result], things: Sequence[Thing], *, count: int, enter: Callable[[], None]
) -> Iterator[Result]:
    """`function` of each thing, in order, by at most `count` processes that call `enter` first and end with this one.

    Things and results are small: kilobytes, which a pipe takes without waiting. Raises what `function` raises, with its
    stack as a note (a RuntimeError with its name and text where it cannot be pickled), and KilledWorkerError where a
    process was killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of this process hold
    workers: list[_Worker] = []
    try:
        for _ in range(min(count, len(things))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, function, enter), daemon=True)
            process.start()
            theirs.close()  # else its end would not be noticed
            workers.append(_Worker(process, ours))
        yield from _in_order(workers, things)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.pipe.close()
        for worker in workers:
            worker.process.join()


def _in_order(workers: Sequence[_Worker], things: Sequence[Any]) -> Iterator[Any]:
    waiting = deque(range(len(things)))
    results: dict[int, Any] = {}
    for place in range(len(things)):
        while place not in results:
            for worker in workers:
                _hand_out(worker, waiting, things)
            busy = {worker.pipe: worker for worker in workers if worker.under_way}
            for pipe in wait([*busy]):
                worker = busy[pipe]  # type: ignore[index]
                results[worker.under_way[0]] = _received(worker, things)
                worker.under_way.popleft()
        failed, result = results.pop(place)
        if failed:
            raise result
        yield result


def _hand_out(worker: _Worker, waiting: deque[int], things: Sequence[Any]) -> None:
    while waiting and len(worker.under_way) < AHEAD:
        worker.under_way.append(waiting.popleft())
        try:
            worker.pipe.send(things[worker.under_way[-1]])
        except BrokenPipeError:
            raise KilledWorkerError(things[worker.under_way[0]]) from None


def _received(worker: _Worker, things: Sequence[Any]) -> Any:
    """Whether the function failed, and its result or what it raised."""
    try:
        failed, result = worker.pipe.recv()
        if failed:
            result = _as_raised(worker.pipe, result)
    except (EOFError, ConnectionResetError):
        raise KilledWorkerError(things[worker.under_way[0]]) from None
    return failed, result


def _as_raised(pipe: Connection, told: RuntimeError) -> Exception:
    """The error that follows `told` in the pipe; `told` itself where it has not come through, or not whole."""
    try:
        problem = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise
    except Exception:  # noqa: BLE001 (to make it anew, code of its class is called, which may raise anything)
        return told
    return problem if isinstance(problem, Exception) else told


def _serve(pipe: Connection, function: Callable[[Any], Any], enter: Callable[[], None]) -> None:
    """The work of a process: until the pipe ends, or its parent does."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    enter()
    while True:
        try:
            thing = pipe.recv()
        except EOFError:
            return
        try:
            answer = (False, function(thing))
        except Exception as problem:  # noqa: BLE001 (raised again by whoever asked for it)
            problem.add_note(traceback.format_exc())
            _send_error(pipe, problem)
            continue
        pipe.send(answer)


def _send_error(pipe: Connection, problem: Exception) -> None:
    """Send its name and text, which always come through, and then the error itself, if it can be pickled."""
    told = RuntimeError(f"{type(problem).__name__}: {problem}")
    for note in problem.__notes__:
        told.add_note(note)
    pipe.send((True, told))
    try:
        pipe.send(problem)
    except Exception:  # noqa: BLE001 (pickling calls code of its class, which may raise anything)
        pipe.send(None)


def _end_with_parent() -> None:
    """Where the parent is killed in the midst of a long call, the pipe's end would be noticed only afterwards."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
