"""What needs the weights to verify: packed tensors survive a round trip, and hold nothing an engine would choke on."""

from __future__ import annotations

from pathlib import Path

import torch

from quant.checkpoint import Checkpoint, take_packed
from quant.errors import BadCheckpoint, UnsupportedModel
from quant.pack import pack


def round_trip(directory: Path) -> int:
    """Unpack and pack every linear again and compare bit for bit; returns how many. Raises BadCheckpoint."""
    checkpoint = Checkpoint(directory)
    if checkpoint.scheme is None:
        raise UnsupportedModel(f"{directory} is not quantized")
    scheme = checkpoint.scheme
    modules = checkpoint.quantized_modules
    for module in modules:
        stored = checkpoint.tensors(checkpoint.packed_names(module))
        (linear,) = take_packed(dict(stored), scheme).values()
        if not bool(torch.isfinite(linear.scale_NG).all()) or not bool((linear.scale_NG > 0).all()):
            raise BadCheckpoint(f"{module} has scales that are not positive and finite")
        for suffix, tensor in pack(linear, scheme.format).items():
            name = f"{module}.{suffix}"
            same = name not in stored or torch.equal(tensor.to(stored[name].dtype), stored[name])
            if not same and not (suffix == "qzeros" and scheme.config.get("checkpoint_format") == "gptq_v2"):
                raise BadCheckpoint(f"{name} is not what its own contents pack to: it was written by a faulty packer")
    return len(modules)
