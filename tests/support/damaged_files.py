"""Safetensors files with every kind of damage: name → the bytes, and words of what is wrong."""

from __future__ import annotations

import json
import struct
from typing import Any

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
DATA = bytes(8)


def made(header: Any, data: bytes = DATA, *, length: int | None = None) -> bytes:
    """A file with this header: its bytes, or a value for JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(**changes: Any) -> dict[str, Any]:
    return {"a": {**GOOD["a"], **changes}}


TWO = {"a": GOOD["a"], "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
DAMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a safetensors file"),
    "header of no bytes": (made(b""), "not JSON"),
    "length beyond the file": (made(GOOD, length=10**6), "cut off"),
    "length of 2^63": (made(GOOD, length=2**63), "cut off"),
    "cut in the length": (made(GOOD)[:5], "not a safetensors file"),
    "cut in the header": (made(GOOD)[:20], "cut off"),
    "cut in the data": (made(GOOD)[:-1], "cut off: it ends before its tensor a"),
    "no JSON": (made(b"{'a': 1}"), "not JSON"),
    "half JSON": (made(b'{"a":'), "not JSON"),
    "a list": (made([GOOD]), "no JSON object"),
    "a text": (made("a"), "no JSON object"),
    "a number of 5000 digits": (made(b'{"a": ' + b"9" * 5000 + b"}"), "of 5000 digits"),
    "deep": (made(b'{"a":' * 50_000), "nested too deeply"),
    "deep lists": (made(b"[" * 50_000), "nested too deeply"),
    "not UTF-8": (made(b'{"\xff\xfe": 1}'), "not JSON"),
    "UTF-16": (made(json.dumps(GOOD).encode("utf-16-le")), "not JSON"),
    "a name twice": (made(b'{"a": %s, "a": %s}' % ((json.dumps(GOOD["a"]).encode(),) * 2)), "has a twice"),
    "a key twice": (made(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 8]}}'), "twice"),
    "metadata twice": (made(b'{"__metadata__": {}, "__metadata__": {}}', b""), "twice"),
    "no table of a tensor": (made({"a": 7}), "tensor a has no type"),
    "type missing": (made({"a": {"shape": [2], "data_offsets": [0, 8]}}), "tensor a has no type"),
    "type a number": (made(tensor(dtype=7)), "tensor a has no type"),
    "type unknown": (made(tensor(dtype="F31")), "unknown type F31"),
    "type with controls": (made(tensor(dtype="\x1b[31m")), "unknown type"),
    "shape missing": (made({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "no shape"),
    "shape null": (made(tensor(shape=None)), "no shape"),
    "shape negative": (made(tensor(shape=[-2])), "no shape"),
    "shape a float": (made(tensor(shape=[2.0])), "no shape"),
    "shape true": (made(tensor(shape=[True, 2])), "no shape"),
    "shape a text": (made(tensor(shape="22")), "no shape"),
    "shape NaN": (made(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}'), "no shape"),
    "shape of 2^70": (made(tensor(shape=[2**70])), "no shape"),
    "shape of 1000 sides": (made(tensor(shape=[1] * 1000)), "no shape"),
    "shape whose product overflows": (made(tensor(shape=[2**62, 2**62, 4])), "take"),
    "shape too large": (made(tensor(shape=[3])), "take 12"),
    "shape too small": (made(tensor(shape=[])), "take 4"),
    "half bytes": (made(tensor(dtype="F4", shape=[3])), "does not end with a byte"),
    "offsets missing": (made({"a": {"dtype": "F32", "shape": [2]}}), "no place"),
    "offsets negative": (made(tensor(data_offsets=[-8, 0])), "no place"),
    "offsets swapped": (made(tensor(data_offsets=[8, 0])), "no place"),
    "one offset": (made(tensor(data_offsets=[8])), "no place"),
    "three offsets": (made(tensor(data_offsets=[0, 4, 8])), "no place"),
    "offsets as floats": (made(tensor(data_offsets=[0.0, 8.0])), "no place"),
    "offsets as texts": (made(tensor(data_offsets=["0", "8"])), "no place"),
    "offset beyond the file": (made(tensor(data_offsets=[0, 2**40], shape=[2**38])), "cut off"),
    "a gap at the start": (made(tensor(data_offsets=[4, 12]), bytes(12)), "4 bytes before its tensor a"),
    "overlapping": (made({**TWO, "b": {**TWO["b"], "data_offsets": [4, 12]}}, bytes(12)), "a and b overlap"),
    "the same place": (made({**TWO, "b": TWO["a"]}), "overlap"),
    "bytes after the last": (made(GOOD, bytes(9)), "1 bytes after its last tensor"),
    "metadata a list": (made({"__metadata__": [], **GOOD}), "__metadata__ is no table"),
    "metadata with numbers": (made({"__metadata__": {"x": 1}, **GOOD}), "__metadata__ is no table"),
    "metadata with tables": (made({"__metadata__": {"x": {}}, **GOOD}), "__metadata__ is no table"),
}
