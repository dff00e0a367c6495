"""Reading weights by name from a safetensors checkpoint, plain or quantized, a few tensors at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant.errors import BadCheckpoint
from quant.formats import PACKED_SUFFIX, Scheme, read_scheme, shapes_of
from quant.headers import TensorEntry, read_entries, read_json
from quant.pack import QuantizedLinear, unpack


class Checkpoint:
    """A checkpoint directory: its configuration, its tensors by name, its quantized linears by module name."""

    def __init__(self, directory: Path) -> None:
        """Reads headers only. Raises BadCheckpoint."""
        self.directory = directory
        self.config: dict[str, Any] = read_json(directory / "config.json")
        self.entries: dict[str, TensorEntry] = read_entries(directory)
        quantization = self.config.get("quantization_config")
        self.scheme: Scheme | None = read_scheme(quantization) if quantization else None

    def __repr__(self) -> str:
        form = self.scheme.format if self.scheme else "unquantized"
        return f"<Checkpoint {self.directory.name}: {len(self.entries)} tensors, {form}>"

    @property
    def dtype(self) -> torch.dtype:
        """The type the model is meant to compute in: bfloat16 or float16, and bfloat16 for float32 checkpoints."""
        config = self.config.get("text_config", self.config)
        name = config.get("dtype") or config.get("torch_dtype")
        return torch.float16 if name == "float16" else torch.bfloat16

    @property
    def quantized_modules(self) -> list[str]:
        """Names of the linears stored packed."""
        if self.scheme is None:
            return []
        suffix = "." + PACKED_SUFFIX[self.scheme.format]
        return [name.removesuffix(suffix) for name in self.entries if name.endswith(suffix)]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors as stored, opening each shard once. Raises BadCheckpoint."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.entries:
                raise BadCheckpoint(f"{self.directory} holds no tensor {name}")
            by_file.setdefault(self.entries[name].file, []).append(name)
        found: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as shard:
                    found |= {name: shard.get_tensor(name) for name in wanted}
            except (SafetensorError, OSError) as error:
                raise BadCheckpoint(f"{file} cannot be read ({error}): fetch the checkpoint again") from error
        return found

    def packed_names(self, module: str) -> list[str]:
        """The names of the tensors that hold one packed linear."""
        assert self.scheme is not None
        return [f"{module}.{suffix}" for suffix in packed_suffixes(self.scheme) if f"{module}.{suffix}" in self.entries]

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """Every weight below `prefix`, names relative to it, packed linears dequantized to the model's type."""
        stored = self.tensors(name for name in self.entries if name.startswith(prefix))
        weights = dequantized(stored, self.scheme, self.dtype) if self.scheme else stored
        return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def dequantized(stored: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """Stored tensors with every packed linear replaced by the weight it stands for. Raises BadCheckpoint, NotExact."""
    weights = dict(stored)
    for module, packed in take_packed(weights, scheme).items():
        weights[f"{module}.weight"] = packed.dequantize(dtype)
    return weights


def take_packed(stored: dict[str, Tensor], scheme: Scheme) -> dict[str, QuantizedLinear]:
    """Module name -> packed linear, their tensors removed from `stored`. Raises BadCheckpoint, NotExact."""
    marker = "." + PACKED_SUFFIX[scheme.format]
    v2 = scheme.config.get("checkpoint_format") == "gptq_v2"
    found = {}
    for module in [name.removesuffix(marker) for name in stored if name.endswith(marker)]:
        own = {suffix: stored.pop(f"{module}.{suffix}", None) for suffix in packed_suffixes(scheme)}
        missing = [
            suffix for suffix, tensor in own.items() if tensor is None and suffix not in ("g_idx", "weight_shape")
        ]
        if missing:
            raise BadCheckpoint(f"{module} has no {', '.join(missing)} beside its {marker[1:]}")
        present = {suffix: tensor for suffix, tensor in own.items() if tensor is not None}
        found[module] = unpack(present, scheme.format, scheme.grid, gptq_v2=v2)
    return found


def packed_suffixes(scheme: Scheme) -> list[str]:
    """Suffixes of the tensors that hold one linear."""
    return list(shapes_of(scheme.format, 8, scheme.grid.group_size, scheme.grid))
