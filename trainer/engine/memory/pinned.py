"""Page-locked host memory, and views of one buffer as tensors."""

from __future__ import annotations

import mmap

import torch


def view(
    buffer: torch.Tensor, offset: int, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """A dense tensor in a buffer of bytes."""
    return buffer.view(dtype).as_strided(shape, stride, offset // dtype.itemsize)


def pinned_bytes(size: int) -> torch.Tensor:
    """Pages of the host that the device may read by itself. torch's own allocator would take the next power of two."""
    buffer = torch.frombuffer(mmap.mmap(-1, max(1, size)), dtype=torch.uint8)
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))
    return buffer


def unpin(buffers: list[torch.Tensor]) -> None:
    """Once nothing reads them any more, and before they are freed."""
    if buffers:
        torch.cuda.synchronize()
    for buffer in buffers:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())))
    buffers.clear()
