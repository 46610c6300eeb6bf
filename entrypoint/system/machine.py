"""What this machine has, asked once for all jobs of a command: the drivers' tools and torch take seconds to answer."""

from __future__ import annotations

import functools

from entrypoint.system import hardware
from entrypoint.system.hardware import Hardware, TorchKernels


class Machine:
    """Nothing is asked before it is needed."""

    @functools.cached_property
    def hardware(self) -> Hardware:
        """The devices. Raises UnreachableError if a driver is there but does not answer."""
        return hardware.detect()

    @functools.cached_property
    def asked_torch(self) -> TorchKernels:
        """Asks torch, which answers while other things are done."""
        return TorchKernels()

    @functools.cached_property
    def kernels(self) -> tuple[str, ...]:
        """The architectures that torch's kernels are built for. Waits for the answer; () where torch does not say."""
        return self.asked_torch.names()
