"""Modal: a function that runs the job in the image, with a Volume at /workspace.

Modal itself starts a function again whose machine is taken away. 75 is tried again inside the function; whatever else
the job ends with is an error, which ends the run. https://modal.com/docs/reference
"""

from __future__ import annotations

from collections.abc import Mapping

from entrypoint.engines.again import PAUSE_S, START, TRIES
from entrypoint.engines.documents import Document
from entrypoint.engines.gpu_names import MODAL
from entrypoint.engines.request import Request
from trainer.process.guard import KILLED_EXIT_CODE

NAMES = MODAL
LONGEST_S = 24 * 3600  # Modal's limit for one call
TEMPLATE = """\
import signal
import subprocess
import time

import modal

VARIABLES = {variables}
SECRETS = {secrets}

app = modal.App({name})
image = modal.Image.from_registry({image}).entrypoint([])
volume = modal.Volume.from_name({storage}, create_if_missing=True)


@app.function(
    image=image,
    gpu={gpu},
    timeout={timeout},
    volumes={{"/workspace": volume}},
    secrets=[modal.Secret.from_dict(VARIABLES), modal.Secret.from_local_environ(SECRETS)],
)
def train():
    for attempt in range({tries}):
        if attempt:
            time.sleep({pause})
        process = subprocess.Popen({start})
        try:
            code = process.wait()
        except BaseException:  # Modal stops the function: the job saves what it has
            process.send_signal(signal.SIGTERM)
            process.wait(25)
            volume.commit()
            raise
        volume.commit()
        if code != {again}:
            break
    if code:
        raise RuntimeError(f"The job ended with exit code {{code}}.")


@app.local_entrypoint()
def main():
    train.remote()
"""


def make(request: Request) -> Document:
    """The program, as `modal run` takes it. Secrets come from the environment of whoever starts it."""
    gpus = []
    for choice in request.cards:
        name = MODAL[choice.card]
        gpus.append(f"{name}:{request.count}" if request.count > 1 else name)
    text = TEMPLATE.format(
        variables=_literal(request.variables),
        secrets=repr(list(request.secrets)),
        name=repr(request.name),
        image=repr(request.image),
        storage=repr(request.storage or "kiln"),
        gpu=repr(gpus if len(gpus) > 1 else gpus[0]),
        timeout=min(LONGEST_S, round(request.hours * 3600)),
        tries=TRIES,
        pause=PAUSE_S,
        start=repr(START.split()),
        again=KILLED_EXIT_CODE,
    )
    file = f"{request.name.replace('-', '_')}_modal.py"
    return Document(file, text, ("modal", "run", "--detach", file), "modal", "pip install modal")


def _literal(values: Mapping[str, str]) -> str:
    """A dict of Python, an entry a line."""
    lines = [f"    {name!r}: {value!r},\n" for name, value in values.items()]
    return "{\n" + "".join(lines) + "}"
