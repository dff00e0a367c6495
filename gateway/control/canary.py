"""Whether a canary is promoted, rolled back or watched on: a pure function over counts.

Two arms get the same kind of traffic: the version that the name points to (baseline) and the canary. The counts are
looked at when the smaller arm has an eighth of `min_requests`, then at each doubling. Three one-sided tests ask
whether the canary is worse: Fisher's exact test on failed requests, and the rank-sum test on time to first token and
on duration. Look k may err with probability RISK / 2^k, shared among the three, so over any number of looks a canary
that is no different is rolled back with probability RISK at most. What is significant must also matter: the limits
of the policy. Promotion needs a bound instead of a lack of proof: the share of failed requests grew by no more than
the policy allows (Newcombe's interval; the k-th look from `min_requests` on may err with probability
RISK_OF_PROMOTION / 2^k), and no mean is slower than it allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist
from typing import Any

from gateway.observe import series

RISK = 0.02  # of rolling back a canary that is no different, over all looks together
RISK_OF_PROMOTION = 0.05  # of promoting one whose failures grew by more than the limit, over all looks together
_TESTS = 3
_PARTS_OF_MINIMUM = 8  # the first look is at one of them
_LOOK_AT_MINIMUM = _PARTS_OF_MINIMUM.bit_length()
_FEWEST_TIMES = 10  # of each arm: with fewer the rank-sum test's approximation is poor


@dataclass(frozen=True, slots=True)
class Policy:
    """What decides over a canary."""

    automatic: bool = True  # False: it only runs; an operator promotes or rolls back
    min_requests: int = 500  # of each arm, before it may be promoted
    max_error_increase: float = 0.01  # of the share of failed requests
    max_slowdown: float = 1.25  # a mean time of the canary over the baseline's


@dataclass(frozen=True, slots=True)
class Times:
    """A histogram in cells: counts between the bounds, counts above the last, sum in microseconds."""

    bounds: tuple[int, ...]  # microseconds
    cells: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        return self.cells[:-1]

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean_ms(self) -> float | None:
        return self.cells[-1] / self.count / 1e3 if self.count else None

    def quantile_ms(self, share: float) -> float | None:
        """The upper bound of the bucket that holds the quantile; of the last, its lower one."""
        rank, seen = share * self.count, 0
        for bound, count in zip((*self.bounds, self.bounds[-1]), self.counts, strict=True):
            seen += count
            if count and seen >= rank:
                return bound / 1e3
        return None


_NO_TTFT = Times(series.TTFT.bounds, (0,) * series.TTFT.cells)
_NO_DURATION = Times(series.DURATION.bounds, (0,) * series.DURATION.cells)


@dataclass(frozen=True, slots=True)
class Arm:
    """What one version's requests came to. Those refused for the client's fault say nothing and are left out."""

    requests: int = 0
    errors: int = 0  # answered by a status of 500 or more
    ttft: Times = _NO_TTFT
    duration: Times = _NO_DURATION

    def figures(self) -> dict[str, Any]:
        """For people and the store."""
        shown: dict[str, Any] = {"requests": self.requests, "errors": self.errors}
        for name, times in (("ttft_ms", self.ttft), ("duration_ms", self.duration)):
            if times.count:
                p50, p99 = times.quantile_ms(0.5), times.quantile_ms(0.99)
                shown[name] = {"count": times.count, "mean": _short(times.mean_ms), "p50": p50, "p99": p99}
        return shown


class Action(StrEnum):
    """What becomes of a canary."""

    WATCH = "watch"
    PROMOTE = "promote"
    ROLL_BACK = "roll back"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A look's outcome, with the figures that it rests on."""

    action: Action
    reason: str
    look: int  # looks that have been made, this one included; 0: none yet
    figures: dict[str, Any]


