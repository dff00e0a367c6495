"""Where a job's time goes, by phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch


class Phases:
    """Seconds by phase. A device's work is waited for at the end of each, so that it counts where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Inside, time counts to `phase`. Phases follow each other; none is inside another."""
        started = time.monotonic()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.add(phase, time.monotonic() - started)

    def add(self, phase: str, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Seconds of each phase since `before`, an earlier answer of `total`."""
        spent = {phase: seconds - before.get(phase, 0.0) for phase, seconds in self._seconds.items()}
        return {phase: round(seconds, 3) for phase, seconds in spent.items() if seconds}

    def total(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        return dict(self._seconds)
