"""Names, shapes and file positions of a safetensors checkpoint, read from the headers alone (no torch, no weights)."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.errors import BadCheckpoint

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100 * 1024 * 1024  # the format's own limit
_DTYPE_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: where it is and what it looks like."""

    file: Path
    dtype: str  # as safetensors spells it: BF16, I32, ...
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BITS.get(self.dtype, 8) // 8


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BadCheckpoint when it is missing or not one."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{path} does not exist: {path.parent} is not a complete checkpoint") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{path} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def read_entries(directory: Path) -> dict[str, TensorEntry]:
    """Tensor name -> entry, over all shards. Raises BadCheckpoint for a missing, truncated or contradictory one."""
    entries: dict[str, TensorEntry] = {}
    index_path = directory / INDEX_NAME
    index: dict[str, str] = read_json(index_path).get("weight_map", {}) if index_path.is_file() else {}
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise BadCheckpoint(f"the weight_map of {index_path} does not say which file each tensor is in")
    files = sorted({directory / name for name in index.values()}) or sorted(directory.glob("*.safetensors"))
    if not files:
        raise BadCheckpoint(f"{directory} holds no *.safetensors file; other weight formats must be converted first")
    for file in files:
        entries |= read_file_entries(file)
    lost = sorted(name for name in index if name not in entries)
    if lost:
        raise BadCheckpoint(f"{index_path} names {len(lost)} tensors that no shard holds, first {lost[0]}")
    return entries


def read_file_entries(file: Path) -> dict[str, TensorEntry]:
    """The entries of one safetensors file, after checking that the file is as long as its header says."""
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise BadCheckpoint(f"{file} is not a safetensors file: its header would be {length} bytes")
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise BadCheckpoint(f"shard {file} is missing: fetch the checkpoint again") from error
    except ValueError as error:
        raise BadCheckpoint(f"{file} has a broken header ({error}): fetch the checkpoint again") from error
    try:
        header.pop("__metadata__", None)
        ends = [int(value["data_offsets"][1]) for value in header.values()]
        entries = {
            name: TensorEntry(file, str(value["dtype"]), tuple(map(int, value["shape"])))
            for name, value in header.items()
        }
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{file} has a header that describes no tensors: fetch the checkpoint again") from error
    expected, actual = 8 + length + max(ends, default=0), file.stat().st_size
    if actual != expected:
        raise BadCheckpoint(f"{file} is {actual} bytes, its header says {expected}: truncated, fetch it again")
    return entries
