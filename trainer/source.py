"""What an optimizer step learns from: examples of a dataset here, answers sampled for the step in `rollout.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from trainer import ranks
from trainer.config import TrainConfig
from trainer.dataset import TokenDataset
from trainer.learner import Learner
from trainer.objectives import Dpo, Kto, OfExamples, Orpo, Sft, Simpo
from trainer.pack import PackedBatch, blank, collate, own_rows, pack_sequences
from trainer.schedule import DataOrder


class StepWork(NamedTuple):
    """One optimizer step: its rows, what their summed loss is divided by, and what the log should say beside."""

    batches: Iterator[PackedBatch]
    normaliser: float
    record: dict[str, Any]


class Source(Protocol):
    """Where the loop gets its work from. `step` may be called for any step, so that a run can be resumed."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""

    @property
    def longest_tokens(self) -> int:
        """The longest example: rows cannot be shorter."""

    def step(self, step: int) -> StepWork:
        """The work of step `step`, counted from 0. Raises TrainError."""


class Examples:
    """The examples of a dataset, in the order of the seed."""

    def __init__(self, config: TrainConfig, dataset: TokenDataset, objective: OfExamples, device: torch.device) -> None:
        self.dataset = dataset
        self._objective = objective
        self._config = config
        self._device = device
        self._order = DataOrder(len(dataset), config.batch_size, seed=config.seed, shuffle=config.shuffle)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return self._order.steps_per_epoch

    @property
    def longest_tokens(self) -> int:
        """The longest example of the dataset."""
        return self.dataset.meta.longest_tokens

    def step(self, step: int) -> StepWork:
        """The next examples of the epoch."""
        examples = self._order.batch(step)
        return StepWork(self.batches(examples), self.normaliser(examples), {})

    def normaliser(self, examples: list[int]) -> float:
        """What the summed loss over these examples is divided by."""
        return self._objective.normaliser(self.dataset, examples)

    def batches(self, examples: Sequence[int]) -> Iterator[PackedBatch]:
        """This process's share of the examples, as rows of at most the configured tokens; as many for each process."""
        lengths = [self.dataset.length_tokens(example) for example in examples]
        for group in self._own_rows(lengths, packing=self._config.packing):
            if group:
                yield self._row([examples[i] for i in group])
            else:
                yield blank(self._row([min(examples, key=self.dataset.length_tokens)]))

    def _own_rows(self, lengths: Sequence[int], *, packing: bool = True) -> list[list[int]]:
        budget = self._config.budget_tokens
        return own_rows(lengths, budget, packing=packing, rank=ranks.rank(), count=ranks.count())

    def _row(self, examples: Sequence[int]) -> PackedBatch:
        return collate(self.dataset, examples, self._device)


class LabelledExamples(Examples):
    """Examples that are good or bad, for KTO: each batch first measures the policy on answers to other prompts."""

    def __init__(self, config: TrainConfig, dataset: TokenDataset, objective: Kto, learner: Learner) -> None:
        super().__init__(config, dataset, objective, learner.base.device)
        self._kto = objective
        self._learner = learner

    def batches(self, examples: Sequence[int]) -> Iterator[PackedBatch]:
        """As for other examples; the objective's `kl` is that of this batch while it is worked on."""
        self._kto.kl = self._divergence(examples)
        yield from super().batches(examples)

    def _row(self, examples: Sequence[int]) -> PackedBatch:
        desirable = torch.tensor([self.dataset.is_good(example) for example in examples], device=self._device)
        return replace(super()._row(examples), columns={"desirable_S": desirable})

    def _divergence(self, examples: Sequence[int]) -> torch.Tensor:
        """Mean of log(policy / reference) over each prompt with its neighbour's answer; not below 0 (section 4.1)."""
        pairs = [self._mismatched(*pair) for pair in zip(examples, [*examples[1:], *examples[:1]], strict=True)]
        total = torch.zeros((), device=self._device)
        for group in self._own_rows([len(ids) - 1 for ids, _ in pairs]):
            batch = pack_sequences([pairs[i] for i in group or (0,)], self._device)
            batch = batch if group else blank(batch)
            total += (self._learner.score(batch) - self._learner.reference(batch)).sum()
        return (ranks.total(total) / len(pairs)).clamp(min=0)

    def _mismatched(self, example: int, neighbour: int) -> tuple[np.ndarray, np.ndarray]:
        prompt = self.dataset.prompt_ids(example)
        ids, weights = self.dataset.sequences(neighbour)[0]
        first = int(np.flatnonzero(weights)[0])
        context = np.zeros(len(prompt), np.float32)
        return np.concatenate([prompt, ids[first:]]), np.concatenate([context, weights[first:]])


def examples_for(
    config: TrainConfig, dataset: TokenDataset, objective: Sft | Dpo | Orpo | Simpo | Kto, learner: Learner
) -> Examples:
    """The examples of a dataset, as the method wants them."""
    if isinstance(objective, Kto):
        return LabelledExamples(config, dataset, objective, learner)
    return Examples(config, dataset, objective, learner.base.device)
