"""GPTQ: rounding column by column, each error spread over the columns not yet rounded (Frantar et al., 2022,
"GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323).

With H = E[x x^T] + damping and U the upper Cholesky factor of H^-1, for column j in order:

    e = (w_j - Q(w_j)) / U_jj,      w_i <- w_i - e U_ji   for i > j.

Columns are visited by descending diag(H) ("act-order"), but the groups are runs of input channels and their ranges
are fixed from the unmodified weights before solving ("static groups"). So the stored form has desc_act false, which
engines require, and keeps the quality of the order.

Legend: N outputs, K inputs, G groups, S group size, B channels of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.config import Grid
from quant.errors import BadHessian
from quant.gptq_block import BLOCK, Block, rounder
from quant.grid import Levels, as_groups, quantized, search_levels
from quant.pack import QuantizedLinear
from quant.rtn import diagonal_importance

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
    q_KN = _solve(w_NK.t()[order_K].contiguous(), factor_KK, levels, group_K, grid)
    q_NK = torch.empty_like(w_NK)
    q_NK[:, order_K] = q_KN.t()
    return quantized(q_NK, levels, grid, dtype)


def inverse_factor(gram_KK: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the damped inverse. Raises BadHessian when no allowed damping makes it exist.

    With J the reversal of rows and J H J = L L^T, it is J L^-1 J: half the work of inverting H and factoring that.
    """
    mean = gram_KK.diagonal().mean()
    while damping <= _LARGEST_DAMPING:
        reversed_KK = gram_KK.flip(0, 1)
        reversed_KK.diagonal().add_(damping * mean)
        lower_KK, failed = torch.linalg.cholesky_ex(reversed_KK)
        del reversed_KK  # of 14336 inputs each of these is 0.8 GB
        if not failed:
            identity_KK = torch.eye(lower_KK.shape[0], device=lower_KK.device)
            factor_KK = torch.linalg.solve_triangular(lower_KK, identity_KK, upper=False).flip(0, 1)
            if bool(torch.isfinite(factor_KK).all()):
                return factor_KK
        damping *= 10
    raise BadHessian(f"the Hessian is not positive definite even with {_LARGEST_DAMPING:.0%} damping")


def _solve(w_KN: Tensor, factor_KK: Tensor, levels: Levels, group_K: Tensor, grid: Grid) -> Tensor:
    """Integers [K, N] (float32) for input channels already in visiting order. Consumes w_KN.

    Channels are rows here: each step then reads and writes contiguous memory.
    """
    k, round_block = w_KN.shape[0], rounder(levels, grid.max_level)
    q_KN = torch.empty_like(w_KN)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block = Block(w_KN[start:stop], group_K[start:stop], factor_KK[start:stop, start:stop])
        error_BN = round_block(block, q_KN[start:stop])
        w_KN[stop:].addmm_(factor_KK[start:stop, stop:].t(), error_BN, alpha=-1)
    return q_KN
