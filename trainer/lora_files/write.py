"""Write a LoRA file, read it back, compare, and only then rename it to its name."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from trainer.spec.errors import NumbersError, StorageError
from trainer.storage import atomic, safetensors_writer


def write_lora(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write, read back, compare, and only then rename to `path`.

    Raises NumbersError for a value that is not finite, StorageError if the file is not what was written.
    """
    bad = [k for k, v in tensors.items() if not safetensors_writer.is_finite(v)]
    if bad:
        raise NumbersError(f"{len(bad)} of {len(tensors)} tensors of the LoRA are not finite, {bad[0]} first.")
    with atomic.replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.writelines(_serialised(tensors, metadata))
        back = load_file(temporary)
        if back.keys() != tensors.keys() or any(not torch.equal(back[k], v) for k, v in tensors.items()):
            raise StorageError(f"{path} does not read back as it was written.")


def _serialised(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> list[bytes | memoryview]:
    """The pieces of a safetensors file, the same bytes for the same content: the library shuffles the metadata.

    Adds the hash of the tensors' bytes without the header, as sd-scripts' `sshs_model_hash`.
    """
    entries, data = safetensors_writer.layout(tensors)
    digest = safetensors_writer.sha256(data)
    complete = {**metadata, "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    return [safetensors_writer.encode_header({"__metadata__": dict(sorted(complete.items())), **entries}), *data]
