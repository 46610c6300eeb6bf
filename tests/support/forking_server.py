"""A process that has imported torch, diffusers and the rest once, and forks for every program that a test starts.

    python -m tests.support.forking_server SOCKET

A program that trains spends seven seconds on imports; a fork of this process spends none. Nothing has been computed
before the fork and no thread has been started, which is checked. Each connection to SOCKET asks for one program: a JSON
message, {"arguments", "environment", "cwd"}, with the descriptors of its input, output and errors. The answers are the
number of its process and, when it has ended, its exit code. The server ends, and all its programs with it, when its own
input does. On an accelerator, which no fork may share, it says so and ends: each program is an interpreter of its own.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support import forked

MESSAGE = 2**20  # bytes, at most
# What jobs import, and only when they need it. Whatever is missing here costs time and nothing else.
MODULES = (
    "entrypoint.__main__", "entrypoint.fetch.fetch", "entrypoint.planning.preflight", "entrypoint.processes.launch",
    "trainer.__main__", "trainer.job.run", "trainer.families.flux", "trainer.families.sdxl", "trainer.families.sd3",
    "torch.utils.tensorboard", "encodings.idna", "multiprocessing.popen_fork", "runpy",
)  # fmt: skip
CLASSES = {
    "diffusers": (
        "AutoencoderKL", "FluxTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel", "FluxPipeline",
        "StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "FlowMatchEulerDiscreteScheduler",
        "EulerDiscreteScheduler", "DDPMScheduler",
    ),
    "transformers": (
        "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer", "T5EncoderModel", "T5Tokenizer",
        "T5TokenizerFast",
    ),
}  # fmt: skip


def import_all() -> None:
    for name in MODULES:
        importlib.import_module(name)
    for library, names in CLASSES.items():
        for name in names:
            getattr(importlib.import_module(library), name)


def has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


def serve(path: Path) -> dict[str, Any] | None:
    """Fork for each request: None when there will be no more, and in each fork what it is to be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the tests end on it, and then this does
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ended, wake = os.pipe()
    for end in (ended, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()
    print("ready", flush=True)
    programs: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for source in (listener, ended, sys.stdin.fileno()):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if ended in ready:
                os.read(ended, 4096)
                reap(programs)
            if sys.stdin.fileno() in ready:
                break
            if listener in ready:
                connection, _ = listener.accept()
                message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE, 3)
                number = os.fork()
                if number == 0:
                    os.setpgid(0, 0)
                    for place, descriptor in enumerate(descriptors):
                        os.dup2(descriptor, place)
                    return json.loads(message)
                for descriptor in descriptors:
                    os.close(descriptor)
                with suppress(OSError):  # it may have done so itself, and even have ended
                    os.setpgid(number, number)
                programs[number] = connection
                connection.send(json.dumps({"pid": number}).encode())
    for number in programs:
        with suppress(ProcessLookupError):
            os.killpg(number, signal.SIGKILL)
    return None


def reap(programs: dict[int, socket.socket]) -> None:
    """Tell of each program that has ended."""
    while programs:
        number, status = os.waitpid(-1, os.WNOHANG)
        if not number:
            return
        with programs.pop(number) as connection, suppress(OSError):
            connection.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())


def main() -> None:
    if has_accelerator():
        print("accelerator", flush=True)
        return
    sys.modules["pyarrow"] = None  # type: ignore[assignment] # it starts threads; where pandas is there, it is imported too
    import_all()
    del sys.modules["pyarrow"]  # a job that needs it finds it
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len(threads) == 1, f"threads {threads}: a fork would have but one of them"
    gc.collect()
    gc.freeze()  # what is never looked at again is not copied for it either
    asked = serve(Path(sys.argv[1]))
    if asked is not None:
        forked.run(asked["arguments"], asked["environment"], cwd=asked["cwd"])


if __name__ == "__main__":
    main()
