"""The search for each group's clipped range as one Triton kernel; `grid.search_levels` says what it computes.

A program reads some groups once, and tries all ranges on them in registers; the plain way passes over the weight a
dozen times for every range. Sums go in another order, so of two ranges equally good to the last bit either may win.

Legend: P groups of a weight (N * G), S group size, C candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_GROUPS = 16  # of a program


@triton.jit
def _search_kernel(  # type: ignore[no-untyped-def]  # Triton's parameters have no types of Python
    w_PS,
    weigh_GS,
    shrink_C,
    scale_P,
    zero_P,
    groups,
    groups_of_row,
    max_level,
    middle,
    nearest,
    CANDIDATES: tl.constexpr,
    SIZE: tl.constexpr,
    ROOM: tl.constexpr,
    GROUPS: tl.constexpr,
    WEIGHED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    member = tl.arange(0, ROOM)  # a power of two
    real = (group < groups)[:, None] & (member < SIZE)[None, :]
    w = tl.load(w_PS + group[:, None] * SIZE + member[None, :], mask=real, other=0.0)
    if WEIGHED:
        weigh = tl.load(weigh_GS + (group % groups_of_row)[:, None] * SIZE + member[None, :], mask=real, other=0.0)
    low = tl.minimum(tl.min(w, 1), 0.0)
    high = tl.maximum(tl.max(w, 1), 0.0)
    least = tl.full((GROUPS,), float("inf"), tl.float32)
    best_scale = tl.full((GROUPS,), 1.0, tl.float32)
    best_zero = tl.zeros((GROUPS,), tl.float32)
    for candidate in range(CANDIDATES):
        shrink = tl.load(shrink_C + candidate)
        if SYMMETRIC:
            full = tl.div_rn(tl.maximum(-(low * shrink), high * shrink), tl.zeros((GROUPS,), tl.float32) + (middle - 1))
        else:
            full = tl.div_rn(high * shrink - low * shrink, tl.zeros((GROUPS,), tl.float32) + max_level)
        scale = full.to(tl.float16).to(tl.float32)
        if BFLOAT16:
            bits = scale.to(tl.int32, bitcast=True)  # by hand: Triton's interpreter cuts off where devices round
            scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        scale = tl.where(scale > 0, scale, 1.0)
        if SYMMETRIC:
            zero = tl.zeros((GROUPS,), tl.float32) + middle
        else:
            zero = (tl.div_rn(-(low * shrink), scale) + nearest) - nearest
            zero = tl.minimum(tl.maximum(zero, 0.0), max_level)
        scales = tl.broadcast_to(scale[:, None], (GROUPS, ROOM))
        level = (tl.div_rn(w, scales) + nearest) - nearest
        level = tl.minimum(tl.maximum(level, -zero[:, None]), max_level - zero[:, None])
        delta = level * scales - w
        if WEIGHED:
            error = tl.sum(delta * delta * weigh, 1)
        else:
            error = tl.sum(delta * delta, 1)
        better = error < least
        least = tl.where(better, error, least)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    tl.store(scale_P + group, best_scale, mask=group < groups)
    tl.store(zero_P + group, best_zero, mask=group < groups)


def search(
    w_NGS: Tensor,
    weigh_GS: Tensor | None,
    shrink_C: Tensor,
    max_level: int,
    symmetric_middle: int | None,
    bfloat16: bool,
) -> tuple[Tensor, Tensor]:
    """(scales, zero points), both [N, G] float32, of the shares `shrink_C` of each group's range with the least error.

    weigh_GS: what each input's squared error counts, None for alike. symmetric_middle: the fixed zero point, None where
    it is free. Raises what `kernels.works` expects of a kernel.
    """
    n, groups_of_row, size = w_NGS.shape
    groups = n * groups_of_row
    scale_NG, zero_NG = w_NGS.new_empty(n, groups_of_row), w_NGS.new_empty(n, groups_of_row)
    _search_kernel[(triton.cdiv(groups, _GROUPS),)](
        w_NGS.contiguous(),
        None if weigh_GS is None else weigh_GS.contiguous(),
        shrink_C,
        scale_NG,
        zero_NG,
        groups,
        groups_of_row,
        float(max_level),
        float(symmetric_middle or 0),
        1.5 * 2**23,  # adding it leaves no fraction: float32 rounds to the nearest integer, ties to even
        CANDIDATES=shrink_C.numel(),
        SIZE=size,
        ROOM=triton.next_power_of_2(size),
        GROUPS=_GROUPS,
        WEIGHED=weigh_GS is not None,
        SYMMETRIC=symmetric_middle is not None,
        BFLOAT16=bfloat16,
        num_warps=4,
    )
    return scale_NG, zero_NG
