"""What the jobs of a queue ask alike, and what was answered: a check of 900 jobs reads a model and its images once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any, TypeVar

from entrypoint.system.machine import Machine
from trainer.spec.errors import KilnError

Answer = TypeVar("Answer")
MOST = 64  # answers that are kept: the images of a dataset can be a million


class Answers:
    """`machine`: what it was asked. `several`: whether there is more than one job.

    For commands that change nothing: an answer is given again whatever has happened since.
    """

    def __init__(self, machine: Machine, *, several: bool = False) -> None:
        self.machine = machine
        self.several = several
        self._known: OrderedDict[Hashable, tuple[Any, Exception | None, TracebackType | None]] = OrderedDict()

    def of(self, question: Callable[..., Answer], *arguments: Hashable, by: Hashable = None) -> Answer:
        """`question(*arguments)`, or its answer from before. Raises what it raised, too.

        `by`: what decides the answer; None: the arguments.
        """
        key = (question, arguments if by is None else by)
        if key in self._known:
            self._known.move_to_end(key)
        else:
            self._known[key] = _answered(question, arguments)
            if len(self._known) > MOST:
                self._known.popitem(last=False)
        answer, problem, where = self._known[key]
        if problem is not None:
            raise problem.with_traceback(where)  # without the places where it was raised again since
        return answer


def _answered(
    question: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[Any, Exception | None, TracebackType | None]:
    try:
        return question(*arguments), None, None
    except (KilnError, OSError) as problem:
        return None, problem, problem.__traceback__
