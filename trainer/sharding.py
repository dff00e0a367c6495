"""A model whose decoder layers lie in shards, one a process (FSDP2): each layer is put together where it is used.

Embeddings, norms and the vocabulary matrix stay whole in every process. Optimizer and files know nothing of shards:
the optimizer holds the local part of each parameter as a plain tensor, and files hold whole tensors.

Torch's own modules for this take a second to import, so they are imported where something is sharded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer import ranks


def make_mesh(device: torch.device) -> Any:
    """All processes of the run; all must call it."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (ranks.count(),))


def shard(model: Any, mesh: Any, device: torch.device) -> None:
    """Leave of each decoder layer this process's part, on the device; the rest of the model goes there whole."""
    from torch.distributed.fsdp import fully_shard

    inner = model.base_model
    for layer in inner.layers:
        sharded = fully_shard(layer, mesh=mesh)
        # A step's loss is divided once, by its normaliser: gradients are summed, not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    whole = {parameter for parameter in model.parameters() if not is_sharded(parameter)}
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(device)
    fully_shard(inner, mesh=mesh, ignored_params=whole)  # the root: it fetches the next layer while one computes


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part: a DTensor."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, as a plain tensor on the same memory."""
    spread: Any = tensor
    part: Tensor = spread.to_local() if is_sharded(tensor) else tensor
    return part


def own(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter as the optimizer of this process takes it."""
    return nn.Parameter(local(parameter.detach())) if is_sharded(parameter) else parameter


def whole(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """What every process holds a part of, laid out as the parameter is, put together; all must call it."""
    if not is_sharded(parameter) or part.dim() == 0:
        return part
    from torch.distributed.tensor import DTensor

    like: Any = parameter
    spread = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    full: Tensor = spread.full_tensor()
    return full


def part_of(full: Tensor, parameter: nn.Parameter) -> Tensor:
    """Of a whole tensor laid out as the parameter is, what this process holds."""
    if not is_sharded(parameter) or full.dim() == 0:
        return full
    chunks = full.chunk(ranks.count())
    return chunks[ranks.rank()] if ranks.rank() < len(chunks) else full[:0]
