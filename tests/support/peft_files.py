"""Write small adapters in peft's directory format, good and bad ones, with numpy and safetensors alone.

B is random, not zero as peft starts it, so that an adapter that took effect answers unlike the base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shapes:
    """The dimensions of a Llama-like base model that an adapter must match."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int

    @classmethod
    def of(cls, model_path: Path) -> Shapes:
        """Read them from a checkpoint's config.json."""
        config = json.loads((model_path / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            intermediate=config["intermediate_size"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        )

    def in_out(self, module: str) -> tuple[int, int]:
        """(input, output) size of a projection."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }
        return sizes[module]


TINY = Shapes(hidden=16, layers=1, heads=2, kv_heads=2, intermediate=32, head_dim=8)


@dataclass(frozen=True)
class Adapter:
    """What to write; `config` overrides or adds keys of adapter_config.json."""

    rank: int = 8
    seed: int = 0
    b_scale: float = 0.05
    targets: Sequence[str] = ATTENTION
    config: Mapping[str, Any] = field(default_factory=dict)


def write_adapter(folder: Path, shapes: Shapes = TINY, adapter: Adapter = Adapter(), base: str = "base") -> Path:
    """Write `folder` with adapter_config.json and adapter_model.safetensors; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": 2 * adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(adapter.targets),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
    } | dict(adapter.config)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors(shapes, adapter), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def tensors(shapes: Shapes, adapter: Adapter) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """The adapter's weights by peft's names, reproducible from `adapter.seed`."""
    random = np.random.default_rng(adapter.seed)
    result = {}
    for layer in range(shapes.layers):
        for module in adapter.targets:
            block = "self_attn" if module in ATTENTION else "mlp"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            n_in, n_out = shapes.in_out(module)
            result[f"{name}.lora_A.weight"] = random.normal(0, n_in**-0.5, (adapter.rank, n_in)).astype(np.float32)
            result[f"{name}.lora_B.weight"] = random.normal(0, adapter.b_scale, (n_out, adapter.rank)).astype(
                np.float32
            )
            if adapter.config.get("use_dora"):
                result[f"{name}.lora_magnitude_vector"] = np.ones(n_out, np.float32)
    return result
