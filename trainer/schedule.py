"""The learning rate of a step, and the examples of a step: pure functions of the step number, so resuming is exact."""

from __future__ import annotations

import math

import numpy as np

from trainer.config import Schedule


def learning_rate(step: int, total_steps: int, *, peak: float, schedule: Schedule, warmup_steps: int) -> float:
    """The rate for optimizer step `step` (from 0): linear warm-up from 0, then the schedule down to 0 at the end."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1 - progress)
    return peak


class DataOrder:
    """Which examples each optimizer step takes: each once an epoch; the last batch of an epoch may be short."""

    def __init__(self, examples: int, batch_size: int, *, seed: int, shuffle: bool) -> None:
        self._examples, self._batch_size = examples, batch_size
        self._seed, self._shuffle = seed, shuffle
        self._epoch, self._order = -1, np.arange(examples)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return math.ceil(self._examples / self._batch_size)

    def batch(self, step: int) -> list[int]:
        """The examples of step `step`, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._shuffle and epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._examples)
            self._epoch = epoch
        first = within * self._batch_size
        return [int(example) for example in self._order[first : first + self._batch_size]]
