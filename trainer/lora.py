"""Low-rank adapters on the linear layers of a frozen model: y = x W^T + b + scale * (x A^T) B^T.

The adapter's weights are float32; they are cast to the activations' type where they are used (`products.py`).

Several adapters may share a model; each token of a row passes through one of them, or none.

Shapes: T tokens, t those of one adapter, I input size, O output size, R rank.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from trainer.errors import ModelError
from trainer.packed import PackedLinear
from trainer.products import Frozen, Part, products

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


class Span(NamedTuple):
    """Tokens [first, end) of a row that pass through one adapter."""

    adapter: int
    first: int
    end: int


class Mix:
    """Which adapter each token of the next row passes through: one object for all layers of a model.

    One adapter takes every token, or `spans` share the row; without either the model is its base.
    """

    def __init__(self) -> None:
        self.adapters = 0
        self._using: int | tuple[Span, ...] = ()

    def of(self, tokens: int) -> tuple[Span, ...]:
        """The spans of a row of `tokens`."""
        return (Span(self._using, 0, tokens),) if isinstance(self._using, int) else self._using

    def use(self, adapter: int) -> None:
        """From now on, this adapter for every token."""
        self._using = adapter

    @contextlib.contextmanager
    def spans(self, *spans: Span) -> Iterator[None]:
        """Inside, rows are shared by these adapters; none: the base."""
        before, self._using = self._using, spans
        try:
            yield
        finally:
            self._using = before


class LoraSlot(nn.Module):
    """One adapter's weights at one layer."""

    def __init__(
        self, base: nn.Linear | PackedLinear, rank: int, scale: float, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        a_RI = torch.empty(rank, base.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
        device = next(itertools.chain(base.parameters(), base.buffers())).device
        self.lora_a = nn.Parameter(a_RI.to(device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapters: slots by adapter number.

    The first of several layers that take the same input computes for all of them (`products.py`); the others, called
    next with that very tensor, hand their result over.
    """

    def __init__(self, base: nn.Linear | PackedLinear, mix: Mix) -> None:
        super().__init__()
        self.base = base
        self.mix = mix
        self.slots: dict[int, LoraSlot] = {}
        self.together: tuple[LoraLinear, ...] = (self,)  # with the layers that this one computes for
        self._ready: tuple[torch.Tensor, torch.Tensor] | None = None  # an input, and what came of it

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight: some models look at its type."""
        return self.base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] is x:
            return ready[1]
        x_TI = x.reshape(-1, x.shape[-1])
        spans = self.mix.of(x_TI.shape[0])
        if not any(span.adapter in self.slots for span in spans):
            out: torch.Tensor = self.base(x)
            return out
        if self.training and any(slot.dropout for slot in self.slots.values()):
            return self._with_dropout(x_TI, spans).view(*x.shape[:-1], -1)
        layers = self.together
        outputs = products(x_TI, [layer.frozen() for layer in layers], _parts(layers, spans))
        for layer, y_TO in zip(layers[1:], outputs[1:], strict=True):
            layer._ready = (x, y_TO.view(*x.shape[:-1], -1))
        return outputs[0].view(*x.shape[:-1], -1)

    def frozen(self) -> Frozen:
        """The weight as `products` takes it."""
        base = self.base
        if isinstance(base, PackedLinear):
            return Frozen(base.words, base.scale, base.zero, base.bias)
        return Frozen(base.weight, None, None, base.bias)

    def _with_dropout(self, x_TI: torch.Tensor, spans: tuple[Span, ...]) -> torch.Tensor:
        y_TO: torch.Tensor = self.base(x_TI)
        added = torch.zeros_like(y_TO)
        for span in spans:
            if (slot := self.slots.get(span.adapter)) is not None:
                tokens = slice(span.first, span.end)
                down = F.linear(F.dropout(x_TI[tokens], slot.dropout), slot.lora_a.to(x_TI.dtype))
                added[tokens] = F.linear(down, slot.lora_b.to(x_TI.dtype)) * slot.scale
        return y_TO + added


def _parts(layers: tuple[LoraLinear, ...], spans: tuple[Span, ...]) -> list[Part]:
    return [
        Part(i, span.first, span.end, slot.scale, slot.lora_a, slot.lora_b)
        for span in spans
        for i, layer in enumerate(layers)
        if (slot := layer.slots.get(span.adapter)) is not None
    ]


# Layers of one module that models call one after the other with the same input.
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _bind_siblings(model: nn.Module) -> None:
    """Let the first of each group of siblings compute for all that carry an adapter without dropout."""
    for module in model.modules():
        for names in _SIBLINGS:
            found = [layer for name in names if isinstance(layer := getattr(module, name, None), LoraLinear)]
            if found and not any(slot.dropout for layer in found for slot in layer.slots.values()):
                found[0].together = tuple(found)
            elif found:
                found[0].together = (found[0],)


class LoraAdapter:
    """One adapter of a model: its slots by the full names of their layers."""

    def __init__(
        self, slots: dict[str, LoraSlot], settings: LoraSettings, linear_names: tuple[str, ...], mix: Mix, number: int
    ) -> None:
        self.slots = slots
        self.settings = settings
        self.mix = mix
        self.number = number
        self._linear_names = linear_names

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name as in a PEFT file without its prefix, parameter), in a fixed order."""
        for name, slot in self.slots.items():
            yield f"{name}.lora_A.weight", slot.lora_a
            yield f"{name}.lora_B.weight", slot.lora_b

    def activate(self) -> None:
        """From now on the model answers with this adapter, whatever others it carries."""
        self.mix.use(self.number)

    def target_names(self) -> list[str]:
        """The shortest list of names that selects exactly these layers: last parts where they suffice."""
        leaves = sorted({name.rsplit(".", 1)[-1] for name in self.slots})
        selected = {name for name in self._linear_names if name.rsplit(".", 1)[-1] in leaves}
        return leaves if selected == set(self.slots) else sorted(self.slots)


def inject(model: nn.Module, settings: LoraSettings, generator: torch.Generator) -> LoraAdapter:
    """Freeze the model and put one more adapter on it, B zero so that nothing changes yet; it is active.

    Raises ModelError.
    """
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    mix = next(iter(adapted.values())).mix if adapted else Mix()
    if not adapted:
        model.requires_grad_(False)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | PackedLinear) and name.removesuffix(".base") not in adapted
    } | {name: module.base for name, module in adapted.items()}
    head = model.get_output_embeddings()
    candidates = {name: module for name, module in linears.items() if module is not head}
    slots = {}
    for name in sorted(_select(candidates, settings.targets)):
        base = candidates[name]
        layer = adapted.get(name) or LoraLinear(base, mix)
        slot = LoraSlot(base, settings.rank_of(name), settings.scale_of(name), settings.dropout, generator)
        layer.slots[mix.adapters] = slots[name] = slot
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    _bind_siblings(model)
    adapter = LoraAdapter(slots, settings, tuple(sorted(linears)), mix, mix.adapters)
    mix.adapters += 1
    adapter.activate()
    return adapter


def _select(linears: dict[str, nn.Linear | PackedLinear], targets: tuple[str, ...]) -> set[str]:
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
