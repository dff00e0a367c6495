"""The losses, as pure functions of log-probabilities. Each gives one value a pair or example; the caller averages.

P pairs; `chosen` and `rejected` are summed log-probabilities of an answer unless said otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class PairLoss(NamedTuple):
    """Per pair: the loss, and the implicit rewards that tell how training goes (no gradient)."""

    loss_P: torch.Tensor
    chosen_reward_P: torch.Tensor
    rejected_reward_P: torch.Tensor


def dpo(
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    reference_chosen_P: torch.Tensor,
    reference_rejected_P: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PairLoss:
    """Direct preference optimisation (sigmoid; conservative where label_smoothing > 0)."""
    chosen_reward = beta * (chosen_P - reference_chosen_P)
    rejected_reward = beta * (rejected_P - reference_rejected_P)
    margin = chosen_reward - rejected_reward
    loss = -F.logsigmoid(margin) * (1 - label_smoothing) - F.logsigmoid(-margin) * label_smoothing
    return PairLoss(loss, chosen_reward.detach(), rejected_reward.detach())


def orpo(chosen_mean_P: torch.Tensor, rejected_mean_P: torch.Tensor, *, beta: float) -> PairLoss:
    """Odds-ratio preference optimisation, from log-probabilities averaged over the answer's tokens."""
    log_odds = (chosen_mean_P - rejected_mean_P) - (_log1m_exp(chosen_mean_P) - _log1m_exp(rejected_mean_P))
    loss = -chosen_mean_P - beta * F.logsigmoid(log_odds)
    return PairLoss(loss, beta * chosen_mean_P.detach(), beta * rejected_mean_P.detach())


def simpo(chosen_mean_P: torch.Tensor, rejected_mean_P: torch.Tensor, *, beta: float, gamma: float) -> PairLoss:
    """Simple preference optimisation, from log-probabilities averaged over the answer's tokens."""
    loss = -F.logsigmoid(beta * (chosen_mean_P - rejected_mean_P) - gamma)
    return PairLoss(loss, beta * chosen_mean_P.detach(), beta * rejected_mean_P.detach())


def _log1m_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0; finite gradient at 0 by holding x away from it."""
    return torch.log1p(-torch.exp(x.clamp(max=-1e-6)))
