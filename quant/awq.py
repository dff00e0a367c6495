"""AWQ: activation-aware weight scales and clips (Lin et al., 2023, "AWQ: Activation-aware Weight Quantization",
arXiv 2306.00978).

Multiplying input channel k of W by s_k and dividing the producer of that channel by s_k changes nothing in exact
arithmetic, but moves rounding error away from the channels that matter. The scales are searched on a line,

    s_k = a_k^r / m_k^(1-r),   r in {0, 1/20, ..., 19/20},   a_k = E|x_k|,
                               m_k = mean over rows of |w_k| relative to the largest of its group

and the loss of a candidate is the expected squared error of the outputs of all linears that share the input,

    L(s) = sum_W  E || (W - Q(W diag s) diag s^-1) x ||^2  =  sum_W  trace(D H D^T),   H = E[x x^T].

The published search runs the block for every candidate; with H gathered once the same expectation costs one matrix
product and keeps no activations. The range clip is then searched per group with the blocks of H.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.config import Grid
from quant.grid import as_groups, levels_of, rounding_error

STEPS = 20
_SMALLEST = 1e-4  # scales below are noise from dead channels
_ROWS_JUDGED = 512  # of each weight, evenly spread: every row sees the same scale, so a sample ranks candidates


def search_scale(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    mean_abs_K: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    tie_K: Tensor | None = None,
) -> Tensor:
    """The scale [K] of the input channels that all `weights` [N_i, K] share.

    grams: E[x x^T] [K, K] seen by each weight. tie_K: channels with equal entries get equal scales (their producer is
    one channel, as values repeated over the heads of a group are); None: every channel on its own.
    """
    weight_mean_K = torch.stack([_relative_magnitude(w_NK, grid) for w_NK in weights]).mean(0)
    mean_abs_K, weight_mean_K = _tied_mean(mean_abs_K.float(), tie_K), _tied_mean(weight_mean_K, tie_K)
    judged = [w_NK[:: max(1, w_NK.shape[0] // _ROWS_JUDGED)].float() for w_NK in weights]
    best_K, best_loss = torch.ones_like(mean_abs_K), float("inf")
    for step in range(-1, STEPS):
        scale_K = torch.ones_like(mean_abs_K) if step < 0 else _candidate(mean_abs_K, weight_mean_K, step / STEPS)
        losses = [
            scaled_error(w_NK, gram_KK, scale_K, grid, dtype) for w_NK, gram_KK in zip(judged, grams, strict=True)
        ]
        if sum(losses) < best_loss:
            best_K, best_loss = scale_K, sum(losses)
    return best_K


def scaled_error(w_NK: Tensor, gram_KK: Tensor, scale_K: Tensor, grid: Grid, dtype: torch.dtype) -> float:
    """trace(D H D^T) of rounding W diag(s): the expected squared output error of one linear."""
    scaled_NGS = as_groups(w_NK * scale_K, grid)
    delta_NK = rounding_error(scaled_NGS, levels_of(scaled_NGS, grid, dtype), grid).view(w_NK.shape) / scale_K
    return float(((delta_NK @ gram_KK) * delta_NK).sum())


def _candidate(mean_abs_K: Tensor, weight_mean_K: Tensor, ratio: float) -> Tensor:
    scale_K = mean_abs_K.clamp(min=_SMALLEST) ** ratio / weight_mean_K.clamp(min=_SMALLEST) ** (1 - ratio)
    scale_K = scale_K.clamp(min=_SMALLEST)
    return scale_K / (scale_K.max() * scale_K.min()).sqrt()


def _relative_magnitude(w_NK: Tensor, grid: Grid) -> Tensor:
    """Mean over rows of |w| relative to the largest of its group, [K]."""
    abs_NGS = as_groups(w_NK, grid).abs()
    return (abs_NGS / abs_NGS.amax(-1, keepdim=True).clamp(min=1e-12)).mean(0).flatten()


def _tied_mean(value_K: Tensor, tie_K: Tensor | None) -> Tensor:
    if tie_K is None:
        return value_K
    count = int(tie_K.max()) + 1
    total = torch.zeros(count, device=value_K.device).index_add_(0, tie_K, value_K)
    return (total / torch.bincount(tie_K, minlength=count))[tie_K]
