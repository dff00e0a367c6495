"""What CUDA and Triton load or compile at first use, done before the first layer, while that is still being read."""

from __future__ import annotations

import torch

from quant.config import Grid, Method
from quant.gptq import gptq
from quant.rtn import block_importance, diagonal_importance, rtn

_GROUPS = 16  # a multiple of 16, as in real layers: Triton compiles other numbers of groups anew


def warm_up(method: Method, grid: Grid, dtype: torch.dtype, device: torch.device) -> None:
    """Quantize a small weight on `device` and forget it. dtype: of the model."""
    inputs = _GROUPS * grid.group_size
    gram_KK = torch.eye(inputs, device=device)
    w_NK = torch.ones(256, inputs, device=device) @ gram_KK  # the product loads cuBLAS
    if method == "gptq":
        gptq(w_NK, gram_KK, grid, dtype)
    elif method == "awq":
        rtn(w_NK, grid, dtype, block_importance(gram_KK, grid))
    else:
        rtn(w_NK, grid, dtype, diagonal_importance(gram_KK.diagonal(), grid))