def decide(policy: Policy, baseline: Arm, canary: Arm, looks: int) -> Verdict:
    """Judge a canary. looks: how many were made before; between two looks nothing is decided."""
    fewest = min(baseline.requests, canary.requests)
    look = look_of(fewest, policy.min_requests)
    figures: dict[str, Any] = {"look": look, "baseline": baseline.figures(), "canary": canary.figures()}
    if look <= looks:
        due = _first_look(policy.min_requests) << look
        return Verdict(Action.WATCH, f"{fewest} of {due} requests for the next look", looks, figures)
    alpha = RISK / 2**look / _TESTS
    figures["alpha"] = alpha
    more_failures, highest = _compare_failures(policy, baseline, canary, look, figures)
    slower = _compare_times(policy, baseline, canary, figures)
    worse = [words for words, p in (*more_failures, *slower) if p < alpha]
    if worse:
        return Verdict(Action.ROLL_BACK, "; ".join(worse), look, figures)
    if fewest < policy.min_requests:
        return Verdict(Action.WATCH, f"no worse so far, by {fewest} of {policy.min_requests} requests", look, figures)
    if slower:
        reason = f"{'; '.join(words for words, _ in slower)}, which may be chance"
        return Verdict(Action.WATCH, reason, look, figures)
    if highest > policy.max_error_increase:
        reason = f"failures may have grown by up to {highest:.2%}: more requests are needed"
        return Verdict(Action.WATCH, reason, look, figures)
    return Verdict(Action.PROMOTE, f"no worse by {fewest} requests of each version", look, figures)


_Worse = tuple[str, float]  # in what the canary is worse than the policy allows, and the chance that it seems so


def _compare_failures(
    policy: Policy, baseline: Arm, canary: Arm, look: int, figures: dict[str, Any]
) -> tuple[list[_Worse], float]:
    """Whether failures grew beyond the limit, and by how much they grew at most (Newcombe's interval)."""
    before, now = baseline.errors / baseline.requests, canary.errors / canary.requests
    z = NormalDist().inv_cdf(1 - RISK_OF_PROMOTION / 2 ** max(1, look - _LOOK_AT_MINIMUM + 1))
    lower, upper = wilson(baseline.errors, baseline.requests, z)[0], wilson(canary.errors, canary.requests, z)[1]
    highest = now - before + math.hypot(upper - now, before - lower)
    p = fisher(canary.errors, canary.requests, baseline.errors, baseline.requests)
    figures["errors"] = {"increase": _short(now - before), "increase_at_most": _short(highest), "p": _short(p)}
    if now - before <= policy.max_error_increase:
        return [], highest
    words = f"{canary.errors} of {canary.requests} requests failed, {baseline.errors} of {baseline.requests} before"
    return [(words, p)], highest


def _compare_times(policy: Policy, baseline: Arm, canary: Arm, figures: dict[str, Any]) -> list[_Worse]:
    """Which mean times are beyond the limit."""
    worse = []
    for name, before, now in (
        ("ttft", baseline.ttft, canary.ttft),
        ("duration", baseline.duration, canary.duration),
    ):
        if min(before.count, now.count) < _FEWEST_TIMES or not before.mean_ms or not now.mean_ms:
            continue
        ratio, p = now.mean_ms / before.mean_ms, rank_sum(now.counts, before.counts)
        figures[name] = {"mean_ratio": _short(ratio), "p": _short(p)}
        if ratio > policy.max_slowdown:
            worse.append((f"mean {name} is {ratio:.2f} times the baseline's", p))
    return worse


def look_of(fewest: int, min_requests: int) -> int:
    """How many looks are due with so many requests of the smaller arm."""
    return (fewest // _first_look(min_requests)).bit_length()


def fisher(failed: int, total: int, other_failed: int, other_total: int) -> float:
    """The chance of `failed` or more of `total`, were all failures dealt at random (one-sided exact test)."""
    failures, everything = failed + other_failed, total + other_total
    most = min(failures, total)
    all_ways = _log_choose(everything, failures)
    ways = (
        _log_choose(total, k) + _log_choose(other_total, failures - k)
        for k in range(max(failed, failures - other_total), most + 1)
    )
    return min(1.0, sum(math.exp(way - all_ways) for way in ways))


def rank_sum(counts: Sequence[int], other: Sequence[int]) -> float:
    """The chance that values as high as these against the others come about with no difference.

    Both are counts by bucket. Mann and Whitney's test, one-sided, with mid-ranks for ties (normal approximation).
    """
    n, m = sum(counts), sum(other)
    total, below, ranks, ties = n + m, 0, 0.0, 0
    for a, b in zip(counts, other, strict=True):
        tied = a + b
        ranks += a * (below + (tied + 1) / 2)
        ties += tied**3 - tied
        below += tied
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance <= 0:  # all in one bucket
        return 1.0
    z = (ranks - n * (n + 1) / 2 - n * m / 2) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2)) / 2


def wilson(failed: int, total: int, z: float) -> tuple[float, float]:
    """Bounds of a share of failures. z: of the confidence with which each holds."""
    share, z2 = failed / total, z**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _first_look(min_requests: int) -> int:
    return math.ceil(min_requests / _PARTS_OF_MINIMUM)


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
