"""The numbers of a LoRA file, read without torch: whether they are finite, which are zero, and single values.

numpy lacks bfloat16 and the 8-bit floats, so all floats are looked at as bits: a value is infinite or no number if all
bits of its exponent are set, and zero if no bit but the sign is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.storage.safetensors_header import Entry, Header

if TYPE_CHECKING:
    import numpy as np

    Bits = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Float:
    """A type of float in safetensors files."""

    bits: str  # numpy's type of as many bits, little-endian
    exponent: int  # the mask that is all ones in infinities and in what is no number


FLOATS = {
    "F64": Float("<u8", 0x7FF0 << 48),
    "F32": Float("<u4", 0x7F80 << 16),
    "F16": Float("<u2", 0x7C00),
    "BF16": Float("<u2", 0x7F80),
    "F8_E5M2": Float("<u1", 0x7C),
    "F8_E4M3": Float("<u1", 0x7F),  # it has no infinities: one pattern is no number
}
INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U8": "<u1"}
LARGEST_FP32 = float.fromhex("0x1.fffffep+127")


def read_bits(header: Header, entry: Entry) -> Bits:
    """A tensor of floats as bits, in its shape."""
    import numpy as np  # late: only a job that starts from a LoRA file needs it while it is planned

    raw = header.read(entry, 0, entry.end - entry.begin)
    return np.frombuffer(raw, FLOATS[entry.dtype].bits).reshape(entry.shape)


def is_finite(bits: Bits, dtype: str) -> bool:
    """Whether all values are finite in fp32, in which they are used."""
    exponent = bits.dtype.type(FLOATS[dtype].exponent)
    if bool(((bits & exponent) == exponent).any()):
        return False
    if dtype != "F64":
        return True
    return bool((abs(bits.view("<f8")) <= LARGEST_FP32).all())


def nonzero(bits: Bits) -> Bits:
    """Where a value is neither 0 nor -0."""
    sign = 8 * bits.dtype.itemsize - 1
    return (bits & bits.dtype.type((1 << sign) - 1)) != 0


def scalar(header: Header, entry: Entry) -> float:
    """The one number of a tensor. Raises ValueError for a type that no number has."""
    import numpy as np

    raw = header.read(entry, 0, entry.end - entry.begin)
    if entry.dtype in INTEGERS:
        return float(np.frombuffer(raw, INTEGERS[entry.dtype])[0])
    if entry.dtype not in FLOATS:
        raise ValueError(f"is of type {entry.dtype}, which is not a type of numbers")
    if entry.dtype == "BF16":
        return float(np.frombuffer(b"\0\0" + raw[:2], "<f4")[0])
    if entry.dtype == "F8_E5M2":  # the upper half of fp16
        return float(np.frombuffer(b"\0" + raw[:1], "<f2")[0])
    if entry.dtype == "F8_E4M3":
        return _from_e4m3(raw[0])
    return float(np.frombuffer(raw, FLOATS[entry.dtype].bits.replace("u", "f"))[0])


def _from_e4m3(byte: int) -> float:
    """The value of an 8-bit float of 4 bits of exponent (bias 7) and 3 of mantissa."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent = (byte >> 3) & 0xF
    mantissa = byte & 7
    if byte & 0x7F == 0x7F:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)
