"""What the trainers of another machine than the first need besides what the first one hands over.

They may see the first machine's folders (a network volume) or not (a disk of its own on each machine), and find out:
- CACHE_PATH: the first machine writes a mark into its cache. A machine that reads the same mark uses that cache, and
  encodes its share into it. Another one scans its own copy of the dataset, takes the captions that a model has made on
  the first one (CAPTION_WITH), compares all of it with what that one found, and encodes everything for itself.
- the state to resume from: a machine that does not have it, with the same digest, gets it through the network. So it
  is enough that the first machine sees OUTPUT_PATH.
- the base model: every machine has fetched its own, and converts it where it comes in single files.
The first process of each machine does this, and hands it to the others there.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from trainer.base_model.single_file import convert_single_files
from trainer.captioning.known import with_captions_of
from trainer.checkpoints import state_files
from trainer.data.folders.own_output import Written
from trainer.data.identity import fingerprint, fingerprint_differences
from trainer.job.class_images import draw_class_images
from trainer.job.handover import HandedOver
from trainer.job.prepare import PreparedData, scan_and_report
from trainer.job.reporting.status import Status
from trainer.spec.errors import SettingsError
from trainer.spec.plan import Plan
from trainer.storage import atomic, digests
from trainer.storage.read import read_regular, read_text
from trainer.storage.run_records import STATE_FILES
from trainer.training.distributed import Workers

CACHE_MARK = ".kiln-nodes"
NODE_FILE = "node.json"  # in the folder that the processes of a machine share
NETWORK_VOLUME_S = 5.0  # how long a file that another machine has written may stay unseen
LOOK_AGAIN_S = 0.2
LARGEST_STATE_FILE = 1 << 40
_, STATE_JSON = STATE_FILES


def to_hand_over(data: PreparedData) -> HandedOver:
    """What the first process hands over; with several machines, its cache gets the mark."""
    state = data.state.folder if data.state else None
    digest = digests.sha256(state / STATE_JSON) if state else ""
    mark = ""
    if data.plan.engine.nodes > 1:
        mark = secrets.token_hex(16)
        atomic.write_text(Path(data.plan.output.cache) / CACHE_MARK, mark)
    return HandedOver(data.plan, state, data.scan.images, digest, mark)


def on_this_node(
    own: Plan, handed: HandedOver, workers: Workers, *, status: Status, check_in: Callable[[], None]
) -> HandedOver:
    """`handed`, with the paths of this process's machine. `own`: the plan that this machine's entrypoint has made.

    Raises SettingsError where the images here are not those of the first machine.
    """
    if workers.node == 0:
        return handed
    path = workers.folder / NODE_FILE
    if workers.leads_node:
        _prepared_here(own, handed, workers, status=status, check_in=check_in).write(path)
    workers.wait_for(path, check_in)
    return HandedOver.read(path)


def _prepared_here(
    own: Plan, handed: HandedOver, workers: Workers, *, status: Status, check_in: Callable[[], None]
) -> HandedOver:
    cache = Path(own.output.cache)
    model = dataclasses.replace(own.model, path=str(convert_single_files(own.model, cache)))
    output = dataclasses.replace(handed.plan.output, cache=str(cache))
    plan = dataclasses.replace(handed.plan, model=model, output=output)
    if _has_mark(cache, handed.cache_mark):
        return dataclasses.replace(handed, plan=plan)
    here = draw_class_images(dataclasses.replace(plan, data=own.data), status=status, check_in=check_in)
    written = Written({"OUTPUT_PATH": Path(own.output.path), "CACHE_PATH": cache})
    scanned = scan_and_report(
        here.data,
        report=workers.own_folder / "dataset-report.txt",
        seed=plan.train.seed,
        written=written,
        captioned=partial(with_captions_of, handed.images),
    )
    different = fingerprint_differences(fingerprint(handed.images), fingerprint(scanned.images))
    if different:
        raise SettingsError(
            "The dataset here is not that of node 0 (node 0 → here):\n  "
            + "\n  ".join(different)
            + "\nFix: the same files on all nodes, or one CACHE_PATH that all nodes share."
        )
    plan = dataclasses.replace(plan, data=scanned.data)
    return dataclasses.replace(handed, plan=plan, images=scanned.images, shares_cache=False)


def _has_mark(cache: Path, mark: str) -> bool:
    """Whether this is the cache of the first machine. A network volume may show its file a moment later."""
    deadline = time.monotonic() + NETWORK_VOLUME_S
    while True:
        try:
            if read_text(cache / CACHE_MARK) == mark:
                return True
        except (OSError, ValueError):
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_AGAIN_S)


def give_state(workers: Workers, state: state_files.State | None) -> None:
    """The first process: the others get the state, where one of them does not see it."""
    if state is None or workers.size == workers.per_node or workers.all_agree(True):
        return
    for name in STATE_FILES:
        workers.from_process(0, read_regular(state.folder / name, limit=LARGEST_STATE_FILE))


def take_state(workers: Workers, handed: HandedOver) -> state_files.State | None:
    """The state to resume from, in another process than the first."""
    if handed.state is None:
        return None
    if workers.size == workers.per_node:
        return state_files.read(handed.state)
    is_here = _has_state(handed.state, handed.state_digest)
    if workers.all_agree(is_here):
        return state_files.read(handed.state)
    folder = workers.own_folder / handed.state.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in STATE_FILES:
        (folder / name).write_bytes(workers.from_process(0, b""))
    return state_files.read(folder)


def _has_state(folder: Path, digest: str) -> bool:
    try:
        return digests.sha256(folder / STATE_JSON) == digest
    except OSError:
        return False
