"""Seconds and tokens of training steps: the device is waited for at the ends only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Speed:
    """Of the steps after the warm-up."""

    first_step_s: float
    step_s: float
    tokens_per_s: float  # padding is not counted
    tokens: int  # of all steps, the warm-up's too


class Clock:
    """Starts when it is made. tokens: how many there were up to now; asked for at the ends only."""

    def __init__(self, steps: int, warmup_steps: int, tokens: Callable[[], int]) -> None:
        assert 1 < warmup_steps < steps
        self._steps, self._warmup_steps, self._tokens = steps, warmup_steps, tokens
        self._done, self._marks = 0, [self._now()]

    def step_ended(self) -> None:
        """Call after each step."""
        self._done += 1
        if self._done in (1, self._warmup_steps, self._steps):
            self._marks.append(self._now())

    def speed(self) -> Speed:
        """What was measured. Raises ValueError where steps are missing."""
        begin, first, warm, end = self._marks
        seconds, tokens = end[0] - warm[0], end[1] - warm[1]
        return Speed(first[0] - begin[0], seconds / (self._steps - self._warmup_steps), tokens / seconds, end[1])

    def _now(self) -> tuple[float, int]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), self._tokens()


class Counter:
    """Tokens that reach a model, without its padding: a hook before its forward pass."""

    def __init__(self) -> None:
        self._counted: list[torch.Tensor | int] = []

    def __call__(self, module: object, args: tuple[torch.Tensor, ...], given: dict[str, torch.Tensor]) -> None:
        ids, mask = given["input_ids"] if "input_ids" in given else args[0], given.get("attention_mask")
        self._counted.append(ids.numel() if mask is None or mask.dim() != 2 else mask.sum())

    def tokens(self) -> int:
        """Up to now; waits for the device."""
        self._counted = [sum(int(count) for count in self._counted)]
        return int(self._counted[0])
