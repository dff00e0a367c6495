"""Reach the emulated engines behind a gateway, and make adapters for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from safetensors.numpy import save_file

from tests.support.gateway import Gateway

HIDDEN, KV, LAYERS = 64, 32, 2


def state_of(gateway: Gateway, replica: str) -> dict[str, Any]:
    """The replica's state file: process ids, port, key."""
    return dict(json.loads((gateway.state / "run" / f"replica-{replica}.json").read_text()))


def script(gateway: Gateway, replica: str, **fields: object) -> None:
    """Make an emulated replica behave so from now on."""
    state = state_of(gateway, replica)
    answer = httpx2.post(f"http://127.0.0.1:{state['port']}/emulator/script", json=fields, trust_env=False)
    assert answer.status_code == 200, answer.text


def checkpoint(directory: Path) -> Path:
    """A base model that only an emulator can serve: the configuration and real shapes, with zero weights."""
    directory.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 8192,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    weights = {
        f"model.layers.{layer}.self_attn.{name}.weight": np.zeros((out, HIDDEN), np.float32)
        for layer in range(LAYERS)
        for name, out in (("q_proj", HIDDEN), ("v_proj", KV))
    }
    save_file(weights, directory / "model.safetensors")
    return directory


def adapter(directory: Path, seed: int = 0, rank: int = 4) -> Path:
    """A PEFT adapter that fits `checkpoint`; another seed is another content."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, out in (("q_proj", HIDDEN), ("v_proj", KV)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = rng.standard_normal((rank, HIDDEN), np.float32)
            tensors[f"{key}.lora_B.weight"] = rng.standard_normal((out, rank), np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "base",
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def upload(gateway: Gateway, name: str, directory: Path, promote: bool = True) -> dict[str, Any]:
    """Upload a PEFT directory; the adapter object, which must be ready. promote: the name points to it then."""
    files = [("file", (file.name, file.read_bytes())) for file in sorted(directory.iterdir())]
    with gateway.client() as client:
        answer = client.post("/v1/adapters", data={"name": name, "promote": str(promote).lower()}, files=files)
    assert answer.status_code in (200, 201), answer.text
    assert answer.json()["state"] == "ready", answer.text
    return dict(answer.json())


def chat(gateway: Gateway, model: str | None = None, text: str = "hello", **fields: object) -> httpx2.Response:
    """One chat request."""
    body = {"model": model or gateway.model, "messages": [{"role": "user", "content": text}], **fields}
    with gateway.client() as client:
        return client.post("/v1/chat/completions", json=body)
