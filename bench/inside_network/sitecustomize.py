"""The first thing that a program on one of the machines of `bench.network` does: it goes there."""

import ctypes
import os
from pathlib import Path

VARIABLE = "KILN_TEST_MACHINE"  # the process that holds the machine's namespaces


def enter(process: str) -> None:
    if Path(f"/proc/{process}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
        return  # whoever started us was there
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "net"):
        descriptor = os.open(f"/proc/{process}/ns/{kind}", os.O_RDONLY)
        if libc.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the {kind} namespace of {process}")
        os.close(descriptor)


if VARIABLE in os.environ:
    enter(os.environ[VARIABLE])
