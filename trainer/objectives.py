"""What a training method asks of a packed row: the bridge from per-token log-probabilities to a loss of `losses.py`.

An objective is handed to `Learner.forward_backward`. `Linear` ones are a weighted sum of log-probabilities known before
the forward pass; `PerToken` ones are any function of them.
"""

from __future__ import annotations

from typing import Protocol

import torch

from trainer import losses
from trainer.config import DpoConfig, KtoConfig, OrpoConfig, SimpoConfig, TrainConfig
from trainer.dataset import TokenDataset
from trainer.pack import PackedBatch

Metrics = dict[str, torch.Tensor]  # sums over the row; divided by the batch's normaliser when reported


class PerToken(Protocol):
    """A loss of per-token log-probabilities."""

    needs_reference: bool
    sequences_per_example: int  # of a row that must stay together

    def loss(
        self, logprobs_K: torch.Tensor, reference_K: torch.Tensor | None, batch: PackedBatch
    ) -> tuple[torch.Tensor, Metrics]:
        """The summed loss of the row, and sums to report."""


class OfExamples(Protocol):
    """A method whose answers lie in a dataset."""

    def normaliser(self, dataset: TokenDataset, examples: list[int]) -> float:
        """What the summed loss of a whole optimizer batch is divided by; known on the host, before any forward."""


class Sft:
    """Linear: the negative log-likelihood of the targets, by weight. `Learner` takes the fused way for it."""

    needs_reference = False
    sequences_per_example = 1

    def normaliser(self, dataset: TokenDataset, examples: list[int]) -> float:
        """The total weight of the batch: every token counts the same, however the batch is split."""
        return sum(dataset.weight(example) for example in examples)


class _Pairs:
    """Rows hold chosen and rejected of each pair, one after the other."""

    needs_reference = False
    sequences_per_example = 2

    def normaliser(self, dataset: TokenDataset, examples: list[int]) -> float:
        """Pairs in the batch."""
        return float(len(examples))

    def loss(
        self, logprobs_K: torch.Tensor, reference_K: torch.Tensor | None, batch: PackedBatch
    ) -> tuple[torch.Tensor, Metrics]:
        """Sum over the pairs of the row."""
        pair = self._pair_loss(logprobs_K, reference_K, batch)
        margin = pair.chosen_reward_P - pair.rejected_reward_P
        return pair.loss_P.sum(), {
            "reward_margin": margin.sum(),
            "reward_accuracy": (margin > 0).float().sum(),
            "reward_chosen": pair.chosen_reward_P.sum(),
            "reward_rejected": pair.rejected_reward_P.sum(),
        }

    def _pair_loss(
        self, logprobs_K: torch.Tensor, reference_K: torch.Tensor | None, batch: PackedBatch
    ) -> losses.PairLoss:
        raise NotImplementedError


class Dpo(_Pairs):
    """Against the frozen base: the same model with the adapter off."""

    needs_reference = True

    def __init__(self, beta: float, label_smoothing: float) -> None:
        self._beta, self._label_smoothing = beta, label_smoothing

    def _pair_loss(
        self, logprobs_K: torch.Tensor, reference_K: torch.Tensor | None, batch: PackedBatch
    ) -> losses.PairLoss:
        assert reference_K is not None
        policy, reference = batch.sum_by_sequence(logprobs_K), batch.sum_by_sequence(reference_K)
        return losses.dpo(
            policy[0::2],
            policy[1::2],
            reference[0::2],
            reference[1::2],
            beta=self._beta,
            label_smoothing=self._label_smoothing,
        )


class Orpo(_Pairs):
    """No reference."""

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def _pair_loss(
        self, logprobs_K: torch.Tensor, reference_K: torch.Tensor | None, batch: PackedBatch
    ) -> losses.PairLoss:
        mean = _mean_by_sequence(logprobs_K, batch)
        return losses.orpo(mean[0::2], mean[1::2], beta=self._beta)


