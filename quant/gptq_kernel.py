"""The inner loop of GPTQ over a block of channels as one Triton kernel; `gptq_block` says what it computes.

A program holds B channels x _OUTPUTS outputs in the registers of one warp and goes through the channels in order, so a
block costs one launch and reads its weights once. Outputs do not depend on each other. The arithmetic is that of the
plain loop, step by step: divisions rounded as IEEE wants, ties to the even integer, and (integer - zero) * scale is
exact in float32, as stored scales have at most 11 bits.

Legend: N outputs, B channels of a block, G groups.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_OUTPUTS = 16  # of a program: 16 x 128 weights are 64 registers of each thread of a warp


@triton.jit
def _round_block_kernel(  # type: ignore[no-untyped-def]  # Triton's parameters have no types of Python
    w_BN,
    scale_GN,
    zero_GN,
    group_B,
    factor_BB,
    q_BN,
    error_BN,
    outputs,
    max_level,
    CHANNELS: tl.constexpr,
    ROOM: tl.constexpr,
    OUTPUTS: tl.constexpr,
    NEAREST: tl.constexpr,
):
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    channel = tl.arange(0, ROOM)  # a power of two
    real = output < outputs
    w = tl.load(
        w_BN + channel[:, None] * outputs + output[None, :],
        mask=(channel < CHANNELS)[:, None] & real[None, :],
        other=0.0,
    )
    for j in range(CHANNELS):
        group = tl.load(group_B + j)
        scale = tl.load(scale_GN + group * outputs + output, mask=real, other=1.0)
        zero = tl.load(zero_GN + group * outputs + output, mask=real, other=0.0)
        later = (channel > j) & (channel < CHANNELS)
        factor = tl.load(factor_BB + j * CHANNELS + channel, mask=later, other=0.0)
        pivot = tl.load(factor_BB + j * CHANNELS + j)
        w_j = tl.sum(tl.where((channel == j)[:, None], w, 0.0), 0)
        q = (tl.div_rn(w_j, scale) + NEAREST) - NEAREST + zero
        q = tl.minimum(tl.maximum(q, 0.0), max_level)
        error = tl.div_rn(w_j - (q - zero) * scale, pivot)
        tl.store(q_BN + j * outputs + output, q, mask=real)
        tl.store(error_BN + j * outputs + output, error, mask=real)
        w -= factor[:, None] * error[None, :]


def round_block(
    w_BN: Tensor,
    group_B: Tensor,
    factor_BB: Tensor,
    scale_GN: Tensor,
    zero_GN: Tensor,
    max_level: int,
    q_BN: Tensor,
) -> Tensor:
    """Write the block's integers to q_BN and return its weighted errors [B, N].

    w_BN and q_BN must be contiguous. Raises what `kernels.works` expects of a kernel.
    """
    assert w_BN.is_contiguous() and q_BN.is_contiguous()
    channels, outputs = w_BN.shape
    error_BN = w_BN.new_empty(w_BN.shape)
    _round_block_kernel[(triton.cdiv(outputs, _OUTPUTS),)](
        w_BN,
        scale_GN,
        zero_GN,
        group_B,
        factor_BB.contiguous(),  # a solver's result lies by columns
        q_BN,
        error_BN,
        outputs,
        float(max_level),
        CHANNELS=channels,
        ROOM=triton.next_power_of_2(channels),
        OUTPUTS=_OUTPUTS,
        NEAREST=1.5 * 2**23,  # adding it leaves no fraction: float32 rounds to the nearest integer, ties to even
        num_warps=1,
    )
    return error_BN
