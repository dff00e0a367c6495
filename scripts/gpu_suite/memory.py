"""How much of a GPU an engine may take, as flags of `gateway serve`: engines that start side by side must not guess.

vLLM and SGLang measure what is free while they start, and count what a neighbour takes meanwhile as their own. So their
KV caches are given in bytes and tokens, and the share is only the bound that they check.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backends.spec import BackendName
from scripts.gpu_suite.machine import Gpu

_KV_OF_SHARE = 0.45  # the rest is for weights, activations, graphs and CUDA's own
_LMDEPLOY_MOST = 0.8  # its own default
_SGLANG_STATIC = 0.9  # of what is free when it starts; the tokens are given, and neighbours take theirs meanwhile


def flags(engine: BackendName, share: float, gpu: Gpu, model: Path) -> list[str]:
    """For an engine that has `share` of a GPU; none for a whole one: users start it so."""
    if share >= 1.0:
        return []
    kv_bytes = int(share * gpu.memory_bytes * _KV_OF_SHARE)
    if engine == "vllm":
        return ["--memory-fraction", f"{share:.2f}", f"--engine-arg=--kv-cache-memory-bytes={kv_bytes}"]
    if engine == "sglang":
        tokens = f"--engine-arg=--max-total-tokens={kv_bytes // kv_bytes_a_token(model)}"
        return ["--memory-fraction", f"{_SGLANG_STATIC:.2f}", tokens]
    # LMDeploy takes no number of bytes, only a part of what is free once the weights are there.
    left_bytes = max(kv_bytes, gpu.free_bytes - _weights_bytes(model))
    return ["--memory-fraction", f"{min(_LMDEPLOY_MOST, kv_bytes / left_bytes):.3f}"]


def kv_bytes_a_token(model: Path) -> int:
    """What a token takes in the KV cache of a checkpoint in 16 bits."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width)


def _weights_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))
