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

from typing import NamedTuple

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
    """The upper Cholesky factor of the damped inverse. Raises BadHessian when no allowed damping makes it exist.

    With J the reversal of rows and J H J = L L^T, it is J L^-1 J: half the work of inverting H and factoring that.
    """
    mean = gram_KK.diagonal().mean()
    while damping <= _LARGEST_DAMPING:
        reversed_KK = gram_KK.flip(0, 1)
        reversed_KK.diagonal().add_(damping * mean)
        lower_KK, failed = torch.linalg.cholesky_ex(reversed_KK)
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
    k, n = w_KN.shape
    scale_GN, zero_GN = levels.scale_NG.t().contiguous(), levels.zero_NG.t().contiguous()
    graphed = _GraphedBlock(n, grid, w_KN.device) if w_KN.is_cuda and k >= _BLOCK else None
    q_KN = torch.empty_like(w_KN)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        group_B = group_K[start:stop]
        block = _Block(w_KN[start:stop], scale_GN[group_B], zero_GN[group_B], factor_KK[start:stop, start:stop])
        if graphed is not None and stop - start == _BLOCK:
            q_BN, error_BN = graphed(block)
        else:
            q_BN, error_BN = _round_block(block, grid.max_level)
        q_KN[start:stop] = q_BN
        w_KN[stop:] -= factor_KK[start:stop, stop:].t() @ error_BN
    return q_KN


class _Block(NamedTuple):
    """A run of B channels in visiting order, with the levels of the group of each."""

    w_BN: Tensor
    scale_BN: Tensor
    zero_BN: Tensor
    factor_BB: Tensor


def _round_block(block: _Block, max_level: int) -> tuple[Tensor, Tensor]:
    """(integers, weighted errors) of a block, each error spread over the later channels. Consumes the weights."""
    w_BN, scale_BN, zero_BN, factor_BB = block
    q_BN, error_BN = torch.empty_like(w_BN), torch.empty_like(w_BN)
    for j in range(w_BN.shape[0]):
        q_N = ((w_BN[j] / scale_BN[j]).round_() + zero_BN[j]).clamp_(0, max_level)
        q_BN[j] = q_N
        error_N = (w_BN[j] - (q_N - zero_BN[j]) * scale_BN[j]) / factor_BB[j, j]
        error_BN[j] = error_N
        w_BN[j + 1 :].addr_(factor_BB[j, j + 1 :], error_N, alpha=-1)
    return q_BN, error_BN


class _GraphedBlock:
    """`_round_block` as one CUDA graph: a thousand tiny kernels a block cost more to launch than to run."""

    def __init__(self, n: int, grid: Grid, device: torch.device) -> None:
        shapes = ((_BLOCK, n), (_BLOCK, n), (_BLOCK, n), (_BLOCK, _BLOCK))
        self._inputs = _Block(*(torch.ones(shape, device=device) for shape in shapes))
        _round_block(self._inputs, grid.max_level)  # kernels must be loaded before they are captured
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = _round_block(self._inputs, grid.max_level)

    def __call__(self, block: _Block) -> tuple[Tensor, Tensor]:
        """The outputs are overwritten by the next call."""
        for mine, theirs in zip(self._inputs, block, strict=True):
            mine.copy_(theirs)
        self._graph.replay()
        return self._outputs
