"""GPTQ inside one block of channels: each is rounded, its error goes onto the later ones of the block.

One result by three ways: a plain loop (the CPU), a Triton kernel (CUDA), and the plain loop as a CUDA graph where
Triton cannot be had.

Legend: N outputs, B channels of a block in visiting order, G groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from quant.grid import Levels
from quant.kernels import works

BLOCK = 128  # channels whose error is spread at once to all later channels


class Block(NamedTuple):
    """A run of channels, with the group of each and the diagonal block of the inverse's factor."""

    w_BN: Tensor
    group_B: Tensor
    factor_BB: Tensor


Rounder = Callable[[Block, Tensor], Tensor]
"""(block, q_BN) -> weighted errors [B, N]. Consumes the weights, writes the integers to q_BN."""


def rounder(levels: Levels, max_level: int) -> Rounder:
    """The fastest way to round blocks of a weight with these levels, on the device they are on."""
    scale_GN, zero_GN = levels.scale_NG.t().contiguous(), levels.zero_NG.t().contiguous()
    if not scale_GN.is_cuda:
        return functools.partial(round_plainly, scale_GN, zero_GN, max_level)
    if works("GPTQ", lambda: _try_kernel(scale_GN.device)):
        from quant.gptq_kernel import round_block

        return lambda block, q_BN: round_block(*block, scale_GN, zero_GN, max_level, q_BN)
    return GraphedBlock(scale_GN, zero_GN, max_level)


def round_plainly(scale_GN: Tensor, zero_GN: Tensor, max_level: int, block: Block, q_BN: Tensor) -> Tensor:
    """The definition, as a loop over rows of memory."""
    w_BN, group_B, factor_BB = block
    scale_BN, zero_BN, error_BN = scale_GN[group_B], zero_GN[group_B], torch.empty_like(w_BN)
    for j in range(w_BN.shape[0]):
        q_N = ((w_BN[j] / scale_BN[j]).round_() + zero_BN[j]).clamp_(0, max_level)
        q_BN[j] = q_N
        error_N = (w_BN[j] - (q_N - zero_BN[j]) * scale_BN[j]) / factor_BB[j, j]
        error_BN[j] = error_N
        w_BN[j + 1 :].addr_(factor_BB[j, j + 1 :], error_N, alpha=-1)
    return error_BN


class GraphedBlock:
    """`round_plainly` as one CUDA graph: a thousand tiny kernels a block cost more to launch than to run."""

    def __init__(self, scale_GN: Tensor, zero_GN: Tensor, max_level: int) -> None:
        device, n = scale_GN.device, scale_GN.shape[1]
        self._round = functools.partial(round_plainly, scale_GN, zero_GN, max_level)
        w_BN, factor_BB = torch.ones(BLOCK, n, device=device), torch.ones(BLOCK, BLOCK, device=device)
        self._block = Block(w_BN, torch.zeros(BLOCK, dtype=torch.int64, device=device), factor_BB)
        self._q_BN = torch.empty_like(w_BN)
        self._round(self._block, self._q_BN)  # kernels must be loaded before they are captured
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # another thread reads ahead meanwhile
            self._error_BN = self._round(self._block, self._q_BN)

    def __call__(self, block: Block, q_BN: Tensor) -> Tensor:
        """The errors are overwritten by the next call."""
        if block.w_BN.shape[0] != BLOCK:  # the last one
            return self._round(block, q_BN)
        for mine, theirs in zip(self._block, block, strict=True):
            mine.copy_(theirs)
        self._graph.replay()
        q_BN.copy_(self._q_BN)
        return self._error_BN


def _try_kernel(device: torch.device) -> None:
    from quant.gptq_kernel import round_block  # imports Triton, which is not everywhere

    w_BN, factor_BB = torch.ones(BLOCK, 32, device=device), torch.ones(BLOCK, BLOCK, device=device)
    group_B, level_GN = torch.zeros(BLOCK, dtype=torch.int64, device=device), w_BN[:1].clone()
    round_block(w_BN, group_B, factor_BB, level_GN, level_GN, 15, torch.empty_like(w_BN))
