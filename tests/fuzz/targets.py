"""The readers of data of unknown origin, each as a function of bytes. It may raise only the errors that it names."""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from entrypoint.dataset_config.manifest import read_manifest
from entrypoint.fetch import archive
from entrypoint.settings.read import read_settings
from tests.fuzz import draw, whole
from trainer.data.decode import UnusableImageError, open_upright
from trainer.lora_files import inspect
from trainer.spec.errors import DataError, SettingsError
from trainer.storage import safetensors_header

CORPUS = Path(__file__).parent / "corpus"
SMALL = archive.Limits(entries=200, total=2**20, ratio=200)


@dataclass(frozen=True)
class Target:
    """`read` takes bytes; `words` are pieces that a mutation may put in.

    `as_kept`: how an input that failed is written to the corpus. `is_run`: a whole run and no single reader, which may
    take CPU_S and tries fewer inputs in the same time.
    """

    read: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...]
    words: tuple[bytes, ...] = ()
    as_kept: Callable[[bytes], bytes] = bytes
    is_run: bool = False


def folder() -> Path:
    """A scratch folder in memory, of this process."""
    return _folder(os.getpid())


@functools.cache
def _folder(_process: int) -> Path:
    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="kiln-fuzz-", dir=shm if shm.is_dir() else None))


def remove_scratch() -> None:
    """Remove this process's scratch folders."""
    shutil.rmtree(folder())
    _folder.cache_clear()
    whole.end()


def settings(data: bytes) -> None:
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    read_settings(dict(line.partition("=")[::2] for line in lines if line.partition("=")[0].strip("\0")))


def datasets(data: bytes) -> None:
    place = folder() / "dataset.json"
    place.write_bytes(data)
    read_manifest(str(place), "[]")


def prompts(data: bytes) -> None:
    place = folder() / "prompts.txt"
    place.write_bytes(data)
    read_manifest('{"datasets": [{"subsets": [{}]}]}', str(place))


def unpack(data: bytes) -> None:
    place, target = folder() / "a.zip", folder() / "inside"
    place.write_bytes(data)
    target.mkdir()
    try:
        archive.extract(place, target, limits=SMALL)
        for path in target.rglob("*"):
            assert path.resolve().is_relative_to(target.resolve()) and not path.is_symlink()
    finally:
        shutil.rmtree(target)


def image(data: bytes) -> None:
    open_upright(data)


def lora(data: bytes) -> None:
    place = folder() / "x.safetensors"
    place.write_bytes(data)
    inspect.summarize(safetensors_header.read_header(place), "flux")


def weights(data: bytes) -> None:
    from trainer.lora_files import convert

    place = folder() / "y.safetensors"
    place.write_bytes(data)
    convert.load(place, "flux")


def state(data: bytes) -> None:
    """The first four bytes give the length of state.json. Its checksum is made right, or all inputs would end there."""
    from trainer.checkpoints import state_files
    from trainer.storage import digests

    place = folder() / "step-00000001"
    place.mkdir(exist_ok=True)
    length = int.from_bytes(data[:4], "little")
    text, tensors = data[4 : 4 + length].decode("utf-8", "replace"), data[4 + length :]
    (place / "state.safetensors").write_bytes(tensors)
    text = text.replace("HASH", digests.sha256(place / "state.safetensors"))
    outer = {"sha256": digests.digest(text), "text": text} if data[3:4] != b"\1" else text
    (place / "state.json").write_text(json.dumps(outer))
    state_files.read(place)


TARGETS = {
    "settings": Target(
        settings,
        (SettingsError,),
        (b"PARAMS_SEED=", b"CONFIG_JSON={", b"nan", b"1e999", b"\xd9\xa1", b"\n", b"[" * 2000),
    ),
    "datasets": Target(
        datasets, (SettingsError,), (b'"subsets"', b"[" * 3000, b'"resolution":', b"NaN", b"1e999", b"{}")
    ),
    "prompts": Target(
        prompts, (SettingsError,), (b" --w ", b" --d ", b" --n ", b"nan", b"9" * 5000, b"\xef\xbb\xbf", b"\r")
    ),
    "archives": Target(unpack, (DataError,), (b"PK\3\4", b"PK\1\2", b"PK\5\6", b"../", b"ustar", b"\xff\xff\xff\xff")),
    "images": Target(
        image, (UnusableImageError,), (b"IHDR", b"IDAT", b"iCCP", b"\xff\xd8\xff\xe1", b"\xff\xff\xff\x7f")
    ),
    "lora": Target(
        lora, (ValueError,), (b'"__metadata__"', b'"data_offsets":[-1,', b'"shape":', b"[" * 3000, b"1e999")
    ),
    "weights": Target(weights, (ValueError,), (b'"__metadata__"', b'"data_offsets":[0,', b"BF16", b"F32", b"alpha")),
    "state": Target(state, (ValueError,), (b'"tree"', b'"dict"', b'{"tensor": "0"}', b'"step"', b"[" * 3000, b"HASH")),
    "check": Target(whole.check, (), as_kept=whole.as_json(whole.drawn_check), is_run=True),
    "scan": Target(whole.scan_folder, (), as_kept=whole.as_json(whole.drawn_scan), is_run=True),
    "hub": Target(whole.hub, (), as_kept=whole.as_json(draw.hub_case), is_run=True),
    "model": Target(whole.model, (), as_kept=whole.as_model_case, is_run=True),
    "start": Target(whole.start, (), as_kept=whole.as_json(whole.drawn_output), is_run=True),
}


