"""Page-locked host memory, which the device reads and writes without the CPU, and views of one buffer as tensors."""

from __future__ import annotations

import math
import mmap

import torch

ALIGNMENT = 256  # bytes; tensors in a buffer begin where torch's own allocator would let them begin


def aligned(size: int) -> int:
    """`size` in bytes, rounded up to `ALIGNMENT`."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def view(
    buffer: torch.Tensor, offset: int, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The dense tensor of this shape and type whose bytes begin at `offset` of a uint8 buffer."""
    return buffer.view(dtype).as_strided(shape, stride, offset // dtype.itemsize)


def pinned_bytes(size: int) -> torch.Tensor:
    """`size` bytes of page-locked memory. torch's own pinned allocator rounds up to the next power of two.

    Unregister the buffer with `unpin` before it is freed.
    """
    buffer = torch.frombuffer(mmap.mmap(-1, max(1, size)), dtype=torch.uint8)
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))
    return buffer


def unpin(buffers: list[torch.Tensor]) -> None:
    """Unregister the buffers, once no copy reads them any more and before they are freed; empties the list."""
    if buffers:
        torch.cuda.synchronize()
    for buffer in buffers:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())))
    buffers.clear()
