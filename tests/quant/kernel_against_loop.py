"""Holds the kernels to the definitions by Triton's interpreter, which must be chosen before Triton is imported.

Run by test_kernels.py in a process of its own; prints the share of integers that differ, case by case.
"""

from __future__ import annotations

import torch

from quant import gptq, gptq_block
from quant.config import Grid
from quant.gptq_kernel import round_block
from quant.grid import Levels, _search_by_kernel, as_groups, search_levels
from quant.rtn import diagonal_importance

from .test_algorithms import BF16, make_case

CASES = [  # outputs, inputs (the last block is not whole), grid
    (20, 192, Grid(group_size=32)),
    (16, 128, Grid(group_size=64, symmetric=True)),
    (8, 192, Grid(bits=8, group_size=64, symmetric=True)),
]


def differing(n: int, k: int, grid: Grid) -> float:
    """Share of the integers of a whole solve that the kernel sets otherwise than the loop."""
    w_NK, _, gram_KK = make_case(n=n, k=k)
    levels = search_levels(as_groups(w_NK, grid), grid, BF16, None)
    order_K = torch.argsort(gram_KK.diagonal(), descending=True, stable=True)
    factor_KK = gptq.inverse_factor(gram_KK[order_K][:, order_K], 0.01)

    def solve() -> torch.Tensor:
        return gptq._solve(w_NK.t()[order_K].contiguous(), factor_KK, levels, order_K // grid.group_size, grid)

    plain_KN, levels_GN = solve(), (levels.scale_NG.t().contiguous(), levels.zero_NG.t().contiguous())
    gptq.rounder = lambda *_: lambda block, q_BN: round_block(*block, *levels_GN, grid.max_level, q_BN)
    try:
        return float((solve() != plain_KN).float().mean())
    finally:
        gptq.rounder = gptq_block.rounder


def differing_ranges(n: int, k: int, grid: Grid, weighed: bool) -> float:
    """Share of the groups of which the kernel chooses another range than the plain search."""
    w_NK, _, gram_KK = make_case(n=n, k=k)
    importance = diagonal_importance(gram_KK.diagonal(), grid) if weighed else None
    w_NGS = as_groups(w_NK, grid)
    w_NGS[0, 0] = 0  # a group without a range
    plain: Levels = search_levels(w_NGS, grid, BF16, importance)
    kernel = _search_by_kernel(w_NGS, grid, BF16, importance)
    same = (kernel.scale_NG == plain.scale_NG) & (kernel.zero_NG == plain.zero_NG)
    return float((~same).float().mean())


if __name__ == "__main__":
    for case in CASES:
        print(differing(*case), differing_ranges(*case, weighed=True), differing_ranges(*case, weighed=False))