def seeds() -> dict[str, list[bytes]]:
    """The corpus: small valid inputs, and every input that once failed."""
    return {name: [p.read_bytes() for p in sorted((CORPUS / name).iterdir())] for name in TARGETS}


def make_corpus() -> None:
    """Write the valid inputs of the corpus."""
    import io
    import tarfile
    import zipfile

    import numpy as np
    from PIL import Image
    from safetensors.numpy import save

    made: dict[str, dict[str, bytes]] = {name: {} for name in TARGETS}
    made["settings"] = {
        "plain": b"BASE_MODEL=mini-flux\nPARAMS_SEED=7\nPARAMS_LEARNING_RATE=1e-4\n"
        b"PARAMS_OPTIMIZER_ARGS=betas=(0.9,0.99)\n",
        "json": b'BASE_MODEL=sdxl\nCONFIG_JSON={"PARAMS_SEED": 1, "TRIGGER_WORD": "zot"}\nPARAMS_RESOLUTION=512x768',
        "names": b"BASE_MODEL=flux\nPARAMS_TARGET_MODULES=attn.to_q, attn.to_k\nOUTPUT_NAME=a b\nHF_TOKEN=hf_x",
    }
    made["datasets"] = {
        "json": b'{"general": {"resolution": 512}, "datasets": [{"batch_size": 2, "subsets": [{"num_repeats": 3}]}]}',
        "toml": b'[[datasets]]\nresolution = [512, 768]\n[[datasets.subsets]]\nimage_dir = "/tmp"\n',
    }
    made["prompts"] = {
        "lines": b"# a comment\na cat --w 128 --h 64 --s 2 --d 7 --g 3.5 --l 1 --n a dog\n\nplain\n",
        "json": b'[{"prompt": "a cat", "width": 64, "seed": 1}]',
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as container:
        container.writestr("a/b.txt", b"text" * 10)
        container.writestr("c.png", b"\x89PNG")
    made["archives"]["zip"] = buffer.getvalue()
    for kind in ("", "gz", "bz2", "xz"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as tar:
            info = tarfile.TarInfo("a/b.txt")
            info.size = 40
            tar.addfile(info, io.BytesIO(b"text" * 10))
        made["archives"][f"tar.{kind}" if kind else "tar"] = buffer.getvalue()
    image = Image.fromarray(np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3))
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[274] = 6
        if kind in ("PNG", "JPEG"):
            image.save(buffer, kind, exif=exif)
        else:
            image.save(buffer, kind)
        made["images"][kind.lower()] = buffer.getvalue()
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {
        f"{stem}.lora_down.weight": np.ones((2, 8), np.float32),
        f"{stem}.lora_up.weight": np.ones((24, 2), np.float32),
        f"{stem}.alpha": np.array(2, np.float32),
    }
    for name in ("lora", "weights"):
        made[name]["kohya"] = save(tensors, {"ss_network_dim": "2"})
        made[name]["peft"] = save(
            {
                "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": np.ones((2, 8), np.float32),
                "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": np.ones((8, 2), np.float32),
            },
            {"lora_adapter_metadata": '{"transformer.lora_alpha": 4, "transformer.r": 2}'},
        )
    tree = {"dict": [["a", {"tensor": "0"}], ["b", [1, None, {"tuple": [2.5, "x"]}]]]}
    record = json.dumps({"step": 1, "sha256": "HASH", "tree": tree}).encode()
    made["state"]["state"] = struct.pack("<I", len(record)) + record + save({"0": np.ones(3, np.float32)})
    for name, inputs in made.items():
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        for label, data in inputs.items():
            (CORPUS / name / label).write_bytes(data)


if __name__ == "__main__":
    make_corpus()
