"""Integers to packed int32 words and back, in the three layouts. Pure functions on tensors.

Legend: N output features, K input features, G groups, b bits, W = 32 / b values in a word.
A word holds its first value in the lowest bits. AWQ's gemm kernel wants the eight columns of a word interleaved
(even columns in the lower half-word, odd ones in the upper), which is _AWQ_ORDER.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.config import Format, Grid
from quant.errors import NotExact

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """One linear's weight on its grid, independent of any file layout."""

    q_NK: Tensor  # uint8
    scale_NG: Tensor  # float16 or bfloat16
    zero_NG: Tensor  # uint8
    grid: Grid

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that every engine computes with: (q - zero) * scale, rounded once to `dtype`."""
        n, k = self.q_NK.shape
        q_NGS = self.q_NK.view(n, k // self.grid.group_size, self.grid.group_size).to(torch.float32)
        w_NGS = (q_NGS - self.zero_NG.unsqueeze(-1).float()) * self.scale_NG.unsqueeze(-1).float()
        return w_NGS.view(n, k).to(dtype)

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is the middle of the grid, whatever the grid allows."""
        return bool((self.zero_NG == self.grid.middle).all())


def pack_words(values: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Pack unsigned integers along `dim` into int32 words. `order[i]`: which of a word's values goes to slot i."""
    per_word = 32 // bits
    if values.shape[dim] % per_word:
        raise ValueError(f"{values.shape[dim]} values along dimension {dim} do not fill words of {per_word}")
    grouped = values.to(torch.int32).unflatten(dim, (-1, per_word))
    words = torch.zeros_like(grouped.select(dim + 1, 0))
    for slot in range(per_word):
        source = order[slot] if order else slot
        words |= grouped.select(dim + 1, source) << (bits * slot)
    return words.contiguous()


def unpack_words(words: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The inverse of pack_words: uint8."""
    per_word = 32 // bits
    slots = [(words >> (bits * slot)) & (2**bits - 1) for slot in range(per_word)]
    if order:
        slots = [slots[order.index(position)] for position in range(per_word)]
    return torch.stack(slots, dim=dim + 1).flatten(dim, dim + 1).to(torch.uint8)


def pack(linear: QuantizedLinear, form: Format) -> dict[str, Tensor]:
    """Suffix -> tensor of one linear in the given format. Raises NotExact when the format cannot hold it."""
    if form == "awq":
        return _pack_awq(linear)
    if form == "gptq":
        return _pack_gptq(linear)
    return _pack_compressed_tensors(linear)


def unpack(tensors: dict[str, Tensor], form: Format, grid: Grid, *, gptq_v2: bool = False) -> QuantizedLinear:
    """The linear that packed tensors (suffix -> tensor) hold. Raises NotExact for a GPTQ group order of its own."""
    if form == "awq":
        return _unpack_awq(tensors, grid)
    if form == "gptq":
        return _unpack_gptq(tensors, grid, gptq_v2)
    return _unpack_compressed_tensors(tensors, grid)


def _pack_awq(linear: QuantizedLinear) -> dict[str, Tensor]:
    if linear.grid.bits != 4:
        raise NotExact(f"the awq format holds 4 bits, these weights have {linear.grid.bits}")
    return {
        "qweight": pack_words(linear.q_NK.t(), 4, 1, _AWQ_ORDER),
        "qzeros": pack_words(linear.zero_NG.t(), 4, 1, _AWQ_ORDER),
        "scales": linear.scale_NG.t().to(torch.float16).contiguous(),
    }


def _unpack_awq(tensors: dict[str, Tensor], grid: Grid) -> QuantizedLinear:
    q_KN = unpack_words(tensors["qweight"], 4, 1, _AWQ_ORDER)
    zero_GN = unpack_words(tensors["qzeros"], 4, 1, _AWQ_ORDER)
    return QuantizedLinear(_t(q_KN), _t(tensors["scales"]), _t(zero_GN), grid)


def _pack_gptq(linear: QuantizedLinear) -> dict[str, Tensor]:
    bits, k = linear.grid.bits, linear.q_NK.shape[1]
    if not linear.is_symmetric:
        raise NotExact("the gptq format is symmetric for every engine; these weights have zero points of their own")
    return {
        "qweight": pack_words(linear.q_NK.t(), bits, 0),
        "qzeros": pack_words(linear.zero_NG.t() - 1, bits, 1),  # v1 stores zero - 1
        "scales": linear.scale_NG.t().to(torch.float16).contiguous(),
        "g_idx": torch.arange(k, dtype=torch.int32, device=linear.q_NK.device) // linear.grid.group_size,
    }


def _unpack_gptq(tensors: dict[str, Tensor], grid: Grid, v2: bool) -> QuantizedLinear:
    q_NK = _t(unpack_words(tensors["qweight"], grid.bits, 0))
    natural = torch.arange(q_NK.shape[1], device=q_NK.device) // grid.group_size
    if "g_idx" in tensors and not torch.equal(tensors["g_idx"].long(), natural):
        raise NotExact("these GPTQ weights were stored with desc_act: their groups are not runs of input channels")
    zero_NG = _t(unpack_words(tensors["qzeros"], grid.bits, 1))
    if not v2:
        zero_NG = (zero_NG + 1) & grid.max_level
    return QuantizedLinear(q_NK, _t(tensors["scales"]), zero_NG, grid)


def _pack_compressed_tensors(linear: QuantizedLinear) -> dict[str, Tensor]:
    bits = linear.grid.bits
    if linear.grid.symmetric and not linear.is_symmetric:
        raise NotExact("a symmetric compressed-tensors grid has no room for these zero points")
    tensors = {
        "weight_packed": pack_words(linear.q_NK, bits, 1),
        "weight_scale": linear.scale_NG.contiguous(),
        "weight_shape": torch.tensor(linear.q_NK.shape, dtype=torch.int64),
    }
    if not linear.grid.symmetric:
        tensors["weight_zero_point"] = pack_words(linear.zero_NG, bits, 0)
    return tensors


def _unpack_compressed_tensors(tensors: dict[str, Tensor], grid: Grid) -> QuantizedLinear:
    q_NK, scale_NG = unpack_words(tensors["weight_packed"], grid.bits, 1), tensors["weight_scale"]
    if grid.symmetric:
        zero_NG = torch.full_like(scale_NG, grid.middle, dtype=torch.uint8)
    else:
        zero_NG = unpack_words(tensors["weight_zero_point"], grid.bits, 0)
    return QuantizedLinear(q_NK, scale_NG, zero_NG, grid)


def _t(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous()
