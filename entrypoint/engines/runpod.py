"""RunPod: the command of `python -m entrypoint.runpod deploy`, which checks the job and shows today's price itself."""

from __future__ import annotations

import shlex
import sys

from entrypoint.engines.documents import Document
from entrypoint.engines.gpu_names import RUNPOD
from entrypoint.engines.request import Request

NAMES = RUNPOD


def make(request: Request) -> Document:
    """The command. The variables and secrets are those of the environment; deploy reads them there."""
    words = ["-m", "entrypoint.runpod", "deploy", "--image", request.image, "--name", request.name]
    words += ["--gpu", RUNPOD[request.cards[0].card], "--count", str(request.count)]
    if request.storage:
        words += ["--network-volume", request.storage]
    for name in request.variables:
        words += ["--env", f"{name}={request.variables[name]}"]
    for name in request.secrets:
        words += ["--secret", f"{name}={name}"]
    notes = []
    if request.secrets:
        notes.append(
            f"Make secrets of these names at https://console.runpod.io/user/secrets: {', '.join(request.secrets)}."
        )
    file = f"{request.name}.sh"
    text = f"#!/bin/sh\nexec {shlex.join(['python', *words])}\n"
    return Document(file, text, (sys.executable, *words), sys.executable, "", notes=tuple(notes))
