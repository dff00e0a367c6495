"""GPTQ: rounding column by column, each error spread over the columns not yet rounded (Frantar et al., 2022,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323).

With H = E[x x^T] + damping and U the upper Cholesky factor of H^-1, for column j in order:

    e = (w_j - Q(w_j)) / U_jj,      w_i <- w_i - e U_ji   for i > j.

Columns are visited by descending diag(H) ("act-order"), but the groups are runs of input channels and their ranges
are fixed from the unmodified weights before solving ("static groups"). So the stored form has desc_act false, which
engines require, and keeps the quality of the order.

Legend: N outputs, K inputs, G groups, S group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.config import Grid
from quant.errors import BadHessian
from quant.grid import Levels, as_groups, quantized, search_levels
from quant.pack import QuantizedLinear
from quant.rtn import diagonal_importance

_BLOCK = 128  # columns whose error is spread at once to all later columns
_LARGEST_DAMPING = 1.0  # share of the mean diagonal; beyond it the Hessian says nothing


def gptq(w_NK: Tensor, gram_KK: Tensor, grid: Grid, dtype: torch.dtype, damping: float = 0.01) -> QuantizedLinear:
    """Quantize one weight (or several that share an input, stacked along N). Raises BadHessian.

    gram_KK: E[x x^T] of the inputs. damping: share of the mean diagonal added to it; grown tenfold until it helps.
    """
    w_NK = w_NK.float()
    gram_KK = gram_KK.float()
    if not bool(torch.isfinite(gram_KK).all()):
        raise BadHessian("the layer's inputs are not finite")
    mean_square_K = gram_KK.diagonal()
    if float(mean_square_K.sum()) <= 0:
        raise BadHessian("no calibration token reached this layer")
    levels = search_levels(as_groups(w_NK, grid), grid, dtype, diagonal_importance(mean_square_K, grid))

    order_K = torch.argsort(mean_square_K, descending=True, stable=True)
    group_K = order_K // grid.group_size
    factor_KK = inverse_factor(gram_KK[order_K][:, order_K], damping)
    q_KN = _solve(w_NK.t()[order_K], factor_KK, levels, group_K, grid)
    q_NK = torch.empty_like(w_NK)
    q_NK[:, order_K] = q_KN.t()
    return quantized(q_NK, levels, grid, dtype)


def inverse_factor(gram_KK: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped inverse. Raises BadHessian when no allowed damping makes it exist."""
    mean = gram_KK.diagonal().mean()
    while damping <= _LARGEST_DAMPING:
        damped_KK = gram_KK.clone()
        damped_KK.diagonal().add_(damping * mean)
        lower_KK, failed = torch.linalg.cholesky_ex(damped_KK)
        if not failed:
            factor_KK, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_KK), upper=True)
            if not failed and bool(torch.isfinite(factor_KK).all()):
                return factor_KK
        damping *= 10
    raise BadHessian(f"the Hessian is not positive definite even with {_LARGEST_DAMPING:.0%} damping")


def _solve(w_KN: Tensor, factor_KK: Tensor, levels: Levels, group_K: Tensor, grid: Grid) -> Tensor:
    """Integers [K, N] (float32) for input channels already in visiting order. Consumes w_KN.

    Channels are rows here: each step then reads and writes contiguous memory.
    """
    k = w_KN.shape[0]
    scale_GN, zero_GN = levels.scale_NG.t().contiguous(), levels.zero_NG.t().contiguous()
    groups, diagonal = group_K.tolist(), factor_KK.diagonal().tolist()
    q_KN = torch.empty_like(w_KN)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        block_BN = w_KN[start:stop]
        error_BN = torch.empty_like(block_BN)
        for j in range(stop - start):
            column = start + j
            scale_N, zero_N = scale_GN[groups[column]], zero_GN[groups[column]]
            q_N = ((block_BN[j] / scale_N).round_() + zero_N).clamp_(0, grid.max_level)
            q_KN[column] = q_N
            error_BN[j] = (block_BN[j] - (q_N - zero_N) * scale_N) / diagonal[column]
            block_BN[j + 1 :] -= torch.outer(factor_KK[column, column + 1 : stop], error_BN[j])
        w_KN[stop:] -= factor_KK[start:stop, stop:].t() @ error_BN
    return q_KN
