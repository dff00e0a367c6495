"""How much of a GPU an engine may take, as flags of `gateway serve`: engines that start side by side must not guess.

vLLM and SGLang measure what is free while they start, and count what a neighbour takes meanwhile as their own. So their
KV caches are given in bytes and tokens, and the share is only the bound that they check.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backends.spec import BackendName

_KV_OF_SHARE = 0.4  # the rest is for weights, activations, graphs and CUDA's own
_SGLANG_STATIC = 0.6  # of what is free when it starts; a bound alone, since the tokens are given


def flags(engine: BackendName, share: float, gpu_bytes: int, bytes_a_token: int) -> list[str]:
    """For an engine that has `share` of a GPU of `gpu_bytes`; none for a whole one: users start it so."""
    if share >= 1.0:
        return []
    kv_bytes = int(share * gpu_bytes * _KV_OF_SHARE)
    if engine == "vllm":
        return ["--memory-fraction", f"{share:.2f}", f"--engine-arg=--kv-cache-memory-bytes={kv_bytes}"]
    if engine == "sglang":
        tokens = f"--engine-arg=--max-total-tokens={kv_bytes // bytes_a_token}"
        return ["--memory-fraction", f"{_SGLANG_STATIC:.2f}", tokens]
    return ["--memory-fraction", f"{share * _KV_OF_SHARE:.3f}"]  # LMDeploy: of what is free, for the KV cache


def kv_bytes_a_token(model: Path) -> int:
    """What a token takes in the KV cache of a checkpoint in 16 bits."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width)
