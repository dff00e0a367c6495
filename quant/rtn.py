"""Round to nearest, with the clipped range of every group chosen by importance-weighted squared error.

For each group, over shares p of its range:   argmin_p  sum_k E[x_k^2] (w_k - Q_p(w_k))^2

The weights E[x_k^2] are the diagonal of the second moments of the layer's inputs (the "importance matrix" of
llama.cpp and llm-compressor's imatrix observer); without calibration they are all one. Nothing but one number per
input channel is needed from the activations, which makes this the fast method.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.config import Grid
from quant.grid import as_groups, quantized, round_to, search_levels
from quant.pack import QuantizedLinear


def rtn(w_NK: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None = None) -> QuantizedLinear:
    """Quantize one weight. `importance`: see grid.error_of. `dtype`: of the model, which the scales follow."""
    w_NGS = as_groups(w_NK, grid)
    levels = search_levels(w_NGS, grid, dtype, importance)
    return quantized(round_to(w_NGS, levels, grid).view(w_NK.shape), levels, grid, dtype)


def diagonal_importance(mean_square_K: Tensor, grid: Grid) -> Tensor:
    """E[x^2] per input channel as [G, S], with channels that were never active counted a little, not as free."""
    floor = mean_square_K.mean() * 1e-6
    return mean_square_K.clamp(min=floor).view(-1, grid.group_size)


def block_importance(gram_KK: Tensor, grid: Grid) -> Tensor:
    """The second moments within each group, [G, S, S]: the blocks on the diagonal of E[x x^T]."""
    groups = gram_KK.shape[0] // grid.group_size
    blocked = gram_KK.view(groups, grid.group_size, groups, grid.group_size)
    return torch.stack([blocked[g, :, g, :] for g in range(groups)])
