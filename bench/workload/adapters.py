"""Which model each request names: uniform, weighted, or true Zipf over a list of adapters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FORMS = "uniform, weights:3,1,1 or zipf:S with S above 0"


def shares(mix: str, count: int) -> NDArray[np.float64]:
    """The share of requests of each of `count` models, in the order named. Raises ValueError.

    Zipf is the real one: the k-th model's share is proportional to 1 / k**S.
    """
    kind, _, value = mix.partition(":")
    try:
        if kind == "uniform" and not value:
            weights = np.ones(count)
        elif kind == "zipf":
            weights = 1 / np.arange(1, count + 1) ** float(value)
        elif kind == "weights":
            weights = np.asarray([float(part) for part in value.split(",")])
        else:
            raise ValueError
    except ValueError as error:
        raise ValueError(f"unknown adapter mix {mix!r}; allowed: {FORMS}") from error
    if len(weights) != count or (weights < 0).any() or weights.sum() <= 0:
        raise ValueError(f"adapter mix {mix!r} gives {len(weights)} weights for {count} models, all >= 0 and one above")
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised


def pick(cumulative: NDArray[np.float64], seed: int, index: int) -> int:
    """The model of a request: the same for the same seed and index."""
    draw = np.random.default_rng([seed, 3, index]).random()
    return min(int(np.searchsorted(cumulative, draw, side="right")), len(cumulative) - 1)
