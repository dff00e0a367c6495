"""Causal attention over a row of several sequences, registered with transformers under the name NAME.

On CUDA one variable-length flash kernel does the row, or on Hopper cuDNN's where all sequences are of one length (half
the time); elsewhere each sequence goes through SDPA by itself. None builds a mask, so the cost is the sum of the
squares of the lengths, not the square of the sum.

Shapes: H query heads, G key/value heads, T tokens, D head size, in the order transformers hands them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from trainer.errors import ModelError
from trainer.pack import Segments

NAME = "tunegate_packed"

# Newer versions of torch want to be told that key heads may be fewer than query heads; older ones take it as it is.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

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
        if segments.uniform and sliding_window is None and query_1HTD.shape[-1] in (64, 128):
            return _dense(query_1HTD, key_1GTD, value_1GTD, segments, scaling), None
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
            **_GROUPED,
        )
        return out_THD[None], None
    return _by_sequence(query_1HTD, key_1GTD, value_1GTD, segments.lengths, scaling, sliding_window), None


def _dense(
    query_1HTD: torch.Tensor, key_1GTD: torch.Tensor, value_1GTD: torch.Tensor, segments: Segments, scale: float | None
) -> torch.Tensor:
    """Sequences of one length as a batch, through cuDNN."""
    shape = (segments.offsets_S1.shape[0] - 1, segments.longest)
    query, key, value = (x[0].unflatten(1, shape).transpose(0, 1) for x in (query_1HTD, key_1GTD, value_1GTD))
    out_SHLD = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, True, False, scale=scale
    )[0]
    out: torch.Tensor = out_SHLD.transpose(1, 2).flatten(0, 1)[None]
    return out


@torch.compiler.disable  # compiled code would be made anew for every set of lengths
def _by_sequence(
    query_1HTD: torch.Tensor,
    key_1GTD: torch.Tensor,
    value_1GTD: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    queries, keys, values = (x.split(lengths, dim=2) for x in (query_1HTD, key_1GTD, value_1GTD))
    pieces = [
        _one_sequence(query, key, value, scale, window) for query, key, value in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2)


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
