"""Placing weights on an integer grid: ranges to scales, rounding, and the search for the best clipped range.

Legend: N output features, K input features, G groups, S group size (K = G * S), W = w as [N, G, S].
All arithmetic is float32; scales are rounded to what the file stores before any weight is rounded with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.config import Grid
from quant.kernels import works
from quant.pack import QuantizedLinear

# Shares of the full range tried by the search. Below one half the clipping error always wins on real weights.
SHRINKS = tuple(1.0 - 0.025 * step for step in range(21))
_ROWS_AT_ONCE = 4096  # bounds the search's scratch memory
_WEIGHTS_AT_ONCE = 1 << 17  # on the CPU: what a pass reads must still be in its cache for the next


@dataclass(frozen=True, slots=True)
class Levels:
    """Scale and zero point of every group."""

    scale_NG: Tensor  # float32, exactly representable in the stored type
    zero_NG: Tensor  # float32 holding integers


def as_groups(w_NK: Tensor, grid: Grid) -> Tensor:
    """[N, K] -> float32 [N, G, S]."""
    n, k = w_NK.shape
    return w_NK.float().view(n, k // grid.group_size, grid.group_size)


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales so that float16 holds them and, for a bfloat16 model, bfloat16 does too.

    Engines cast stored float16 scales to the type they compute in; rounding first makes that cast exact, so that the
    grid solved for is the grid served. A group of zeros gets the scale one.
    """
    half = scale.to(torch.float16)
    rounded = half.to(torch.bfloat16).float() if dtype == torch.bfloat16 else half.float()
    return torch.where(rounded > 0, rounded, torch.ones_like(rounded))


def levels_of(w_NGS: Tensor, grid: Grid, dtype: torch.dtype, shrink: float = 1.0) -> Levels:
    """Scale and zero point that cover `shrink` of each group's range (including zero)."""
    return _levels_between(*_range_of(w_NGS), grid, dtype, shrink)


def _range_of(w_NGS: Tensor) -> tuple[Tensor, Tensor]:
    return w_NGS.amin(-1).clamp(max=0), w_NGS.amax(-1).clamp(min=0)


def _levels_between(low_NG: Tensor, high_NG: Tensor, grid: Grid, dtype: torch.dtype, shrink: float) -> Levels:
    low, high = low_NG * shrink, high_NG * shrink
    if grid.symmetric:
        scale = storable(torch.maximum(-low, high) / (grid.middle - 1), dtype)
        return Levels(scale, torch.full_like(scale, grid.middle))
    scale = storable((high - low) / grid.max_level, dtype)
    return Levels(scale, (-low / scale).round().clamp(0, grid.max_level))


def round_to(w_NGS: Tensor, levels: Levels, grid: Grid) -> Tensor:
    """The nearest integers [N, G, S], as float32."""
    q = (w_NGS / levels.scale_NG.unsqueeze(-1)).round() + levels.zero_NG.unsqueeze(-1)
    return q.clamp(0, grid.max_level)


def values_of(q_NGS: Tensor, levels: Levels) -> Tensor:
    """The weights that integers stand for."""
    return (q_NGS - levels.zero_NG.unsqueeze(-1)) * levels.scale_NG.unsqueeze(-1)


def rounding_error(w_NGS: Tensor, levels: Levels, grid: Grid) -> Tensor:
    """`values_of(round_to(w))` - w, bit for bit, in half the passes over memory."""
    scale, zero = levels.scale_NG.unsqueeze(-1), levels.zero_NG.unsqueeze(-1)
    delta_NGS = (w_NGS / scale).round_()
    if grid.symmetric:
        delta_NGS.clamp_(-grid.middle, grid.max_level - grid.middle)
    else:
        delta_NGS.clamp_(-zero, grid.max_level - zero)
    return delta_NGS.mul_(scale).sub_(w_NGS)


def error_of(delta_NGS: Tensor, importance: Tensor | None) -> Tensor:
    """Expected squared output error [N, G] that each group's weight error causes. Consumes `delta_NGS`.

    `importance`: None (all inputs count alike), [G, S] (mean square of each input) or [G, S, S] (second moments within
    a group, as AWQ's clip search uses).
    """
    if importance is None:
        return delta_NGS.square_().sum(-1)
    if importance.dim() == 2:
        return delta_NGS.square_().mul_(importance).sum(-1)
    along_GNS = torch.bmm(delta_NGS.transpose(0, 1), importance)
    return along_GNS.transpose(0, 1).mul(delta_NGS).sum(-1)


def search_levels(w_NGS: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None) -> Levels:
    """Per group, the clipped range of SHRINKS with the least `error_of`."""
    by_kernel = w_NGS.is_cuda and (importance is None or importance.dim() == 2)
    if by_kernel and works("the search for ranges", lambda: _search_by_kernel(w_NGS[:1], grid, dtype, importance)):
        return _search_by_kernel(w_NGS, grid, dtype, importance)
    rows = _ROWS_AT_ONCE if w_NGS.is_cuda else max(1, _WEIGHTS_AT_ONCE // w_NGS[0].numel())
    found = [_search(rows_NGS, grid, dtype, importance) for rows_NGS in w_NGS.split(rows)]
    return Levels(torch.cat([one.scale_NG for one in found]), torch.cat([one.zero_NG for one in found]))


def _search_by_kernel(w_NGS: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None) -> Levels:
    from quant.search_kernel import search  # imports Triton, which is not everywhere

    shrinks = torch.tensor(SHRINKS, device=w_NGS.device)
    middle = grid.middle if grid.symmetric else None
    return Levels(*search(w_NGS, importance, shrinks, grid.max_level, middle, dtype == torch.bfloat16))


def _search(w_NGS: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None) -> Levels:
    low_NG, high_NG = _range_of(w_NGS)
    best = _levels_between(low_NG, high_NG, grid, dtype, SHRINKS[0])
    best_error_NG = error_of(rounding_error(w_NGS, best, grid), importance)
    for shrink in SHRINKS[1:]:
        levels = _levels_between(low_NG, high_NG, grid, dtype, shrink)
        error_NG = error_of(rounding_error(w_NGS, levels, grid), importance)
        better_NG = error_NG < best_error_NG
        best_error_NG = torch.where(better_NG, error_NG, best_error_NG)
        best = Levels(
            torch.where(better_NG, levels.scale_NG, best.scale_NG),
            torch.where(better_NG, levels.zero_NG, best.zero_NG),
        )
    return best


def quantized(q_NK: Tensor, levels: Levels, grid: Grid, dtype: torch.dtype) -> QuantizedLinear:
    """Integers and levels as they are stored. `dtype`: of the model, float16 or bfloat16 (scales follow it)."""
    stored = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    return QuantizedLinear(q_NK.to(torch.uint8), levels.scale_NG.to(stored), levels.zero_NG.to(torch.uint8), grid)
