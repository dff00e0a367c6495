"""Write a checkpoint whose weights hold an adapter: W + scale * B A, for engines and modes that serve no LoRA.

Each file of the base is copied as it is, then the adapted weights are changed in place, a block of rows at a time:
names, dtypes and shapes stay, so that headers and the index do too. Memory is bounded by one block and one pair.

DoRA's magnitudes are merged as well: each row of W + scale * B A is brought to its trained length. Whole weights that
the adapter holds (modules_to_save, biases) take the place of the base's.
"""

from __future__ import annotations

import errno
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gateway.adapters import floats
from gateway.adapters.manifest import AdapterConfig, parse_mergeable
from gateway.adapters.package import CONFIG, WEIGHTS
from gateway.adapters.shapes import bare_name, is_quantized, weight_files
from gateway.adapters.tensors import FLOATS, BadTensors, Tensor, read_header
from gateway.disk import sync
from gateway.errors import InvalidRequest

_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)\.(?P<part>lora_[AB]\.weight|lora_magnitude_vector(\.weight)?)")
_WHOLE = "base_model.model."
_BLOCK_VALUES = 1 << 23
# Weights in other formats would still be the base's.
_OTHER_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".safetensors"})


class MergeError(Exception):
    """The adapter cannot be merged; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written."""

    path: Path
    weights: int  # of the base that were changed


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies."""

    file: Path
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class _Change:
    """What becomes of one weight of the base."""

    a: _Place | None = None
    b: _Place | None = None
    magnitude: _Place | None = None
    whole: _Place | None = None
    scale: float = 1.0


def merge(adapter: Path, base: Path, out: Path) -> Merged:
    """Write `out`, a directory that appears whole or not at all. Blocking. Raises MergeError."""
    if out.exists():
        raise MergeError(f"{out} exists; give --out a new directory")
    if is_quantized(base):
        raise MergeError(
            f"{base} is quantized: its integers cannot take an adapter. Merge into the unquantized checkpoint it was "
            "made from, then quantize the result (`gateway quantize`)"
        )
    try:
        config = parse_mergeable(adapter / CONFIG)
        files = weight_files(base)
        weights = {name: _Place(file, tensor) for file in files for name, tensor in read_header(file).items()}
        changes = _changes(adapter / WEIGHTS, config, weights)
    except (InvalidRequest, BadTensors) as error:
        raise MergeError(f"{adapter}: {error}") from error
    except FileNotFoundError as error:
        raise MergeError(f"{error.filename} is not there") from error
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        _write(base, files, weights, changes, partial)
        _publish(partial, out)
    except OSError as error:
        raise MergeError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Merged(out, len(changes))


def _changes(file: Path, config: AdapterConfig, weights: Mapping[str, _Place]) -> dict[str, _Change]:
    """Name of a base weight -> its change. Raises MergeError, BadTensors, OSError."""
    names = {bare_name(name): name for name in weights}
    parts: dict[str, dict[str, _Place]] = {}
    modules: dict[str, str] = {}  # base weight -> module as the adapter calls it
    for name, tensor in read_header(file).items():
        match = _KEY.fullmatch(name)
        if match is None and (not name.startswith(_WHOLE) or ".lora_" in name):
            raise MergeError(f"tensor {name} is not of a LoRA or DoRA on linear layers; merge it with peft")
        target = f"{match['module']}.weight" if match else name.removeprefix(_WHOLE).replace(".base_layer.", ".")
        part = match["part"].removesuffix(".weight") if match else "whole"
        if bare_name(target) not in names:
            raise MergeError(f"tensor {name} is for {target}, which the base does not have: the adapter is for another")
        weight = names[bare_name(target)]
        modules[weight] = target.rpartition(".")[0]
        parts.setdefault(weight, {})[part] = _Place(file, tensor)
    return {name: _change(modules[name], found, config, weights[name].tensor) for name, found in parts.items()}


def _change(module: str, parts: Mapping[str, _Place], config: AdapterConfig, weight: Tensor) -> _Change:
    for place in parts.values():
        if place.tensor.dtype not in FLOATS:
            raise MergeError(f"the adapter of {module} is {place.tensor.dtype}; save it as {', '.join(FLOATS)}")
    if weight.dtype not in FLOATS:
        raise MergeError(f"{module} of the base is {weight.dtype}; merge into a checkpoint of {', '.join(FLOATS)}")
    shapes = {part: place.tensor.shape for part, place in parts.items()}
    if "whole" in parts:
        if shapes != {"whole": weight.shape}:
            raise MergeError(f"{module} has shape {list(weight.shape)} in the base, {shapes} in the adapter")
        return _Change(whole=parts["whole"])
    rank = config.rank_of(module)
    expected: dict[str, tuple[int, ...]] = {"lora_A": (rank, weight.shape[-1]), "lora_B": (weight.shape[0], rank)}
    if "lora_magnitude_vector" in shapes:
        expected["lora_magnitude_vector"] = (weight.shape[0],)
    if len(weight.shape) != 2 or shapes != expected:
        raise MergeError(
            f"{module} of shape {list(weight.shape)} and rank {rank} needs {expected}, the adapter has {shapes}"
        )
    return _Change(
        a=parts["lora_A"],
        b=parts["lora_B"],
        magnitude=parts.get("lora_magnitude_vector"),
        scale=config.scale_of(module),
    )


def _write(
    base: Path, files: list[Path], weights: Mapping[str, _Place], changes: Mapping[str, _Change], into: Path
) -> None:
    for path in sorted(base.iterdir()):
        if path.is_file() and (path in files or path.suffix not in _OTHER_WEIGHTS):
            shutil.copyfile(path, into / path.name)
    for name, change in changes.items():
        place = weights[name]
        with (into / place.file.name).open("r+b") as file:
            for offset, data in _merged(place, change):
                file.seek(offset)
                file.write(data)


def _merged(place: _Place, change: _Change) -> Iterator[tuple[int, bytes]]:
    """(where, bytes) of the weight's rows, a block at a time."""
    rows, columns = place.tensor.shape if len(place.tensor.shape) == 2 else (1, place.tensor.shape[0])
    step = max(1, _BLOCK_VALUES // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        offset = place.tensor.offset + first * columns * floats.item_bytes(place.tensor.dtype)
        yield offset, floats.encode(_rows(place, change, first, count), place.tensor.dtype)


def _rows(place: _Place, change: _Change, first: int, count: int) -> npt.NDArray[np.float64]:
    if change.whole is not None:
        return floats.read(change.whole.file, change.whole.tensor, first, count).astype(np.float64)
    assert change.a is not None and change.b is not None
    a = floats.read(change.a.file, change.a.tensor).astype(np.float64)
    b = floats.read(change.b.file, change.b.tensor, first, count).astype(np.float64) * change.scale
    merged: npt.NDArray[np.float64] = b @ a
    merged += floats.read(place.file, place.tensor, first, count)
    if change.magnitude is not None:
        magnitudes = floats.read(change.magnitude.file, change.magnitude.tensor)[0, first : first + count]
        merged *= (magnitudes / np.linalg.norm(merged, axis=1))[:, None]
    return merged


def _publish(partial: Path, out: Path) -> None:
    for path in [*partial.iterdir(), partial]:
        sync(path)
    try:
        partial.rename(out)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise MergeError(f"{out} came to exist meanwhile; nothing was written to it") from error
        raise
