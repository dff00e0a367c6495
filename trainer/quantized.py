"""Load a checkpoint whose linear layers lie in four bits (AWQ, GPTQ, compressed-tensors), layers kept as they are.

The model is built without storage, each layer that the file holds packed is put in its place, and the rest is read as
usual; one layer at a time is in memory twice.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from trainer import attention
from trainer.errors import ModelError
from trainer.packed import Pieces, check_settings, is_packed, read_layer


def load_quantized(
    path: Path, settings: Any, quantization: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> Any:
    """The model on the device, its packed layers as `PackedLinear`. Raises ModelError."""
    check_settings(quantization, path)
    del settings.quantization_config  # else transformers looks for a quantizer of its own
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=attention.NAME)
    for name, pieces in _modules(path, device):
        module = _submodule(model, name, path)
        if is_packed(pieces):
            layer = read_layer(pieces, quantization, dtype)
            if not isinstance(module, nn.Linear) or module.weight.shape != (layer.out_features, layer.in_features):
                raise ModelError(f"{path}: the packed layer {name} does not fit the model")
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer)
        else:
            for leaf, tensor in pieces.items():
                setattr(module, leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))
    if settings.get_text_config().tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    _fill_buffers(model, settings, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ModelError(f"{path} lacks the weights of {', '.join(left[:4])}")
    return model


def _modules(path: Path, device: torch.device) -> Iterator[tuple[str, Pieces]]:
    """Each module of the checkpoint that has tensors, with them, by the last part of their names."""
    index = path / "model.safetensors.index.json"
    with ExitStack() as stack:
        if index.is_file():
            places = json.loads(index.read_text())["weight_map"]
            opened = {file: stack.enter_context(safe_open(path / file, "pt")) for file in sorted(set(places.values()))}
            files = {name: opened[file] for name, file in places.items()}
        else:
            only = stack.enter_context(safe_open(path / "model.safetensors", "pt"))
            files = dict.fromkeys(only.keys(), only)
        leaves = defaultdict(list)
        for name in sorted(files):
            module, _, leaf = name.rpartition(".")
            leaves[module].append(leaf)
        for module, found in leaves.items():
            yield module, {leaf: files[f"{module}.{leaf}"].get_tensor(f"{module}.{leaf}").to(device) for leaf in found}


def _submodule(model: nn.Module, name: str, path: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ModelError(f"{path} holds weights of {name}, which its model does not have") from None


def _fill_buffers(model: nn.Module, settings: Any, device: torch.device) -> None:
    """What is computed and in no file: the frequencies of rotary embeddings."""
    for module in list(model.modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            try:
                fresh = type(module)(config=settings.get_text_config())
            except TypeError as error:
                raise ModelError(
                    f"{type(module).__name__} computes values that only its own loading knows; "
                    "train on the unquantized checkpoint"
                ) from error
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
