"""Safetensors files by their headers: names, dtypes, shapes and where the bytes lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

_MAX_HEADER_BYTES = 16 << 20  # it is decoded in memory


class BadTensors(ValueError):
    """The file is not a safetensors file; the message says why."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file."""

    dtype: str  # safetensors' own names: F32, BF16, ...
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    size_bytes: int


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without their values. Raises BadTensors, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise BadTensors("it has no safetensors header: it is cut off or another kind of file")
        raw = file.read(length)
    try:
        entries = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        found = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in entries.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadTensors(f"its header is damaged: {error}") from error
    start = 8 + length
    tensors = {}
    for name, entry in found.items():
        begin, end = entry.data_offsets
        if not 0 <= begin <= end <= size - start or min(entry.shape, default=0) < 0:
            raise BadTensors(f"tensor {name} lies outside of the file, which is cut off or damaged")
        tensors[name] = Tensor(entry.dtype, tuple(entry.shape), start + begin, end - begin)
    return tensors


# Exponent bits: all of them set means infinity or NaN, so no conversion to floats is needed.
_EXPONENTS: dict[str, tuple[type[np.uint16] | type[np.uint32], int]] = {
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F32": (np.uint32, 0x7F800000),
}
FLOATS = tuple(_EXPONENTS)


def first_non_finite(path: Path, tensors: dict[str, Tensor]) -> str | None:
    """The name of a tensor that holds an infinity or a NaN; None when all are finite. Only FLOATS may be given."""
    for name, tensor in tensors.items():
        if tensor.size_bytes and not _finite(path, tensor):
            return name
    return None


def _finite(path: Path, tensor: Tensor) -> bool:
    kind, mask = _EXPONENTS[tensor.dtype]
    count = tensor.size_bytes // np.dtype(kind).itemsize
    values: npt.NDArray[np.unsignedinteger] = np.memmap(path, kind, "r", offset=tensor.offset, shape=(count,))
    step = 1 << 22  # elements at a time: the masked copy stays small
    return all(not np.any((values[at : at + step] & mask) == mask) for at in range(0, count, step))
