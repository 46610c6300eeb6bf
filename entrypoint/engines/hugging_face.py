"""Hugging Face Jobs: a container on the Hub's own machines. It is never started again, so 75 is tried again inside.

https://huggingface.co/docs/huggingface_hub/guides/jobs; the flavours are those of the installed library's JobHardware.
"""

from __future__ import annotations

import math
import shlex

from entrypoint.engines.again import loop
from entrypoint.engines.documents import Document
from entrypoint.engines.gpu_names import HUGGING_FACE
from entrypoint.engines.request import Request
from trainer.spec.errors import SettingsError

NAMES = HUGGING_FACE


def make(request: Request) -> Document:
    """The command, as a script. `--secrets NAME` takes the value from the environment of whoever starts it."""
    flavors = HUGGING_FACE[request.cards[0].card]
    if request.count not in flavors:
        known = ", ".join(str(count) for count in flavors)
        raise SettingsError(
            f"Hugging Face Jobs has {request.cards[0].card} in machines with {known} GPUs, not {request.count}. Fix: "
            "--count, or another --gpu."
        )
    words = ["hf", "jobs", "run", "--detach", "--name", request.name, "--flavor", flavors[request.count]]
    words += ["--timeout", f"{math.ceil(request.hours * 60)}m"]
    if request.page:
        words += ["--expose", str(request.page)]
    for name, value in request.variables.items():
        words += ["--env", f"{name}={value}"]
    for name in request.secrets:
        words += ["--secrets", name]
    notes = []
    if request.storage:
        words += ["--volume", f"{request.storage}:/workspace"]
    else:
        notes.append(
            "No --storage: nothing outlives the job but what PUSH_TO_HUB uploads. Name hf://buckets/YOU/BUCKET."
        )
    words += [request.image, "sh", "-c", loop()]
    file = f"{request.name}.sh"
    text = "#!/bin/sh\nexec " + _lines(words) + "\n"
    return Document(file, text, ("sh", file), "hf", "pip install huggingface_hub", notes=tuple(notes))


def _lines(words: list[str]) -> str:
    """The command with an option on each line."""
    text = ""
    for i, word in enumerate(words):
        if i:
            text += " \\\n  " if word.startswith("--") or word == words[-4] else " "
        text += shlex.quote(word)
    return text
