"""Products with frozen weights and their low-rank terms: y = x W^T + b + scale * (x A^T) B^T.

Layers that take the same input (query, key and value; gate and up) go through together: the input is read once for all
their A, and their gradients of the input are summed inside the products. The low-rank terms are added in place into
the products of W, the backward pass keeps nothing large beyond the input, and the gradient of W is never computed.

Forward and backward are a function each. torch.compile sees them as operators, which it leaves whole while it fuses
what lies between them; elsewhere they are called as they are: calling an operator costs more than a small product.

A weight is either dense or four bits with scales and zero points (`packed.py`), which is made dense here, forward and
backward, and not kept.

Shapes: T tokens, t those of one part, I input size, O output size, R rank; W words along the input, V values of a word,
G groups of inputs, S inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BITS = 4


class Frozen(NamedTuple):
    """One frozen weight. Dense: `weight` is [O, I]. Else it holds words, with a scale and a zero point a group."""

    weight: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor | None


class Part(NamedTuple):
    """Tokens [first, end) of layer number `layer` also pass through A and B."""

    layer: int
    first: int
    end: int
    factor: float
    a_RI: Tensor
    b_OR: Tensor


def products(x_TI: Tensor, layers: Sequence[Frozen], parts: Sequence[Part]) -> list[Tensor]:
    """[T, O] of each layer."""
    frozen = (
        [layer.weight for layer in layers],
        [layer.scale for layer in layers],
        [layer.zero for layer in layers],
        [layer.bias for layer in layers],
        [part.layer for part in parts],
        [part.first for part in parts],
        [part.end for part in parts],
        [part.factor for part in parts],
    )
    a, b = [part.a_RI for part in parts], [part.b_OR for part in parts]
    if torch.compiler.is_compiling():
        outputs: list[Tensor] = torch.ops.tunegate.lora_products(x_TI, *frozen, a, b)
        return outputs[: len(layers)]
    return list(_Products.apply(x_TI, frozen, *a, *b))


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    zeros: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    *flat: Any,
) -> list[Tensor]:
    outputs = [
        F.linear(x, _dense(weight, scale, zero, x.dtype), bias)
        for weight, scale, zero, bias in zip(weights, scales, zeros, biases, strict=True)
    ]
    downs = []
    for first, end, parts in _by_tokens(*flat):
        a, columns = _joined(parts, x.dtype)
        downs.append(x[first:end] @ a.T)
        for part, column in zip(parts, columns, strict=True):
            high = part.b_OR.to(x.dtype).T
            outputs[part.layer][first:end].addmm_(downs[-1][:, column], high, alpha=part.factor)
    return outputs + downs  # small, and the backward pass wants them


def _backward(
    dy: Sequence[Tensor],
    x: Tensor,
    downs: Sequence[Tensor],
    wants_dx: bool,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    zeros: Sequence[Tensor | None],
    *flat: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dx = x.new_empty(x.shape if wants_dx else 0)
    if wants_dx:
        for i, (gradient, weight, scale, zero) in enumerate(zip(dy, weights, scales, zeros, strict=True)):
            dense = _dense(weight, scale, zero, x.dtype)
            torch.mm(gradient, dense, out=dx) if i == 0 else dx.addmm_(gradient, dense)
            del dense
    da, db = [], []
    for down, (first, end, parts) in zip(downs, _by_tokens(*flat), strict=True):
        a, columns = _joined(parts, x.dtype)
        ddown = torch.empty_like(down)
        for part, column in zip(parts, columns, strict=True):
            gradient = dy[part.layer][first:end]
            ddown[:, column] = (gradient @ part.b_OR.to(x.dtype)).mul_(part.factor)
            db.append((gradient.T @ down[:, column]).to(part.b_OR.dtype).mul_(part.factor))
        joined = ddown.T @ x[first:end]
        da += [joined[column].to(part.a_RI.dtype, copy=True) for part, column in zip(parts, columns, strict=True)]
        if wants_dx:
            dx[first:end].addmm_(ddown, a)
    return dx, da, db


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, scales, zeros, _, layers, firsts, ends, factors, a, b = inputs
    present = [one for one in (*scales, *zeros) if one is not None]
    downs = output[len(weights) :]
    ctx.save_for_backward(x, *weights, *present, *a, *b, *downs)
    ctx.counts = (len(weights), [one is not None for one in (*scales, *zeros)], len(a))
    ctx.parts = (layers, firsts, ends, factors)
    # For a list of tensors torch wants a list of gradients, for anything else one None.
    ctx.nothing = [
        [None] * len(one) if isinstance(one, list) and all(isinstance(item, Tensor) for item in one) else None
        for one in inputs[1:-2]
    ]


def _differentiate(ctx: Any, dy: Sequence[Tensor], *, backward: Callable[..., Any]) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    count, present, parts = ctx.counts
    x = next(saved)
    weights = [next(saved) for _ in range(count)]
    grids = [next(saved) if there else None for there in present]
    a, b = [next(saved) for _ in range(parts)], [next(saved) for _ in range(parts)]
    wants_dx = bool(ctx.needs_input_grad[0])
    dx, da, db = backward(dy[:count], x, list(saved), wants_dx, weights, grids[:count], grids[count:], *ctx.parts, a, b)
    return (dx if wants_dx else None, *ctx.nothing, da, db)


class _Products(torch.autograd.Function):
    """Forward and backward as functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: tuple[Any, ...], *ab: Tensor) -> tuple[Tensor, ...]:
        inputs = (x, *frozen, [*ab[: len(ab) // 2]], [*ab[len(ab) // 2 :]])
        output = _forward(*inputs)
        _keep(ctx, inputs, output)
        return tuple(output[: len(frozen[0])])

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Any, ...]:
        dx, *_, da, db = _differentiate(ctx, dy, backward=_backward)
        return (dx, None, *da, *db)


# --- the same as operators -------------------------------------------------------------------------------------------

_LAYERS = "Tensor[] weights, Tensor?[] scales, Tensor?[] zeros"
_PARTS = "int[] layers, SymInt[] firsts, SymInt[] ends, float[] factors, Tensor[] a, Tensor[] b"
_forward_operator = torch.library.custom_op(
    "tunegate::lora_products",
    _forward,
    mutates_args=(),
    schema=f"(Tensor x, {_LAYERS}, Tensor?[] biases, {_PARTS}) -> Tensor[]",
)
_backward_operator = torch.library.custom_op(
    "tunegate::lora_products_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor[] dy, Tensor x, Tensor[] downs, bool wants_dx, {_LAYERS}, {_PARTS})"
    " -> (Tensor, Tensor[], Tensor[])",
)
_forward_operator.register_autograd(partial(_differentiate, backward=_backward_operator), setup_context=_keep)


@_forward_operator.register_fake
def _(x: Tensor, weights: Sequence[Tensor], scales: object, zeros: object, biases: object, *flat: Any) -> list[Tensor]:
    outputs = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    groups = list(_by_tokens(*flat))
    return outputs + [x.new_empty(end - first, sum(len(part.a_RI) for part in parts)) for first, end, parts in groups]


@_backward_operator.register_fake
def _(
    dy: Sequence[Tensor], x: Tensor, downs: Sequence[Tensor], wants_dx: bool, *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    *_, a, b = rest
    dx = x.new_empty(x.shape if wants_dx else 0)
    return dx, [torch.empty_like(one) for one in a], [torch.empty_like(one) for one in b]


# --- frozen weights of four bits -------------------------------------------------------------------------------------


def dequantize(words_OW: Tensor, scale_OG: Tensor, zero_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """(value - zero) * scale as [O, I], computed in float32 and rounded once."""
    return _dequantizer(words_OW.is_cuda)(words_OW, scale_OG, zero_OG, dtype)


@cache
def _dequantizer(on_cuda: bool) -> Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]:
    # One kernel instead of a dozen passes over float32.
    return torch.compile(_dequantize, dynamic=False) if on_cuda else _dequantize


def _dequantize(words_OW: Tensor, scale_OG: Tensor, zero_OG: Tensor, dtype: torch.dtype) -> Tensor:
    shifts = torch.arange(0, 32, BITS, device=words_OW.device, dtype=torch.int32)
    q_OWV = (words_OW[:, :, None] >> shifts) & (2**BITS - 1)
    q_OGS = q_OWV.view(words_OW.shape[0], scale_OG.shape[1], -1)
    dense = (q_OGS.float() - zero_OG[:, :, None].float()) * scale_OG[:, :, None].float()
    return dense.view(words_OW.shape[0], -1).to(dtype)


def _dense(weight: Tensor, scale: Tensor | None, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    return weight if scale is None or zero is None else dequantize(weight, scale, zero, dtype)


def _by_tokens(*flat: Any) -> Iterator[tuple[int, int, list[Part]]]:
    """(first, end, parts) of each run of parts that share their tokens."""
    parts = [Part(*fields) for fields in zip(*flat, strict=True)]
    for (first, end), group in groupby(parts, lambda part: (part.first, part.end)):
        yield first, end, list(group)


def _joined(parts: Sequence[Part], dtype: torch.dtype) -> tuple[Tensor, list[slice]]:
    """Every A, one below the other, and which rows are whose."""
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.a_RI.shape[0])
    columns = [slice(first, end) for first, end in pairwise(ends)]
    return torch.cat([part.a_RI for part in parts]).to(dtype), columns
