"""`python -m entrypoint job ENGINE`: print the job for an engine, or start it with the engine's own tool."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from entrypoint.engines import dstack, hugging_face, kubernetes, modal, runpod, sky, slurm, vast
from entrypoint.engines.documents import Document
from entrypoint.engines.request import Request, read_request
from trainer.process import streams
from trainer.spec.commands.ending import exit_code_of
from trainer.spec.commands.parser import Parser, whole
from trainer.spec.errors import SettingsError
from trainer.spec.log_lines import log_to, safe_lines
from trainer.spec.messages.secrets import Known
from trainer.spec.values import as_number, show
from trainer.storage import json_files
from trainer.storage.folders import write_text
from trainer.storage.read import read_text

log = logging.getLogger(__name__)
LONGEST_FILE = 1 << 24  # bytes, of a job
DISK_GB = 150  # base models, cache, states and results, and the image


class Engine(NamedTuple):
    """One engine of the command line."""

    names: Mapping[str, object]  # its GPUs; empty: whatever the site has
    make: Callable[[Request, argparse.Namespace], Document]
    storage: str  # what --storage means there
    has_nodes: bool = True  # whether it starts one job on several machines


ENGINES: Mapping[str, Engine] = {
    "sky": Engine(sky.NAMES, lambda request, _: sky.make(request), "a volume of SkyPilot, or a bucket (s3://, gs://)"),
    "dstack": Engine(dstack.NAMES, lambda request, _: dstack.make(request), "a volume of dstack"),
    "hf": Engine(
        hugging_face.NAMES,
        lambda request, _: hugging_face.make(request),
        "hf://buckets/OWNER/NAME",
        has_nodes=False,
    ),
    "k8s": Engine(
        kubernetes.NAMES,
        lambda request, options: kubernetes.make(request, kind=options.kind, queue=options.queue),
        "a PersistentVolumeClaim",
    ),
    "slurm": Engine(
        slurm.NAMES,
        lambda request, options: slurm.make(request, container=options.container, gres=options.gres),
        "a folder that every node sees",
    ),
    "vast": Engine(
        vast.NAMES, lambda request, _: vast.make(request), "the number of a volume that you rent", has_nodes=False
    ),
    "modal": Engine(modal.NAMES, lambda request, _: modal.make(request), "a Volume (default: kiln)", has_nodes=False),
    "runpod": Engine(
        runpod.NAMES, lambda request, _: runpod.make(request), "the id of a network volume", has_nodes=False
    ),
}


def main(arguments: Sequence[str], environ: Mapping[str, str], known: Known) -> int:
    """Print or start the job; returns the exit code, 64 for a wrong command line. `known`: secrets to hide."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as stop:
        return 64 if stop.code else streams.output_code()
    log_to(logging.StreamHandler(), "%(message)s", level=logging.WARNING, known=known)
    return exit_code_of(lambda: _job(options, environ), log)


def _parser() -> Parser:
    parser = Parser(
        "python -m entrypoint job",
        description="Print the job for the variables that are set, for an engine's own tool.",
    )
    engines = parser.add_subparsers(dest="engine", required=True, metavar="ENGINE")
    for name, engine in ENGINES.items():
        own = engines.add_parser(name, help=f"--storage: {engine.storage}")
        own.add_argument("--image", required=True, help="REGISTRY/NAME:TAG, as for ./build.sh --tag")
        own.add_argument("--gpu", metavar="CARD", help="a GPU, such as 'L40S'; default: the cheapest that fits")
        own.add_argument("--count", type=whole(1), help="number of GPUs; default: NUM_GPUS, or one")
        own.add_argument("--prices", metavar="FILE", type=Path, help="prices to choose by, as for quote")
        own.add_argument("--storage", metavar="PLACE", help=f"what is mounted at /workspace: {engine.storage}")
        own.add_argument("--disk", type=whole(1), default=DISK_GB, help=f"GB of disk (default {DISK_GB})")
        own.add_argument("--hours", type=_hours, help="limit of time; default: by MAX_RUNTIME or what is predicted")
        own.add_argument("--spot", action="store_true", help="a machine that may be taken away")
        own.add_argument("--name", type=_name, default="kiln", help="of the job (default kiln)")
        own.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable besides")
        own.add_argument("--run", action="store_true", help="write the file here and start it with the engine's tool")
        if name == "k8s":
            own.add_argument("--kind", choices=("job", "trainjob"), default="job", help="trainjob: Kubeflow's")
            own.add_argument("--queue", default="", help="a LocalQueue of Kueue")
        if name == "slurm":
            own.add_argument("--container", choices=("pyxis", "apptainer"), default="apptainer")
            own.add_argument("--gres", default="", help="what the site calls its GPUs, such as gpu:l40s")
    return parser


