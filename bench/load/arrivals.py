"""Arrival processes: when each request is meant to be sent. Pure functions of a seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Offsets = NDArray[np.int64]  # nanoseconds after the start, ascending

KINDS = ("poisson", "constant", "gamma:SHAPE")


def arrivals(kind: str, rate_per_s: float, duration_s: float, seed: int) -> Offsets:
    """Offsets in [0, duration) of a process with a mean rate. Raises ValueError for an unknown kind.

    The count is what the process gives: it is not rescaled to a wished total, which would make a Poisson process one of
    fixed count.
    """
    if rate_per_s <= 0:
        raise ValueError(f"rate must be above 0, got {rate_per_s}")
    if kind == "constant":
        count = int(np.ceil(rate_per_s * duration_s - 1e-9))
        return (np.arange(count) * (1e9 / rate_per_s)).astype(np.int64)
    rng = np.random.default_rng([seed, 1])
    shape = _gamma_shape(kind)
    gaps_s: list[NDArray[np.float64]] = []
    total_s = 0.0
    while total_s < duration_s:
        block = rng.gamma(shape, 1 / (shape * rate_per_s), size=max(16, int(rate_per_s * duration_s * 1.1)))
        gaps_s.append(block)
        total_s += float(block.sum())
    times_s = np.cumsum(np.concatenate(gaps_s))
    return (times_s[times_s < duration_s] * 1e9).astype(np.int64)


def _gamma_shape(kind: str) -> float:
    """1 for Poisson; below 1 is burstier."""
    if kind == "poisson":
        return 1.0
    name, _, value = kind.partition(":")
    try:
        shape = float(value) if name == "gamma" else 0.0
    except ValueError:
        shape = 0.0
    if shape <= 0:
        raise ValueError(f"unknown arrival process {kind!r}; allowed: {', '.join(KINDS)} with SHAPE above 0")
    return shape
