"""The losses, as pure functions of log-probabilities: one value a pair, example or token; the caller averages.

P pairs, S examples, K tokens; log-probabilities of pairs and examples are summed over an answer unless said otherwise.
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


def kto(
    policy_S: torch.Tensor,
    reference_S: torch.Tensor,
    desirable_S: torch.Tensor,
    kl: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kahneman-Tversky optimisation (arXiv 2402.01306): (loss, implicit reward without gradient) of each example.

    desirable_S: bool. kl: how far the policy is from the reference on answers that do not belong to their prompts.
    """
    log_ratio_S = policy_S - reference_S
    good_S = desirable_weight * (1 - torch.sigmoid(beta * (log_ratio_S - kl)))
    bad_S = undesirable_weight * (1 - torch.sigmoid(beta * (kl - log_ratio_S)))
    return torch.where(desirable_S, good_S, bad_S), beta * log_ratio_S.detach()


class PolicyLoss(NamedTuple):
    """Per token: the loss, and whether clipping took its gradient away."""

    loss_K: torch.Tensor
    clipped_K: torch.Tensor


def clipped_policy(
    logprobs_K: torch.Tensor,
    sampled_K: torch.Tensor,
    advantage_K: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """The clipped importance-weighted policy gradient of PPO and GRPO (arXiv 2402.03300, equation 3).

    sampled_K: log-probabilities by which the tokens were drawn, so that a sampler behind by a step is corrected for.
    """
    ratio_K = torch.exp(logprobs_K - sampled_K)
    within_K = ratio_K.clamp(1 - clip_low, 1 + clip_high)
    loss_K = -torch.minimum(ratio_K * advantage_K, within_K * advantage_K)
    low_K, high_K = (ratio_K < 1 - clip_low) & (advantage_K < 0), (ratio_K > 1 + clip_high) & (advantage_K > 0)
    return PolicyLoss(loss_K, (low_K | high_K).float())


def kl_to_reference(logprobs_K: torch.Tensor, reference_K: torch.Tensor, sampled_K: torch.Tensor) -> torch.Tensor:
    """KL(policy | reference) a token: Schulman's k3 estimate, weighted by the ratio to the sampler.

    Without that weight the gradient is biased once the policy has left the sampler (arXiv 2512.02556, section 3.1).
    """
    difference_K = reference_K - logprobs_K
    return (torch.exp(difference_K) - difference_K - 1) * torch.exp(logprobs_K - sampled_K)


def _log1m_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0; finite gradient at 0 by holding x away from it."""
    return torch.log1p(-torch.exp(x.clamp(max=-1e-6)))
