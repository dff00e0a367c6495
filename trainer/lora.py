"""Low-rank adapters on the linear layers of a frozen model: y = x W^T + b + scale * (x A^T) B^T.

The adapter's weights are float32; they are cast to the activations' type where they are used. The backward pass keeps
nothing beyond the layer's input (which its neighbours share) and never computes a gradient of W.

Shapes: T tokens, I input size, O output size, R rank.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from trainer.errors import ModelError

ALL_LINEAR = "all-linear"
_PLAIN_NAME = re.compile(r"[\w.\-]+")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Which layers get an adapter, and of what size. Patterns map a regular expression over the end of a name."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_stabilised: bool = False
    targets: tuple[str, ...] = (ALL_LINEAR,)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def rank_of(self, name: str) -> int:
        """The rank for one module."""
        return _by_pattern(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What the module's low-rank product is multiplied with."""
        rank, alpha = self.rank_of(name), _by_pattern(self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = dropout
        self.enabled = True
        a_RI = torch.empty(rank, base.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
        device = base.weight.device
        self.lora_a = nn.Parameter(a_RI.to(device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight: some models look at its type."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        if not self.enabled:
            out: torch.Tensor = self.base(x)
            return out
        if self.dropout and self.training:
            down = F.linear(F.dropout(x, self.dropout), self.lora_a.to(x.dtype))
            dropped: torch.Tensor = self.base(x) + F.linear(down, self.lora_b.to(x.dtype)) * self.scale
            return dropped
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO = _LoraProduct.apply(x_TI, self.base.weight, self.base.bias, self.lora_a, self.lora_b, self.scale)
        return y_TO.view(*x.shape[:-1], -1)


class _LoraProduct(torch.autograd.Function):
    """Base and adapter in one node: the low-rank terms are added into the products of W, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        w_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        y_TO = F.linear(x_TI, w_OI, bias_O)
        down_TR = x_TI @ a_RI.to(x_TI.dtype).T
        y_TO.addmm_(down_TR, b_OR.to(x_TI.dtype).T, alpha=scale)
        ctx.save_for_backward(x_TI, w_OI, a_RI, b_OR)
        ctx.scale = scale
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, w_OI, a_RI, b_OR = ctx.saved_tensors
        dy_TO = grads[0]
        a, b = a_RI.to(x_TI.dtype), b_OR.to(x_TI.dtype)
        down_TR = x_TI @ a.T  # cheap enough to compute again
        ddown_TR = (dy_TO @ b).mul_(ctx.scale)
        da_RI = (ddown_TR.T @ x_TI).to(a_RI.dtype)
        db_OR = (dy_TO.T @ down_TR).to(b_OR.dtype).mul_(ctx.scale)
        dx_TI = torch.addmm(dy_TO @ w_OI, ddown_TR, a) if ctx.needs_input_grad[0] else None
        return dx_TI, None, None, da_RI, db_OR, None


class LoraAdapter:
    """The adapter of one model: its layers by full name."""

    def __init__(self, layers: dict[str, LoraLinear], settings: LoraSettings, linear_names: tuple[str, ...]) -> None:
        self.layers = layers
        self.settings = settings
        self._linear_names = linear_names

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name as in a PEFT file without its prefix, parameter), in a fixed order."""
        for name, layer in self.layers.items():
            yield f"{name}.lora_A.weight", layer.lora_a
            yield f"{name}.lora_B.weight", layer.lora_b

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model answers as its base."""
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enabled = True

    def target_names(self) -> list[str]:
        """The shortest list of names that selects exactly these layers: last parts where they suffice."""
        leaves = sorted({name.rsplit(".", 1)[-1] for name in self.layers})
        selected = {name for name in self._linear_names if name.rsplit(".", 1)[-1] in leaves}
        return leaves if selected == set(self.layers) else sorted(self.layers)


def inject(model: nn.Module, settings: LoraSettings, generator: torch.Generator) -> LoraAdapter:
    """Freeze the model and put an adapter on each target, B zero so that nothing changes yet. Raises ModelError."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    candidates = {name: module for name, module in linears.items() if module is not head}
    chosen = _select(candidates, settings.targets)
    layers = {}
    for name in sorted(chosen):
        layer = LoraLinear(
            candidates[name], settings.rank_of(name), settings.scale_of(name), settings.dropout, generator
        )
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
        layers[name] = layer
    return LoraAdapter(layers, settings, tuple(linears))


def _select(linears: dict[str, nn.Linear], targets: tuple[str, ...]) -> set[str]:
    if targets == (ALL_LINEAR,):
        return set(linears)
    if len(targets) == 1 and not _PLAIN_NAME.fullmatch(targets[0]):
        chosen = {name for name in linears if _fullmatch(targets[0], name)}
        missing = [] if chosen else [targets[0]]
    else:
        chosen = {name for name in linears if any(name == t or name.endswith(f".{t}") for t in targets)}
        missing = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linears)]
    if missing:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise ModelError(f"lora_target {', '.join(missing)} matches no linear layer; the model has {', '.join(leaves)}")
    return chosen


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ModelError(f"lora_target {pattern!r} is no regular expression: {error}") from error


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the name, at a dot: as peft reads them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
