"""An adapter in peft's directory format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer import sharding
from trainer.errors import CheckpointError
from trainer.lora import LoraAdapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def save_adapter(adapter: LoraAdapter, directory: Path, base_model: str, *, dtype: torch.dtype | None = None) -> None:
    """Write both files into an existing directory; weights as they are, or in `dtype`. Raises OSError."""
    tensors = {
        _PREFIX + name: parameter.detach().to("cpu", dtype).contiguous() for name, parameter in adapter.parameters()
    }
    save_tensors(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(_peft_config(adapter, base_model), indent=2))


def load_adapter(adapter: LoraAdapter, directory: Path) -> None:
    """Copy the saved weights into the adapter. Raises CheckpointError when names or shapes differ."""
    saved = load_tensors(directory / WEIGHTS)
    wanted = {_PREFIX + name: parameter for name, parameter in adapter.parameters()}
    copy_tensors(saved, wanted, directory / WEIGHTS)


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file. Raises OSError, whatever the library calls a full disk."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error


def load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file. Raises CheckpointError."""
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    return tensors


@torch.no_grad()
def copy_tensors(saved: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], file: Path) -> None:
    """Copy each saved tensor into its namesake. Raises CheckpointError unless names and shapes are the same."""
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if shapes != expected:
        odd = sorted(shapes.items() ^ expected.items())[:4]
        raise CheckpointError(f"{file} does not fit this run's model and adapter settings; it differs in {odd}")
    for name, tensor in saved.items():
        sharding.local(wanted[name]).copy_(sharding.part_of(tensor, wanted[name]))


def _peft_config(adapter: LoraAdapter, base_model: str) -> dict[str, Any]:
    settings = adapter.settings
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rank_stabilised,
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
        "target_modules": adapter.target_names(),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
