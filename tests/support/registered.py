"""A state directory with any number of registered adapters, written without a gateway."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from sqlalchemy import create_engine, insert

from gateway.control import store
from tests.support.engines import HIDDEN, KV, LAYERS

_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 1,
    "lora_alpha": 2,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "base",
    "bias": "none",
}


def fill(state: Path, count: int, prefix: str = "m") -> list[str]:
    """Register `count` adapters of the emulators' checkpoint (engines.checkpoint) as ready; their names."""
    state.mkdir(parents=True, exist_ok=True)
    url = f"sqlite:///{state / 'registry.db'}"
    made = store.Store(url)
    made.migrate()
    made.close()
    folder = state / "adapters"
    folder.mkdir(mode=0o700, exist_ok=True)
    adapters, versions = [], []
    for number in range(count):
        name = f"{prefix}{number:05d}"
        digest = hashlib.sha256(name.encode()).hexdigest()
        content_id = content_of(name)
        _write(folder / content_id, number)
        adapters.append({"name": name, "current_version": 1, "last_version": 1, "created_at": 1})
        version = {"adapter_name": name, "version": 1, "content_id": content_id, "sha256": digest, "base": "base"}
        version |= {"rank": 1, "target_modules": ["q_proj", "v_proj"], "size_bytes": 2000, "created_at": 1}
        versions.append(version | {"state": "ready", "reason": "", "metadata": {}})
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(insert(store._AdapterRow), adapters)
        connection.execute(insert(store._VersionRow), versions)
    engine.dispose()
    return [str(adapter["name"]) for adapter in adapters]


def content_of(name: str) -> str:
    """The content id that `fill` gives; the adapter lies under that in `adapters` of the state directory."""
    return f"a-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _write(directory: Path, seed: int) -> None:
    directory.mkdir()
    tensors = {}
    for layer in range(LAYERS):
        for name, out in (("q_proj", HIDDEN), ("v_proj", KV)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = np.ones((1, HIDDEN), np.float32)
            tensors[f"{key}.lora_B.weight"] = np.full((out, 1), seed + 1, np.float32)
    (directory / "adapter_model.safetensors").write_bytes(save(tensors))
    (directory / "adapter_config.json").write_text(json.dumps(_CONFIG))
