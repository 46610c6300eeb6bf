"""What a check found, as one JSON object for programs: `python -m entrypoint --check --json`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

from trainer import __version__
from trainer.spec.log_lines import LineFormatter
from trainer.spec.messages.secrets import Known
from trainer.spec.plan import Plan, Source


class CheckReport(logging.Handler):
    """Collects the messages of a check, and what the check tells it. `known`: secrets to hide."""

    def __init__(self, known: Known) -> None:
        super().__init__()
        self.setFormatter(LineFormatter("%(message)s", known=known))
        self.plan: Plan | None = None
        self.figures: Mapping[str, Any] | None = None
        self.queue: list[dict[str, Any]] = []  # a check of several jobs: the name, exit code and figures of each
        self._known = known
        self._messages: dict[int, list[str]] = {logging.INFO: [], logging.WARNING: [], logging.ERROR: []}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message by its level; those between two levels belong to the lower one."""
        level = max(level for level in self._messages if level <= max(record.levelno, logging.INFO))
        self._messages[level].append(self.format(record))

    def to_json(self, exit_code: int) -> str:
        """The keys are described in docs/agents.md, and are only ever added to."""
        plan = None
        if self.plan is not None:
            plan = dataclasses.asdict(self.plan.map_sources(_public))
        report = {
            "kiln": __version__,
            "ok": exit_code == 0,
            "exit_code": exit_code,
            "errors": self._messages[logging.ERROR],
            "warnings": self._messages[logging.WARNING],
            "messages": self._messages[logging.INFO],
            "job": self.figures,
            "plan": plan,
        }
        if self.queue:
            report["queue"] = self.queue
        return self._known.hide(json.dumps(report, indent=2, ensure_ascii=False))


def _public(source: Source, _dataset: object) -> Source:
    """Without the key that an address may hold."""
    return dataclasses.replace(source, location=source.public)
