"""Causal attention over a row of several sequences, registered with transformers under the name NAME.

On CUDA one variable-length flash kernel does the row; elsewhere each sequence goes through SDPA by itself. Neither
builds a mask, so the cost is the sum of the squares of the lengths, not the square of the sum.

Shapes: H query heads, G key/value heads, T tokens, D head size, in the order transformers hands them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from trainer.errors import ModelError
from trainer.pack import Segments

NAME = "tunegate_packed"

# What some models ask of their attention and these kernels do not do.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each segment, as [1, T, H, D]. Raises ModelError for a kind of attention it cannot do."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ModelError(f"{type(module).__name__} needs attention with `{name}`, which the trainer cannot do yet")
    assert attention_mask is None
    if query_1HTD.is_cuda and query_1HTD.dtype in (torch.bfloat16, torch.float16):
        query, key, value = (x[0].transpose(0, 1) for x in (query_1HTD, key_1GTD, value_1GTD))
        out_THD = varlen_attn(
            query,
            key,
            value,
            segments.offsets_S1,
            segments.offsets_S1,
            segments.longest,
            segments.longest,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out_THD[None], None
    queries, keys, values = (x.split(segments.lengths, dim=2) for x in (query_1HTD, key_1GTD, value_1GTD))
    pieces = [
        _one_sequence(query, key, value, scaling, sliding_window)
        for query, key, value in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


def _one_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, window: int | None
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    length = query.shape[2]
    if window is None or window >= length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    behind = torch.arange(length, device=query.device)
    distance = behind[:, None] - behind[None, :]
    mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)


AttentionInterface.register(NAME, packed_attention)
