"""Requests to two versions, simulated: for how often a canary is judged wrongly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gateway.control.canary import Action, Arm, Policy, Times, decide, look_of
from gateway.observe import series


@dataclass(frozen=True)
class Behaviour:
    """How a version answers: log-normal times, independent failures."""

    error_rate: float = 0.01
    ttft_ms: float = 100.0  # median
    duration_ms: float = 1500.0  # median
    sigma: float = 0.8  # of the logarithms


def rollout(
    baseline: Behaviour, canary: Behaviour, weight: float, requests: int, policy: Policy, seed: int
) -> tuple[Action, int]:
    """One canary over so many requests of its own, looked at after each that makes a look due: outcome, requests."""
    random = np.random.default_rng(seed)
    tried = _Requests(canary, requests, random)
    stayed = _Requests(baseline, int(requests * (100 - weight) / weight), random)
    looks = 0
    for count in range(1, requests + 1):
        if look_of(count, policy.min_requests) <= looks:
            continue
        verdict = decide(policy, stayed.arm(int(count * (100 - weight) / weight)), tried.arm(count), looks)
        looks = verdict.look
        if verdict.action is not Action.WATCH:
            return verdict.action, count
    return Action.WATCH, requests


class _Requests:
    def __init__(self, behaviour: Behaviour, count: int, random: np.random.Generator) -> None:
        self._failed = random.random(count) < behaviour.error_rate
        self._ttft_us = random.lognormal(np.log(behaviour.ttft_ms * 1e3), behaviour.sigma, count)
        self._duration_us = random.lognormal(np.log(behaviour.duration_ms * 1e3), behaviour.sigma, count)

    def arm(self, count: int) -> Arm:
        """What the first `count` came to."""
        ttft, duration = self._ttft_us[:count], self._duration_us[:count]
        failed = int(self._failed[:count].sum())
        return Arm(count, failed, _times(series.TTFT, ttft), _times(series.DURATION, duration))


def _times(metric: series.Metric, values_us: np.ndarray) -> Times:
    places = np.searchsorted(metric.bounds, values_us)
    counts = np.bincount(places, minlength=len(metric.bounds) + 1)
    return Times(metric.bounds, (*map(int, counts), int(values_us.sum())))
