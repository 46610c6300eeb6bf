"""Calls functions of the entrypoint in a process of its own: the Hub's client reads HF_ENDPOINT when it is imported.

Reads one JSON object a line, {"call": "model" | "source" | "preflight" | "upload", ...}; answers each with one: the
exit code, what the function returned or the error, and what was logged.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

from entrypoint.fetch.fetch import fetch_model, fetch_source
from entrypoint.fetch.http import RetryPolicy
from entrypoint.planning.preflight import preflight
from entrypoint.processes import upload
from entrypoint.processes.uploader import Uploader
from trainer.spec.errors import KilnError
from trainer.spec.plan import ModelPlan, Plan, Source


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


def call(job: dict[str, Any]) -> dict[str, Any]:
    if job["call"] == "upload":
        policies = {name: RetryPolicy(**job["job"][name]) for name in ("at_start", "at_end")}
        Uploader(upload.Job(**job["job"] | policies), threading.Event()).final()
        return {}
    retries, token, hub_cache = RetryPolicy(**job["patience"]), job["token"], Path(job["hub_cache"])
    if job["call"] == "model":
        model = ModelPlan(base="flux", family="flux", source=job["source"], **job["fields"])
        patterns = tuple(job["patterns"])
        return dataclasses.asdict(
            fetch_model(model, patterns=patterns, token=token, hub_cache=hub_cache, retries=retries)
        )
    if job["call"] == "source":
        source = Source(kind=job["kind"], location=job["source"], **job["fields"])
        cache = Path(job["cache"])
        return dataclasses.asdict(fetch_source(source, cache=cache, token=token, hub_cache=hub_cache, retries=retries))
    preflight(Plan.from_json(json.dumps(job["plan"])), token=token, hub_cache=hub_cache, retries=retries)
    return {}


def main() -> None:
    handler = Lines()
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for line in sys.stdin:
        handler.lines.clear()
        try:
            code, data = 0, call(json.loads(line))
        except KilnError as problem:
            code, data = problem.exit_code, {"error": type(problem).__name__, "message": str(problem)}
        print(json.dumps({"code": code, "data": data, "log": "\n".join(handler.lines)}), flush=True)


if __name__ == "__main__":
    main()
