"""What is inside a decoder layer: which linears read the same input, and where a scale can be moved to.

Found by running the layer once and watching which module reads whose output. A possible fold (divide the outputs of a
producer, multiply the inputs of its consumers) is then proved by doing it with random scales: only if the layer's
output stays the same is the fold kept. So no family of models is known by name.

Legend: K input channels of the consumers, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quant.experts import ExpertBank
from quant.skeleton import first_tensor

_PROBE_TOLERANCE = 1e-3  # relative change of the output; float32 rounding gives 1e-6, a wrong fold 1e-1

# How a producer's weight is divided: a norm's gain, a norm's gain stored minus one, the rows of a linear.
FoldKind = Literal["gain", "gain-minus-one", "rows"]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linears that read the same input. `site`: the module on whose input calibration listens."""

    site: str
    linears: tuple[str, ...]
    bank: str | None = None  # the ExpertBank these belong to: only some tokens reach them


@dataclass(frozen=True, slots=True)
class Fold:
    """Scales of K input channels of `consumers` that can be undone in `producer`."""

    kind: FoldKind
    producer: str
    consumers: tuple[str, ...]  # all linears whose columns are multiplied, quantized or not, and routers
    site: str  # where the statistics of the shared input are gathered
    rows: tuple[int, ...] | None = None  # producer's row of each of the K channels; None: the same number


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The structure of one layer. All names are relative to the layer."""

    groups: tuple[InputGroup, ...]
    folds: tuple[Fold, ...]
    banks: tuple[str, ...]
    matrices: tuple[str, ...]  # every module with a 2-D weight: linears and routers

    @property
    def last_site(self) -> str | None:
        """The site that every run of the layer reaches last; None where tokens choose their way through experts."""
        return self.groups[-1].site if self.groups and not self.banks else None


def apply_fold(weights: Weights, fold: Fold, scale_K: Tensor) -> dict[str, Tensor]:
    """The weights with the consumers' channels multiplied by `scale_K` and the producer divided."""
    changed = dict(weights)
    for consumer in fold.consumers:
        changed[f"{consumer}.weight"] = weights[f"{consumer}.weight"] * scale_K
    gain = weights[f"{fold.producer}.weight"]
    by_row = (
        scale_K
        if fold.rows is None
        else torch.empty(gain.shape[0], device=gain.device).index_copy_(
            0, torch.tensor(fold.rows, device=gain.device), scale_K
        )
    )
    if fold.kind == "gain-minus-one":
        changed[f"{fold.producer}.weight"] = (1 + gain) / by_row - 1
    else:
        changed[f"{fold.producer}.weight"] = gain / (by_row if gain.dim() == 1 else by_row[:, None])
    bias = f"{fold.producer}.bias"
    if bias in weights:
        changed[bias] = weights[bias] / by_row
    return changed