class Simpo(_Pairs):
    """No reference."""

    def __init__(self, beta: float, gamma: float) -> None:
        self._beta, self._gamma = beta, gamma

    def _pair_loss(
        self, logprobs_K: torch.Tensor, reference_K: torch.Tensor | None, batch: PackedBatch
    ) -> losses.PairLoss:
        mean = _mean_by_sequence(logprobs_K, batch)
        return losses.simpo(mean[0::2], mean[1::2], beta=self._beta, gamma=self._gamma)


class Kto:
    """Single answers, good or bad, against the frozen base. `source.LabelledExamples` sets `kl` for each batch."""

    needs_reference = True
    sequences_per_example = 1

    def __init__(self, beta: float, desirable_weight: float, undesirable_weight: float) -> None:
        self._beta, self._weights = beta, (desirable_weight, undesirable_weight)
        self.kl: torch.Tensor  # on the device of the rows

    def normaliser(self, dataset: TokenDataset, examples: list[int]) -> float:
        """Answers in the batch."""
        return float(len(examples))

    def loss(
        self, logprobs_K: torch.Tensor, reference_K: torch.Tensor | None, batch: PackedBatch
    ) -> tuple[torch.Tensor, Metrics]:
        """Sum over the answers of the row."""
        assert reference_K is not None
        desirable_S = batch.columns["desirable_S"]
        loss_S, reward_S = losses.kto(
            batch.sum_by_sequence(logprobs_K),
            batch.sum_by_sequence(reference_K),
            desirable_S,
            self.kl,
            beta=self._beta,
            desirable_weight=self._weights[0],
            undesirable_weight=self._weights[1],
        )
        sign_S = desirable_S.float() * 2 - 1
        return loss_S.sum(), {"reward_margin": (reward_S * sign_S).sum(), "kl": self.kl * batch.sequences}


class Grpo:
    """Sampled answers with an advantage each; a target's weight is its share in the mean (`rollout.py`)."""

    sequences_per_example = 1

    def __init__(self, beta: float, clip_low: float, clip_high: float) -> None:
        self.needs_reference = beta > 0
        self._beta, self._clip = beta, (clip_low, clip_high)

    def loss(
        self, logprobs_K: torch.Tensor, reference_K: torch.Tensor | None, batch: PackedBatch
    ) -> tuple[torch.Tensor, Metrics]:
        """Weighted sum over the tokens of the row."""
        policy = losses.clipped_policy(
            logprobs_K,
            batch.columns["sampled_K"],
            batch.columns["advantage_K"],
            clip_low=self._clip[0],
            clip_high=self._clip[1],
        )
        loss_K, weights_K = policy.loss_K, batch.weights_K
        metrics = {
            "clipped": (policy.clipped_K * weights_K).sum(),
            "sampler_gap": ((logprobs_K.detach() - batch.columns["sampled_K"]).abs() * weights_K).sum(),
        }
        if reference_K is not None:
            kl_K = losses.kl_to_reference(logprobs_K, reference_K, batch.columns["sampled_K"])
            loss_K = loss_K + self._beta * kl_K
            metrics["kl"] = (kl_K.detach() * weights_K).sum()
        return (loss_K * weights_K).sum(), metrics


def objective_for(config: TrainConfig) -> Sft | Dpo | Orpo | Simpo | Kto:
    """The objective of a method whose answers lie in a dataset."""
    if isinstance(config, DpoConfig):
        return Dpo(config.beta, config.label_smoothing)
    if isinstance(config, OrpoConfig):
        return Orpo(config.beta)
    if isinstance(config, SimpoConfig):
        return Simpo(config.beta, config.gamma)
    if isinstance(config, KtoConfig):
        return Kto(config.beta, config.desirable_weight, config.undesirable_weight)
    return Sft()


def _mean_by_sequence(logprobs_K: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    return batch.sum_by_sequence(logprobs_K) / batch.sum_by_sequence(torch.ones_like(logprobs_K))
