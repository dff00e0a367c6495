"""The primitive that every method stands on: `forward_backward(objective)` on packed rows, then `optim_step`.

Nothing here makes the host wait for the device: losses, norms and the decision to skip a non-finite step stay there,
and come back as tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer import ranks, sharding
from trainer.logprobs import score_targets, target_logprobs, weighted_nll
from trainer.lora import LoraAdapter
from trainer.model import BaseModel
from trainer.objectives import Metrics, PerToken, Sft
from trainer.pack import PackedBatch


class Learner:
    """A model, what of it is trained, and the optimizer."""

    def __init__(self, base: BaseModel, adapter: LoraAdapter | None, *, weight_decay: float) -> None:
        self.base = base
        self.adapter = adapter
        self.parameters: dict[str, nn.Parameter] = dict(adapter.parameters() if adapter else _all(base.model))
        # What the optimizer of this process steps: the parameters themselves, or its parts of sharded ones.
        self.own = {name: sharding.own(parameter) for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.own.values(), lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay, fused=True
        )

    def forward_backward(self, batch: PackedBatch, objective: Sft | PerToken, normaliser: float) -> Metrics:
        """Add the row's share of the gradient; the sums to report, `loss` among them, already divided."""
        self.set_mode(training=True)
        needs_reference = not isinstance(objective, Sft) and objective.needs_reference
        reference_K = self.reference(batch) if needs_reference else None
        hidden_KH = self.base.hidden_KH(batch)
        loss, metrics = loss_of(hidden_KH, self.base.head_VH, reference_K, batch, objective, normaliser)
        loss.backward()
        return metrics

    def optim_step(self, learning_rate: float, max_grad_norm: float) -> Metrics:
        """Clip, step, clear. A step with non-finite gradients changes nothing and is counted in `skipped`."""
        norm = self._sum_gradients()
        skipped = (~norm.isfinite()).float()
        torch.nn.utils.clip_grads_with_norm_(self.own.values(), max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # The fused kernel reads this on the device and leaves weights and moments alone where it is 1.
        self.optimizer.found_inf = skipped
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "skipped": skipped}

    def _sum_gradients(self) -> torch.Tensor:
        """Have the gradients of all processes where the optimizer looks for them; their norm over the whole model."""
        whole = {name: p for name, p in self.parameters.items() if not sharding.is_sharded(p)}
        ranks.sum_gradients(whole.values())
        gradients = [p.grad for p in whole.values() if p.grad is not None]
        norm = torch.zeros((), device=self.base.device)  # where torch's own norm of nothing is on the host
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients)
        parts = []
        for name, parameter in self.parameters.items():
            if name in whole:
                continue
            part = self.own[name]  # of a gradient that is summed already
            assert parameter.grad is not None
            part.data, part.grad = sharding.local(parameter.detach()), sharding.local(parameter.grad)
            parameter.grad = None
            parts.append(part.grad)
        if parts:
            norm = (norm**2 + ranks.total(torch.nn.utils.get_total_norm(parts) ** 2)).sqrt()
        return norm

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch, objective: Sft | PerToken) -> Metrics:
        """Sums over the row: `loss` as in training, and for SFT right tokens and wholly right sequences."""
        self.set_mode(training=False)
        hidden_KH = self.base.hidden_KH(batch)
        logprobs_K, greedy_K = score_targets(hidden_KH, self.base.head_VH, batch.targets_K)
        if not isinstance(objective, Sft):
            reference_K = self.reference(batch) if objective.needs_reference else None
            loss, metrics = objective.loss(logprobs_K, reference_K, batch)
            return {"loss": loss, **metrics}
        # Every target likeliest given the ones before it: greedy decoding would give exactly this answer.
        missed_S = batch.sum_by_sequence((~greedy_K).float())
        return {
            "loss": -(logprobs_K * batch.weights_K).sum(),
            "token_accuracy": greedy_K.float().sum(),
            "exact_match": (missed_S == 0).float().sum(),
        }

    def score(self, batch: PackedBatch) -> torch.Tensor:
        """log p of each target of the row, float32 [K]. No gradient."""
        self.set_mode(training=False)
        return self._logprobs(batch)

    def reference(self, batch: PackedBatch) -> torch.Tensor:
        """The same by the base model: with the adapter off."""
        assert self.adapter is not None, "the reference is the base with the adapter off"
        with self.adapter.mix.spans():
            return self._logprobs(batch)

    def set_mode(self, *, training: bool) -> None:
        """Make the model this learner's, to train or to answer."""
        if self.adapter is not None:
            self.adapter.activate()
        if self.base.model.training != training:  # walking all modules for nothing would cost every row
            self.base.model.train(training)

    @torch.no_grad()
    def _logprobs(self, batch: PackedBatch) -> torch.Tensor:
        return score_targets(self.base.hidden_KH(batch), self.base.head_VH, batch.targets_K)[0]


def loss_of(
    hidden_KH: torch.Tensor,
    head_VH: torch.Tensor,
    reference_K: torch.Tensor | None,
    batch: PackedBatch,
    objective: Sft | PerToken,
    normaliser: float,
) -> tuple[torch.Tensor, Metrics]:
    """The row's share of the loss, and the sums to report, `loss` among them; both divided by the normaliser."""
    if isinstance(objective, Sft):
        loss = weighted_nll(hidden_KH, head_VH, batch.targets_K, batch.weights_K / normaliser)
        return loss, {"loss": loss.detach()}
    summed, metrics = objective.loss(target_logprobs(hidden_KH, head_VH, batch.targets_K), reference_K, batch)
    loss = summed / normaliser
    return loss, {"loss": loss.detach()} | {name: value / normaliser for name, value in metrics.items()}


def _all(model: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