def _job(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Print the job; with --run, this process becomes the engine's tool."""
    engine = ENGINES[options.engine]
    request, hidden = read_request(options, environ, engine.names)
    if request.nodes > 1 and not engine.has_nodes:
        able = ", ".join(name for name, one in ENGINES.items() if one.has_nodes)
        raise SettingsError(
            f"NODES={request.nodes}: {options.engine} starts a job on one machine. Fix: remove NODES, or use {able}."
        )
    document = engine.make(request, options)
    _refuse_secrets(document, hidden)
    for note in document.notes:
        log.warning("%s", note)
    if options.run:
        _become(document, {**environ, **hidden})
    print(_with_commands(document, request), end="", flush=True)  # noqa: T201
    return streams.output_code()


def _become(document: Document, environ: Mapping[str, str]) -> NoReturn:
    if shutil.which(document.tool) is None:
        raise SettingsError(
            f"--run: {document.tool} is not here. Fix: {document.install}; or start what is printed without --run "
            "where it is."
        )
    for command in document.before:
        log.warning("Once, before the first job: %s", command)
    path = Path(document.name)
    json_files.set_aside_unless(path, lambda found: _text_of(found) == document.text, "has another job, or was edited")
    write_text(path, document.text)
    words = list(document.start)
    os.execvpe(words[0], words, dict(environ))  # noqa: S606 (what the user asks for)


def _text_of(path: Path) -> str | None:
    try:
        return read_text(path, limit=LONGEST_FILE)
    except (OSError, ValueError):
        return None


def _refuse_secrets(document: Document, hidden: Mapping[str, str]) -> None:
    """A guard of our own: no text that is printed or written may hold a secret."""
    for name, value in hidden.items():
        for text in (document.text, *document.start, *document.before):
            assert value not in text, f"{name} would be in the text of the job"


def _with_commands(document: Document, request: Request) -> str:
    """The text of the file, with the commands that start it as comments below its first line."""
    comment = [f"# {request.cards[0].card}: {request.cards[0].way}."]
    for command in document.before:
        comment.append(f"# Once, before: {command}")
    comment.append(f"# Save this as {document.name}, then: {_shown(document.start)}")
    first, newline, rest = document.text.partition("\n")
    if first.startswith("#!"):
        # sbatch reads its options up to the first command; comments between them do no harm.
        return "\n".join([first, *comment, rest])
    return "\n".join([*comment, first]) + newline + rest


def _shown(words: Sequence[str]) -> str:
    shown = ["python" if word == sys.executable else word for word in words]
    return safe_lines(shlex.join(shown))


def _name(text: str) -> str:
    """The type of an argument that is a name for every engine: of DNS, and short."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(f"{show(text)} is not 1 to 40 of a-z, 0-9 and -, with a letter first")
    return text


def _hours(text: str) -> float:
    """The type of an argument that is a number of hours."""
    hours = as_number(text.strip())
    if hours is None or not 0 < hours <= 1000:
        raise argparse.ArgumentTypeError(f"{show(text)} is not a number of hours, above 0, up to 1000")
    return hours