@torch.no_grad()
def make_plan(layer: nn.Module, hidden_BTH: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerPlan:
    """Discover one loaded layer's structure by running it on a small batch."""
    trace = _Trace(layer)
    trace.run(hidden_BTH, args, kwargs)
    banks = {name: module for name, module in layer.named_modules() if isinstance(module, ExpertBank)}
    groups = [InputGroup(names[0], tuple(names)) for names in trace.linears_by_input(outside=tuple(banks))]
    for bank_name, bank in banks.items():
        for index in range(len(bank)):
            expert = f"{bank_name}.{index}"
            groups.append(InputGroup(f"{expert}.gate_proj", (f"{expert}.gate_proj", f"{expert}.up_proj"), bank_name))
            groups.append(InputGroup(f"{expert}.down_proj", (f"{expert}.down_proj",), bank_name))
    prove = _Prover(layer, hidden_BTH, args, kwargs)
    folds = _norm_folds(trace, banks, prove) + _linear_folds(layer, trace, groups, prove)
    for bank_name, bank in banks.items():
        for index in range(len(bank)):
            expert = f"{bank_name}.{index}"  # Expert.forward is ours: down reads act(gate) * up
            down = f"{expert}.down_proj"
            folds.append(Fold("rows", f"{expert}.up_proj", (down,), down))
    matrices = tuple(name for name, module in layer.named_modules() if _weight_dim(module) == 2)
    return LayerPlan(tuple(groups), tuple(folds), tuple(banks), matrices)


class _Trace:
    """Which storage every weighted module reads and writes, in the order they ran."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.inputs: dict[str, Tensor] = {}  # held, so that no storage is reused while we compare
        self.outputs: dict[str, Tensor] = {}

    def run(self, hidden_BTH: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handles = []
        for name, module in self.layer.named_modules():
            if _weight_dim(module) or isinstance(module, ExpertBank):

                def record(_module: nn.Module, inputs: tuple[Any, ...], output: Any, name: str = name) -> None:
                    self.inputs[name], self.outputs[name] = inputs[0], first_tensor(output)

                handles.append(module.register_forward_hook(record))
        try:
            self.layer(hidden_BTH, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def linears_by_input(self, outside: tuple[str, ...]) -> list[list[str]]:
        """Names of linears grouped by the tensor they read, leaving out those below `outside`."""
        by_input: dict[tuple[int, int], list[str]] = {}
        for name, tensor in self.inputs.items():
            below = any(name.startswith(f"{bank}.") for bank in outside)
            if isinstance(self.layer.get_submodule(name), nn.Linear) and not below:
                by_input.setdefault(_identity(tensor), []).append(name)
        return list(by_input.values())

    def readers(self, producer: str) -> list[str]:
        """Names of the modules that read the output of `producer` itself."""
        written = _identity(self.outputs[producer])
        return [name for name, tensor in self.inputs.items() if _identity(tensor) == written and name != producer]


class _Prover:
    """Tries a fold with random scales and says whether the layer's output stayed the same."""

    def __init__(self, layer: nn.Module, hidden_BTH: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer, self.hidden_BTH, self.args, self.kwargs = layer, hidden_BTH, args, kwargs
        self.weights = dict(layer.state_dict())
        self.expected = first_tensor(layer(hidden_BTH, *args, **kwargs)) - hidden_BTH

    def __call__(self, fold: Fold) -> bool:
        gain = self.weights[f"{fold.producer}.weight"]
        generator = torch.Generator().manual_seed(0)
        by_row = torch.rand(gain.shape[0], generator=generator).add(0.5).to(gain.device)
        scale_K = by_row if fold.rows is None else by_row[torch.tensor(fold.rows, device=gain.device)]
        changed = apply_fold(self.weights, fold, scale_K)
        output = torch.func.functional_call(self.layer, changed, (self.hidden_BTH, *self.args), self.kwargs)
        error = (first_tensor(output) - self.hidden_BTH - self.expected).norm()
        return bool(error <= _PROBE_TOLERANCE * self.expected.norm())


def _norm_folds(trace: _Trace, banks: Mapping[str, ExpertBank], prove: _Prover) -> list[Fold]:
    folds = []
    for producer in trace.outputs:
        if _weight_dim(trace.layer.get_submodule(producer)) != 1:
            continue
        readers = trace.readers(producer)
        consumers = [name for name in readers if name not in banks]
        for bank in (name for name in readers if name in banks):
            for index in range(len(banks[bank])):
                consumers += [f"{bank}.{index}.gate_proj", f"{bank}.{index}.up_proj"]
        if not consumers or any(_weight_dim(trace.layer.get_submodule(name)) != 2 for name in consumers):
            continue
        site = next((name for name in readers if isinstance(trace.layer.get_submodule(name), nn.Linear)), readers[-1])
        for kind in ("gain", "gain-minus-one"):
            fold = Fold(kind, producer, tuple(consumers), site)
            if prove(fold):
                folds.append(fold)
                break
    return folds


def _linear_folds(layer: nn.Module, trace: _Trace, groups: list[InputGroup], prove: _Prover) -> list[Fold]:
    """Folds into the rows of an earlier linear: values into the output projection, up into down."""
    folds = []
    ran = list(trace.inputs)
    for group in groups:
        if group.bank or len(group.linears) != 1 or any(group.site in trace.readers(name) for name in trace.outputs):
            continue
        (consumer,) = group.linears
        channels = layer.get_submodule(consumer).in_features
        parent = consumer.rpartition(".")[0]
        for producer in ran[: ran.index(consumer)]:
            module = layer.get_submodule(producer)
            if not isinstance(module, nn.Linear) or producer.rpartition(".")[0] != parent:
                continue
            rows = _row_of_channel(layer.get_submodule(parent), module.out_features, channels)
            fold = Fold("rows", producer, (consumer,), consumer, rows)
            if (rows is not None or module.out_features == channels) and prove(fold):
                folds.append(fold)
                break
    return folds


def _row_of_channel(attention: nn.Module, rows: int, channels: int) -> tuple[int, ...] | None:
    """Rows of the values that the heads of a query group share: channel (head, d) reads row (head // repeat, d)."""
    head_dim = getattr(attention, "head_dim", None)
    if not isinstance(head_dim, int) or rows >= channels or channels % rows or rows % head_dim:
        return None
    repeat = channels // rows
    return tuple(channel // head_dim // repeat * head_dim + channel % head_dim for channel in range(channels))


def _weight_dim(module: nn.Module) -> int:
    weight = module._parameters.get("weight")
    return 0 if weight is None else weight.dim()


def _identity(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()
