"""The shards of a stream, read as they come: each once, by whichever process is free, and never all of them here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.shards.stream import ShardStream
from trainer.data.shards.table import AskedCaptions, ShardTable, from_lines, read_table, to_lines
from trainer.spec.errors import DataError, SettingsError
from trainer.storage import atomic, json_files
from trainer.storage.read import read_regular

LARGEST_TABLE = 1 << 32


@dataclass(frozen=True)
class StreamTask:
    """A shard of a stream to read, once it is there, and the file for its table."""

    stream: Path
    name: str
    asked: AskedCaptions
    table: Path


def read_streamed(task: StreamTask) -> None:
    """Wait for a shard, read it, and write its table. For processes, which call it by its name.

    A shard that cannot be had is read as a damaged one: it is said, and few of them do not keep the others from being
    trained on. Raises UnreachableError where the whole place does not answer, StorageError.
    """
    stream = ShardStream(task.stream, ())
    try:
        table = read_table(stream.wait(task.name), task.asked)
    except (DataError, SettingsError) as problem:
        table = ShardTable(damage=str(problem))
    if table.damage and not table.samples:
        return  # the next start tries again
    atomic.write_lines(task.table, (f"{line}\n" for line in to_lines(table)))


def tables(
    stream: ShardStream,
    asked: AskedCaptions,
    run: Callable[[Sequence[StreamTask]], Iterator[None]],
    *,
    ahead: int,
) -> Iterator[ShardTable]:
    """The table of each shard in order; those without one are brought, some at a time, and read by `run`.

    `ahead`: how many are here at once, at most.
    """
    missing = []
    files = {}
    for name, _, version in stream.shards:
        files[name] = stream.table_file(name, version, asked.extension, asked.column)
        if not files[name].exists():
            missing.append(StreamTask(stream.folder, name, asked, files[name]))
    if missing:

        def ask(first: int) -> None:
            stream.want([task.name for task in missing[first : first + ahead]])

        ask(0)
        for done, _ in enumerate(run(missing), 1):
            ask(done)
    for name in stream.names():
        table = _read(files[name])
        yield table or ShardTable(damage=_why(stream, name))


def _why(stream: ShardStream, name: str) -> str:
    problem = json_files.read_object(stream.problem_file(name)) or {}
    return str(problem.get("message") or "it is empty, or no tar")


def _read(path: Path) -> ShardTable | None:
    """The table in a file; None where there is none, or another one."""
    try:
        text = read_regular(path, limit=LARGEST_TABLE).decode()
        return from_lines(text.splitlines())
    except (OSError, ValueError, TypeError, LookupError):
        return None
