"""Log-probabilities of target tokens without the [tokens, vocabulary] matrix: a chunk of rows at a time.

Only rows with a target meet the vocabulary matrix at all. `target_logprobs` is the general primitive (its backward
computes each chunk again); `weighted_nll` is the special case of a loss linear in the log-probabilities, whose gradient
is known while the chunk is at hand, so nothing is computed twice.

Shapes: K targets, C rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

_CHUNK_ELEMENTS = 2**26  # of [C, V] in float32: 256 MiB
_CHUNK_ROWS_CUDA = 1024  # at least: fewer leave most of a large GPU idle in the product with W


def target_logprobs(hidden_KH: torch.Tensor, head_VH: torch.Tensor, targets_K: torch.Tensor) -> torch.Tensor:
    """log p(target) of each row, float32 [K], differentiable in `hidden` and `head`."""
    logprobs_K: torch.Tensor = _TargetLogprobs.apply(hidden_KH, head_VH, targets_K)
    return logprobs_K


def weighted_nll(
    hidden_KH: torch.Tensor, head_VH: torch.Tensor, targets_K: torch.Tensor, weights_K: torch.Tensor
) -> torch.Tensor:
    """-sum(weight * log p(target)), a float32 scalar, differentiable in `hidden` and `head`."""
    loss: torch.Tensor = _WeightedNll.apply(hidden_KH, head_VH, targets_K, weights_K)
    return loss


@torch.no_grad()
def score_targets(
    hidden_KH: torch.Tensor, head_VH: torch.Tensor, targets_K: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p(target) [K], whether the target is the likeliest token [K]). No gradient."""
    logprobs_K = torch.empty(len(targets_K), device=hidden_KH.device)
    greedy_K = torch.empty(len(targets_K), dtype=torch.bool, device=hidden_KH.device)
    for rows, rounded_CV in _chunks(hidden_KH, head_VH):
        logits_CV = rounded_CV.float()
        logprobs_K[rows] = _gather(logits_CV, targets_K[rows]) - logits_CV.logsumexp(-1)
        greedy_K[rows] = logits_CV.argmax(-1) == targets_K[rows]
    return logprobs_K, greedy_K


class _TargetLogprobs(torch.autograd.Function):
    """Keeps the hidden states and one float a row."""

    @staticmethod
    def forward(ctx: Any, hidden_KH: torch.Tensor, head_VH: torch.Tensor, targets_K: torch.Tensor) -> torch.Tensor:
        normaliser_K = torch.empty(len(targets_K), device=hidden_KH.device)
        logprobs_K = torch.empty_like(normaliser_K)
        for rows, rounded_CV in _chunks(hidden_KH, head_VH):
            logits_CV = rounded_CV.float()
            normaliser_K[rows] = logits_CV.logsumexp(-1)
            logprobs_K[rows] = _gather(logits_CV, targets_K[rows]) - normaliser_K[rows]
        ctx.save_for_backward(hidden_KH, head_VH, targets_K, normaliser_K)
        return logprobs_K

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden_KH, head_VH, targets_K, normaliser_K = ctx.saved_tensors
        gradient = _HeadGradient(hidden_KH, head_VH, ctx.needs_input_grad[1])
        for rows, logits_CV in _chunks(hidden_KH, head_VH):
            scale_C = -grads[0][rows]
            delta_CV = logits_CV.float().sub_(normaliser_K[rows, None]).exp_().mul_(scale_C[:, None])
            gradient.add(rows, delta_CV.scatter_add_(1, targets_K[rows, None], -scale_C[:, None]).to(head_VH.dtype))
        return gradient.hidden_KH, gradient.head_VH, None


class _WeightedNll(torch.autograd.Function):
    """Keeps the finished gradient in place of what would be needed to compute it."""

    @staticmethod
    def forward(
        ctx: Any, hidden_KH: torch.Tensor, head_VH: torch.Tensor, targets_K: torch.Tensor, weights_K: torch.Tensor
    ) -> torch.Tensor:
        loss = torch.zeros((), device=hidden_KH.device)
        gradient = _HeadGradient(hidden_KH, head_VH, ctx.needs_input_grad[1])
        nll = _nll_of_chunk(hidden_KH.is_cuda)
        for rows, logits_CV in _chunks(hidden_KH, head_VH):
            chunk_loss, delta_CV = nll(logits_CV, targets_K[rows], weights_K[rows])
            loss += chunk_loss
            gradient.add(rows, delta_CV)
        ctx.save_for_backward(gradient.hidden_KH, gradient.head_VH)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        hidden_KH, head_VH = ctx.saved_tensors
        return hidden_KH * grads[0], None if head_VH is None else head_VH * grads[0], None, None


class _HeadGradient:
    """Accumulates d(-sum(scale * log p)) over chunks: `delta`, scale * (probabilities - onehot(target)), through W."""

    def __init__(self, hidden_KH: torch.Tensor, head_VH: torch.Tensor, train_head: bool) -> None:
        self._inputs_KH, self._weight_VH = hidden_KH, head_VH
        self.hidden_KH = torch.empty_like(hidden_KH)
        self.head_VH = torch.zeros_like(head_VH) if train_head else None

    def add(self, rows: slice, delta_CV: torch.Tensor) -> None:
        """Take in one chunk."""
        self.hidden_KH[rows] = delta_CV @ self._weight_VH
        if self.head_VH is not None:
            self.head_VH += delta_CV.T @ self._inputs_KH[rows]


@cache
def _nll_of_chunk(on_cuda: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    # Compiled it reads the logits twice and writes the delta once; step by step it would be a dozen passes in float32.
    return torch.compile(_nll, dynamic=True) if on_cuda else _nll


def _nll(
    logits_CV: torch.Tensor, targets_C: torch.Tensor, weights_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk's weighted loss, and its gradient by the logits in their type."""
    logits = logits_CV.float()
    normaliser_C = logits.logsumexp(-1)
    loss = (weights_C * (normaliser_C - _gather(logits, targets_C))).sum()
    is_target_CV = torch.arange(logits.shape[1], device=logits.device) == targets_C[:, None]
    delta_CV = ((logits - normaliser_C[:, None]).exp() - is_target_CV.float()) * weights_C[:, None]
    return loss, delta_CV.to(logits_CV.dtype)


def _chunks(hidden_KH: torch.Tensor, head_VH: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows, and their logits [C, V]."""
    size = max(_CHUNK_ROWS_CUDA if head_VH.is_cuda else 1, _CHUNK_ELEMENTS // head_VH.shape[0])
    for first in range(0, len(hidden_KH), size):
        rows = slice(first, first + size)
        yield rows, hidden_KH[rows] @ head_VH.T


def _gather(logits_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    return logits_CV.gather(1, targets_C[:, None])[:, 0]
