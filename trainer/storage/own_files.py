"""The files that a job writes in the folders of users, and how each is told from what a user put there.

The rule: a job removes and replaces what it wrote, and nothing else. LoRA files and states are listed in the run's
record before they are written (`run_records`). Every other file has a name of its own and a content that only Kiln
writes, which is looked at before the first write. What has such a name and another content is set aside.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from trainer.storage import atomic, json_files, run_records
from trainer.storage.read import open_regular

log = logging.getLogger(__name__)
HEAD_BYTES = 4096  # that are enough to tell what a file is
RUN_LOG = "run.log"
SHEET_NAME = "contact-sheet.png"
SAMPLE_NAME = re.compile(r"step-([0-9]{8})-([0-9]{2,})\.png")  # step, number of the prompt
# The same with another strength of the LoRA than 1.
AT_STRENGTH_NAME = re.compile(r"step-([0-9]{8})-([0-9]{2,})-at-([0-9]+(?:\.[0-9]+)?)\.png")
REPORT_NAME = "dataset-report.txt"
DATASET_VIEW = "dataset-images.jsonl"
DATASET_VIEW_MARK = "kiln_dataset"  # the first key of its first line
LOG_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ")
STACKS = re.compile(rb"(Current thread|Thread|Timeout|Fatal) ")
SHEET_MARK = b"prompts\0"  # the key of the text in the contact sheet's PNG
FOLDERS = ("state", "sample", "logs", "tracking")  # of a run

Test = Callable[[Path], bool]


def head(path: Path) -> bytes | None:
    """The first bytes of a regular file; None for anything else."""
    try:
        with open_regular(path) as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return None


def begins_with(pattern: re.Pattern[bytes]) -> Test:
    """Whether a file begins so, or is empty: then nothing is lost."""

    def test(path: Path) -> bool:
        found = head(path)
        return found is not None and (not found or pattern.match(found) is not None)

    return test


def has_keys(*keys: str) -> Test:
    """Whether a file is a JSON object with these keys."""
    return lambda path: set(keys) <= (json_files.read_object(path) or {}).keys()


is_run_log = begins_with(LOG_LINE)
is_report = begins_with(re.compile(rb"Images: \d+ found"))
is_html_report = begins_with(re.compile(b"<!doctype html>\n<!-- Written by Kiln -->"))
is_dataset_view = begins_with(re.compile(rb'\{"kiln_dataset": '))
is_table = begins_with(re.compile(b'\xef\xbb\xbf"file"'))


def is_sheet(path: Path) -> bool:
    """Whether a file is a contact sheet: all have the prompts in front of their pixels."""
    found = head(path)
    return found is not None and found.startswith(b"\x89PNG") and SHEET_MARK in found


def is_plan(path: Path) -> bool:
    return run_records.read_plan(path) is not None


# Of a job, in OUTPUT_PATH. Where a test is missing, whoever writes the file looks at it.
OF_JOB: dict[str, Test | None] = {
    "status.json": has_keys("phase", "started"),
    "crashes.json": None,
    "hang.txt": begins_with(STACKS),
    RUN_LOG: None,
    "pod.json": None,
    "notices.json": has_keys("told", "events"),
}
# Of a run, in its folder.
OF_RUN: dict[str, Test | None] = {
    "plan.json": is_plan,
    "upload.json": has_keys("repo", "file"),
    "stored.json": has_keys("repo", "file"),
    run_records.RECORD: lambda path: run_records.read_record(path.parent) is not None,
    REPORT_NAME: None,
    "report.html": is_html_report,
    "README.md": None,
    "tracking.json": has_keys("with", "id"),
    "dataset-report.csv": None,
    "metrics.jsonl": None,
    DATASET_VIEW: is_dataset_view,
}


def set_aside_foreign(folder: Path, tests: dict[str, Test | None]) -> None:
    """Free the names of the files that a job, or a run, writes in `folder`."""
    for name, test in tests.items():
        if test is not None:
            json_files.set_aside_unless(folder / name, test)


def set_aside_no_folders(home: Path, names: tuple[str, ...] = FOLDERS) -> None:
    """Free the names of the folders that a run makes in its own: a link to a folder is one."""
    for name in names:
        json_files.set_aside_unless(home / name, os.path.isdir, "is not a folder")


def is_in_samples(name: str) -> bool:
    """Whether a run writes a file of this name into the folder of its samples."""
    return name == SHEET_NAME or read_sample_name(name) is not None


def sample_name(step: int, number: int, strength: float = 1.0) -> str:
    """The file of a sample: of a step, the prompt of that number, and a strength of the LoRA."""
    suffix = "" if strength == 1 else f"-at-{strength:g}"
    return f"step-{step:08d}-{number:02d}{suffix}.png"


def read_sample_name(name: str) -> tuple[int, int, float] | None:
    """Step, number of the prompt and strength, of such a name; None of any other."""
    match = SAMPLE_NAME.fullmatch(name)
    if match is not None:
        return int(match[1]), int(match[2]), 1.0
    match = AT_STRENGTH_NAME.fullmatch(name)
    if match is not None:
        return int(match[1]), int(match[2]), float(match[3])
    return None


def set_aside_samples(folder: Path) -> None:
    """Take what is left of an earlier run's samples out of the place that another run gets. Other files stay there."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    own = [name for name in names if is_in_samples(name)]
    if not own:
        return
    aside = json_files.free_aside_name(folder)
    aside.mkdir()
    for name in own:
        (folder / name).rename(aside / name)
    log.warning("%s has samples of a run that was given up. They are in %s now.", folder, aside.name)


def remove_leftovers(out: Path) -> None:
    """Remove the temporary files of a process that was killed, of all files that a run in `out` writes.

    Only for the process that holds the folder's lock.
    """
    runs = run_records.known_runs(out)
    names = {".lease", *OF_JOB, *OF_RUN}
    for run in runs:
        names |= {*run_records.own_names(run.record), *run_records.unverified_names(run.record)}
    atomic.remove_leftovers(out, names.__contains__)
    for home in {out, *(run.home for run in runs)}:
        atomic.remove_leftovers(home, OF_RUN.__contains__)
        atomic.remove_leftovers(home / "sample", is_in_samples)
