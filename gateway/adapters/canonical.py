"""The one form in which adapters are kept: one rank, one scale of alpha / rank, no patterns.

Engines read rsLoRA, rank_pattern and alpha_pattern differently or not at all, and answer wrongly with a 200. So what
an adapter computes is written in the part of peft's format that all of them read alike:

- one rank and one scale for all modules: only the configuration says so in other words, as alpha = scale * rank. The
  weights stay as they are, to the bit. An adapter that is plain already is not touched at all.
- otherwise: zero rows and columns bring every module to the highest rank, which adds nothing to B A, and each module's
  scale is multiplied into its B (rounded once, to the nearest), so that alpha = rank.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gateway.adapters import floats
from gateway.adapters.manifest import AdapterConfig
from gateway.adapters.shapes import lora_pairs
from gateway.adapters.tensors import Tensor, first_non_finite, read_header
from gateway.errors import InvalidRequest, PayloadTooLarge


@dataclass(frozen=True, slots=True)
class Canonical:
    """What was done to an adapter."""

    rank: int
    changes: tuple[str, ...]  # in words, for the version's metadata; empty when it was canonical already


@dataclass(frozen=True, slots=True)
class _Module:
    """One adapted module as its file has it."""

    a: str  # tensor names
    b: str
    rank: int
    scale: float


def canonicalise(config_file: Path, weights: Path, config: AdapterConfig, limit_bytes: int) -> Canonical:
    """Bring checked files of an adapter into canonical form, in place: a new file is written aside and renamed.

    limit_bytes: the most that padded weights may take. Memory is bounded by the largest tensor. The same files
    always become the same bytes. Raises InvalidRequest, PayloadTooLarge, OSError.
    """
    tensors = read_header(weights)
    modules = [
        _Module(sides["A"], sides["B"], config.rank_of(module), config.scale_of(module))
        for module, sides in sorted(lora_pairs(tensors).items())
    ]
    rank = max(module.rank for module in modules)
    scales = {module.scale for module in modules}
    padded = any(module.rank != rank for module in modules)
    if padded or len(scales) > 1:
        _rewrite(weights, tensors, modules, rank, limit_bytes)
        alpha: float = rank
    else:
        alpha = config.alpha if config.is_plain else scales.pop() * rank
    changes = _changes(config, padded, folded=len(scales) > 1 or padded)
    _write_config(config_file, config, rank, alpha, keep=not changes)
    return Canonical(rank, changes)


def _changes(config: AdapterConfig, padded: bool, folded: bool) -> tuple[str, ...]:
    if config.is_plain:
        return ()
    names = {
        "use_rslora": config.use_rslora,
        "alpha_pattern": config.alpha_pattern,
        "rank_pattern": config.rank_pattern,
    }
    used = ", ".join(name for name, value in names.items() if value)
    how = "scale multiplied into lora_B" if folded else "scale written as lora_alpha"
    return (f"{used}: {how}", *(["ranks padded with zeros"] if padded else []))


def _write_config(file: Path, config: AdapterConfig, rank: int, alpha: float, keep: bool) -> None:
    values: dict[str, Any] = msgspec.json.decode(config.canonical)
    if not keep:
        whole = int(alpha) if float(alpha).is_integer() else alpha
        plain: dict[str, Any] = {
            "r": rank,
            "lora_alpha": whole,
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        values |= {key: value for key, value in plain.items() if key in values or value}
    file.write_bytes(msgspec.json.format(msgspec.json.encode(values, order="sorted"), indent=2))


def _rewrite(weights: Path, tensors: Mapping[str, Tensor], modules: list[_Module], rank: int, limit_bytes: int) -> None:
    """Write the weights with one rank and scale 1, one tensor at a time."""
    shapes = {}
    for module in modules:
        shapes[module.a] = (rank, tensors[module.a].shape[1])
        shapes[module.b] = (tensors[module.b].shape[0], rank)
    sizes = {name: rows * columns * floats.item_bytes(tensors[name].dtype) for name, (rows, columns) in shapes.items()}
    if sum(sizes.values()) > limit_bytes:
        raise PayloadTooLarge(
            f"with every module at the highest rank, {rank}, the adapter takes {sum(sizes.values()) // 1_000_000} MB, "
            f"more than {limit_bytes // 1_000_000} MB (--max-adapter-mb); train with closer ranks",
            param="file",
            code="adapter_too_large",
        )
    aside = weights.with_suffix(".canonical")
    with aside.open("wb") as out:
        out.write(_header(tensors, shapes, sizes))
        for module in modules:
            _write_module(out, weights, tensors, module, rank)
    aside.rename(weights)
    written = read_header(weights)
    broken = first_non_finite(weights, written)
    if broken is not None:
        raise InvalidRequest(
            f"tensor {broken} overflows {written[broken].dtype} once its scale is multiplied in; save it as F32",
            param="file",
            code="bad_weights",
        )


def _header(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        offsets = (at, at + sizes[name])
        entries[name] = {"dtype": tensors[name].dtype, "shape": shape, "data_offsets": offsets}
        at += sizes[name]
    header = msgspec.json.encode(entries)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _write_module(
    out: io.BufferedWriter, weights: Path, tensors: Mapping[str, Tensor], module: _Module, rank: int
) -> None:
    a, b = tensors[module.a], tensors[module.b]
    missing = rank - module.rank
    out.write(floats.scaled(floats.read(weights, a), 1.0, a.dtype))
    out.write(bytes(missing * a.shape[1] * floats.item_bytes(a.dtype)))
    values = floats.read(weights, b)
    out.write(floats.scaled(floats.widened(values, missing), module.scale, b.dtype))
