"""F32, F16 and BF16 as numpy computes with them: read exactly, written with one rounding to the nearest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from gateway.adapters.tensors import Tensor

Floats = npt.NDArray[np.float32]
_STORED: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_BF16_DROPS_BITS = 45  # of a float64's 52 fraction bits
_BLOCK_VALUES = 1 << 22


def item_bytes(dtype: str) -> int:
    """Bytes of one value of a dtype by safetensors' name: F32, F16 or BF16."""
    return int(np.dtype(_STORED[dtype]).itemsize)


def read(path: Path, tensor: Tensor, first_row: int = 0, rows: int | None = None) -> Floats:
    """The values of a matrix, or of `rows` of its rows, as float32, which holds all three dtypes exactly.

    A vector is a matrix of one row.
    """
    columns = tensor.shape[-1]
    count = tensor.size_bytes // item_bytes(tensor.dtype) - first_row * columns if rows is None else rows * columns
    kind = _STORED[tensor.dtype]
    offset = tensor.offset + first_row * columns * item_bytes(tensor.dtype)
    with path.open("rb") as file:
        file.seek(offset)
        stored = np.fromfile(file, kind, count).reshape(-1, columns)
    if tensor.dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def encode(values: npt.NDArray[np.float64], dtype: str) -> bytes:
    """The bytes of float64 values in a dtype, each rounded once, to the nearest and then to even."""
    with np.errstate(over="ignore"):  # the caller looks for infinities
        if dtype != "BF16":
            return values.astype(_STORED[dtype]).tobytes()
        bits = np.ascontiguousarray(values).view(np.uint64)
        odd = bits >> np.uint64(_BF16_DROPS_BITS) & np.uint64(1)
        half = np.uint64((1 << _BF16_DROPS_BITS - 1) - 1)
        kept = (bits + half + odd) >> np.uint64(_BF16_DROPS_BITS) << np.uint64(_BF16_DROPS_BITS)
        # What is left fits float32 exactly, and its upper half is the BF16.
        return (kept.view(np.float64).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


def scaled(values: Floats, scale: float, dtype: str) -> bytes:
    """The bytes of values * scale, a block at a time: float64 takes twice the room."""
    flat = values.reshape(-1)
    blocks = range(0, flat.size, _BLOCK_VALUES)
    return b"".join(encode(flat[at : at + _BLOCK_VALUES].astype(np.float64) * scale, dtype) for at in blocks)


def widened(values: Floats, columns: int) -> Floats:
    """The matrix with so many columns of zeros behind its own."""
    return np.pad(values, ((0, 0), (0, columns)))
