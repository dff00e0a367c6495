"""Quantized checkpoints of headers and zeros: what a static check sees."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quant.config import Format, Grid
from quant.formats import quantization_config, shapes_of

SIZES = {"model.layers.0.self_attn.q_proj": (256, 256), "model.layers.0.mlp.down_proj": (256, 512)}


def write_checkpoint(
    directory: Path,
    form: Format,
    grid: Grid,
    config: dict[str, Any] | None = None,
    sizes: Mapping[str, tuple[int, int]] = SIZES,
    architecture: str = "LlamaForCausalLM",
) -> Path:
    """A checkpoint in the given format. config: changes to its `quantization_config`. sizes: (outputs, inputs)."""
    quantization = quantization_config(form, grid, ["lm_head"]) | (config or {})
    shapes = {
        f"{module}.{suffix}": shape
        for module, (n, k) in sizes.items()
        for suffix, shape in shapes_of(form, n, k, grid).items()
    }
    return _write(directory, {"architectures": [architecture], "quantization_config": quantization}, shapes)


def write_plain(directory: Path, sizes: Mapping[str, tuple[int, int]] = SIZES) -> Path:
    """A checkpoint that is not quantized, and a tokenizer, with an embedding that belongs to no layer."""
    shapes = {f"{module}.weight": shape for module, shape in sizes.items()} | {"model.embed_tokens.weight": (300, 40)}
    (_write(directory, {"architectures": ["LlamaForCausalLM"]}, shapes) / "tokenizer.json").write_text("{}")
    return directory


def _write(directory: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "I32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(offset))
    return directory
