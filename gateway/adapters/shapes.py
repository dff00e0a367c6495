"""Does an adapter fit the base? The shapes are the judge: engines take a wrong base silently, or die of it.

A LoRA on a module with weight [out, in] is lora_A [rank, in] and lora_B [out, rank].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open

from gateway.adapters.manifest import AdapterConfig
from gateway.adapters.patterns import MODULE_CHARS
from gateway.adapters.tensors import FLOATS, BadTensors, Tensor, first_non_finite, read_header
from gateway.errors import InvalidRequest

_LORA_KEY = re.compile(rf"base_model\.model\.(?P<module>.{{1,{MODULE_CHARS}}})\.lora_(?P<side>[AB])\.weight")
# Wrappers that checkpoints and peft put before the same module, in either order.
_PREFIXES = frozenset({"model", "language_model"})


class UnknownBase(Exception):
    """The base checkpoint's shapes cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """The linear modules of a checkpoint: name without wrappers -> (inputs, outputs)."""

    name: str  # of the base, for messages
    modules: Mapping[str, tuple[int, int]]


def read_base(checkpoint: Path, name: str) -> BaseShapes:
    """Read a checkpoint's module shapes from its headers, quantized or not. Raises UnknownBase."""
    try:
        config = msgspec.json.decode((checkpoint / "config.json").read_bytes(), type=dict[str, Any])
        tensors: dict[str, Tensor] = {}
        for file in weight_files(checkpoint):
            tensors |= read_header(file)
        modules = _modules(tensors, _bits(config))
    except (OSError, msgspec.DecodeError, KeyError, BadTensors) as error:
        raise UnknownBase(f"the shapes of {checkpoint} cannot be read: {error}") from error
    if not modules:
        raise UnknownBase(f"{checkpoint} holds no safetensors weights, so an adapter's fit cannot be checked")
    return BaseShapes(name, modules)


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files of a checkpoint, as its index names them. Raises OSError, KeyError, DecodeError."""
    index = checkpoint / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(checkpoint.glob("*.safetensors"))
    listed = msgspec.json.decode(index.read_bytes(), type=dict[str, Any])["weight_map"]
    return sorted({checkpoint / file for file in listed.values()})


def is_quantized(checkpoint: Path) -> bool:
    """Whether a checkpoint says that its weights are quantized; an unreadable one does not."""
    try:
        config = msgspec.json.decode((checkpoint / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return False
    return bool(config.get("quantization_config"))


def _bits(config: dict[str, Any]) -> int:
    """Bits of a packed weight; 4 where the checkpoint does not say."""
    quantization = config.get("quantization_config") or {}
    groups = quantization.get("config_groups") or {}
    first: dict[str, Any] = next(iter(groups.values()))["weights"] if groups else {}
    return int(quantization.get("bits") or quantization.get("w_bit") or first.get("num_bits") or 4)


def _modules(tensors: Mapping[str, Tensor], bits: int) -> dict[str, tuple[int, int]]:
    per_word = 32 // bits
    modules = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if len(tensor.shape) != 2:
            continue
        rows, columns = tensor.shape
        if kind == "weight":  # [out, in]
            modules[bare_name(module)] = (columns, rows)
        elif kind == "weight_packed":  # compressed-tensors: [out, in / per_word]
            modules[bare_name(module)] = (columns * per_word, rows)
        elif kind == "qweight":
            scales = tensors.get(f"{module}.scales")
            outputs = scales.shape[1] if scales else columns
            # AWQ packs along the outputs ([in, out / per_word]), GPTQ along the inputs ([in / per_word, out]).
            modules[bare_name(module)] = (rows, outputs) if columns != outputs else (rows * per_word, outputs)
    return modules


def bare_name(module: str) -> str:
    """A module's or tensor's name without the wrappers before it."""
    parts = module.split(".")
    while parts and parts[0] in _PREFIXES:
        parts.pop(0)
    return ".".join(parts)


def check_fit(weights: Path, config: AdapterConfig, base: BaseShapes) -> tuple[str, ...]:
    """The short names of the modules that the adapter changes. Raises InvalidRequest, naming the tensor at fault."""
    tensors = _open(weights)
    pairs = lora_pairs(tensors)
    for module, sides in sorted(pairs.items()):
        _check_pair(module, sides, tensors, config, base)
    broken = first_non_finite(weights, tensors)
    if broken is not None:
        raise _bad(f"tensor {broken} holds infinities or NaN: the training diverged", "bad_weights")
    return tuple(sorted({module.rpartition(".")[2] for module in pairs}))


def lora_pairs(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """The base model's module -> its tensors' names by side, "A" and "B". Raises InvalidRequest for other tensors."""
    pairs: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        match = _LORA_KEY.fullmatch(name)
        if match is None:
            raise _bad(
                f"tensor {name} is not part of a plain LoRA on linear layers, and engines would skip it; "
                "train and save without it",
                "unsupported_adapter",
            )
        if tensor.dtype not in FLOATS:
            raise _bad(f"tensor {name} is {tensor.dtype}; save the adapter as {', '.join(FLOATS)}", "bad_weights")
        pairs.setdefault(match["module"], {})[match["side"]] = name
    return pairs


def _open(weights: Path) -> dict[str, Tensor]:
    try:
        with safe_open(weights, framework="numpy"):
            pass  # the reader that the engines use: what it refuses they would refuse
        tensors = read_header(weights)
    except (SafetensorError, BadTensors) as error:
        raise _bad(f"adapter_model.safetensors cannot be read: {error}", "bad_weights") from error
    if not tensors:
        raise _bad("adapter_model.safetensors holds no tensor", "bad_weights")
    return tensors


def _check_pair(
    module: str, sides: dict[str, str], tensors: Mapping[str, Tensor], config: AdapterConfig, base: BaseShapes
) -> None:
    for missing in {"A", "B"} - sides.keys():
        other = next(iter(sides.values()))
        raise _bad(f"{other} has no lora_{missing} beside it: the file is incomplete", "bad_weights")
    size = base.modules.get(bare_name(module))
    if size is None:
        raise _wrong_base(f"tensor {sides['A']} is for {module}, which {base.name} does not have", config, base)
    inputs, outputs = size
    rank = config.rank_of(module)
    for side, expected in (("A", (rank, inputs)), ("B", (outputs, rank))):
        found = tensors[sides[side]].shape
        if found == expected:
            continue
        text = f"tensor {sides[side]} has shape {list(found)}, {base.name} needs {list(expected)}"
        rank_axis = 0 if side == "A" else 1
        if len(found) == 2 and found[1 - rank_axis] == expected[1 - rank_axis]:
            raise _bad(f"{text}: adapter_config.json says rank {rank}", "rank_mismatch")
        raise _wrong_base(text, config, base)


def _wrong_base(text: str, config: AdapterConfig, base: BaseShapes) -> InvalidRequest:
    trained = f", {config.base_name!r} by its adapter_config.json" if config.base_name else ""
    return _bad(f"{text}: the adapter was trained for another base{trained}; serve that one", "wrong_base")


def _bad(message: str, code: str) -> InvalidRequest:
    return InvalidRequest(message, param="file", code=code)
