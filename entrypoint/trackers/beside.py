"""The tracking process, as the entrypoint sees it. It alone gets the keys of the tracker's account."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from entrypoint.processes import side_process
from entrypoint.processes.side_process import Ending, SideProcess
from entrypoint.settings.row import Secret
from entrypoint.system.environment import child_environment, package_index

TRACKER = "KILN_TRACKER"  # which library
FOUND = "KILN_TRACKER_FOUND"  # set in the second start of the process, which has it
OWN_VARIABLES = {"wandb": "WANDB_", "mlflow": "MLFLOW_", "trackio": "TRACKIO_"}  # beginnings of names
MOST_S = 110.0  # for what is left to be sent at the end


@dataclass(frozen=True)
class Job:
    """What the process reads from its standard input."""

    out: str
    started: float = field(default_factory=time.time)


def environment_of(
    tracker: str, environment: Mapping[str, str], *, cache: Path, hub_token: Secret | None
) -> dict[str, str]:
    """The variables of the process: those of the tracker, its keys among them, and none of another's.

    `hub_token`: for trackio, whose Spaces are on the Hub.
    """
    own = child_environment(environment, network=True) | package_index(environment)
    beginning = OWN_VARIABLES[tracker]
    own |= {name: value for name, value in environment.items() if name.startswith(beginning)}
    own |= {TRACKER: tracker, "CACHE_PATH": str(cache)}
    if tracker == "trackio" and hub_token and environment.get("TRACKIO_SPACE_ID"):
        own["HF_TOKEN"] = hub_token.reveal()
    return own


@contextmanager
def tracking(tracker: str | None, out: Path, own: Mapping[str, str]) -> Iterator[Ending]:
    """Inside the context, `tracker` gets what the job in `out` writes. `own`: of `environment_of`.

    It raises nothing of its own: a job does not fail because of a tracker.
    """
    if tracker is None:
        yield Ending()
        return
    side = SideProcess("entrypoint.trackers", f"LOG_WITH={tracker}", MOST_S)
    with side_process.running(side, asdict(Job(str(out))), own=own, environment=own) as ending:
        yield ending
