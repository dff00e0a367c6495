"""Write the smallest checkpoints whose module shapes can be read: config.json and safetensors headers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.support.peft_files import ATTENTION, MLP, Shapes


def modules(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Full module name -> (inputs, outputs) of a Llama-like model."""
    found = {}
    for layer in range(shapes.layers):
        for module in (*ATTENTION, *MLP):
            block = "self_attn" if module in ATTENTION else "mlp"
            found[f"model.layers.{layer}.{block}.{module}"] = shapes.in_out(module)
    return found


def write_checkpoint(
    folder: Path, shapes: Shapes, config: Mapping[str, Any] | None = None, shards: int = 1, layout: str = "plain"
) -> Path:
    """Write `folder` with zero weights. layout: plain, awq, gptq or compressed-tensors (4 bits)."""
    folder.mkdir(parents=True)
    base = {
        "model_type": "llama",
        "hidden_size": shapes.hidden,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.kv_heads,
        "intermediate_size": shapes.intermediate,
        "head_dim": shapes.head_dim,
    }
    (folder / "config.json").write_text(json.dumps(base | dict(config or {})))
    tensors: dict[str, Any] = {"model.norm.weight": np.zeros(shapes.hidden, np.float32)}
    for name, (inputs, outputs) in modules(shapes).items():
        tensors |= _weight(name, inputs, outputs, layout)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def _weight(name: str, inputs: int, outputs: int, layout: str) -> dict[str, Any]:
    words, scales = np.int32, np.zeros((1, outputs), np.float16)
    if layout == "awq":
        return {f"{name}.qweight": np.zeros((inputs, outputs // 8), words), f"{name}.scales": scales}
    if layout == "gptq":
        return {f"{name}.qweight": np.zeros((inputs // 8, outputs), words), f"{name}.scales": scales}
    if layout == "compressed-tensors":
        return {f"{name}.weight_packed": np.zeros((outputs, inputs // 8), words)}
    return {f"{name}.weight": np.zeros((outputs, inputs), np.float32)}
