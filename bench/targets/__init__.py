"""Compile our Triton kernels for accelerators that need not be there, with the constants that the engine launches.

    python -m bench targets                      # of each kernel, the launch with the most constants that matter
    python -m bench targets --all                # every distinct launch of every published model: several minutes
    python -m bench targets --all --family krea2
    python -m bench targets --target gfx942 sm_120

One row for a kernel and a target: how many distinct launches were compiled, and the most registers, spilled registers
and shared memory among them. A launch that does not compile, that spills, or that needs more than the target has is a
row with a `fault`, and the exit code is then 1. Needs Triton, which brings the compilers of both vendors; no GPU.

Read in this order: `limits` (the targets, and what they allow), `engine` (one step of each model on torch's device
"meta", which has shapes and no numbers), `launches` (what that step launches), `compiling`, `command`.
"""

from bench.targets.command import main

__all__ = ["main"]
