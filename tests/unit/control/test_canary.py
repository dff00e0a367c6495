"""The judgement of canaries: exact tests against known values, and how often it errs, by simulation."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.control.canary import RISK, Action, Arm, Policy, Times, decide, fisher, look_of, rank_sum, wilson
from gateway.observe import series
from tests.support.canaries import Behaviour, rollout

POLICY = Policy()


def test_fisher_against_known_values() -> None:
    # Fisher's tea tasting: 3 of 4, 1 of 4: 17/70
    assert fisher(3, 4, 1, 4) == pytest.approx(17 / 70)
    assert fisher(0, 50, 0, 950) == 1.0
    assert fisher(0, 10, 5, 10) == pytest.approx(1.0)
    assert fisher(5, 25, 0, 475) == pytest.approx(math.comb(25, 5) / math.comb(500, 5))


def test_rank_sum_against_known_values() -> None:
    # values 1..4 against 5..8, each alone in its bucket: U = 16, z = 8 / sqrt(12)
    low, high = (1, 1, 1, 1, 0, 0, 0, 0), (0, 0, 0, 0, 1, 1, 1, 1)
    assert rank_sum(high, low) == pytest.approx(math.erfc(8 / math.sqrt(12) / math.sqrt(2)) / 2)
    assert rank_sum(low, high) == pytest.approx(1 - rank_sum(high, low))
    assert rank_sum((7, 0), (9, 0)) == 1.0
    assert rank_sum((5, 5), (50, 50)) == pytest.approx(0.5)


def test_wilson_against_known_values() -> None:
    assert list(wilson(0, 300, 1.645)) == pytest.approx([0.0, 0.00894], abs=1e-5)
    assert list(wilson(50, 100, 1.645)) == pytest.approx([0.4189, 0.5811], abs=1e-3)


def test_looks_come_at_an_eighth_of_the_minimum_and_at_doublings() -> None:
    due = {look: next(n for n in range(5000) if look_of(n, 401) == look) for look in range(1, 6)}
    assert due == {1: 51, 2: 102, 3: 204, 4: 408, 5: 816}


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 12))
def test_nothing_is_decided_between_looks(baseline: int, canary: int, looks: int) -> None:
    verdict = decide(POLICY, Arm(baseline), Arm(canary, canary), looks)
    if look_of(min(baseline, canary), POLICY.min_requests) <= looks:
        assert (verdict.action, verdict.look) == (Action.WATCH, looks)
        assert "for the next look" in verdict.reason
    else:
        assert verdict.look > looks


def test_failures_roll_back_early() -> None:
    verdict = decide(POLICY, Arm(1200, 2), Arm(63, 9), 0)
    assert verdict.action is Action.ROLL_BACK
    assert verdict.reason == "9 of 63 requests failed, 2 of 1200 before"
    assert verdict.figures["canary"] == {"requests": 63, "errors": 9}
    assert verdict.figures["errors"]["p"] < 1e-6


def test_a_difference_that_does_not_matter_does_not_roll_back() -> None:
    verdict = decide(POLICY, Arm(1_000_000, 1000), Arm(100_000, 300), 0)
    assert verdict.figures["errors"]["p"] < 1e-9
    assert verdict.action is Action.PROMOTE


def test_promotion_needs_a_bound_not_the_lack_of_proof() -> None:
    verdict = decide(POLICY, Arm(5000, 0), Arm(504, 2), 0)
    assert verdict.action is Action.WATCH
    assert "may have grown by up to" in verdict.reason
    assert decide(POLICY, Arm(5000, 0), Arm(504, 0), 0).action is Action.PROMOTE
    early = decide(POLICY, Arm(5000, 0), Arm(499, 0), 0)
    assert (early.action, early.reason) == (Action.WATCH, "no worse so far, by 499 of 500 requests")


def times(slow: int, fast: int, slow_ms: int = 500) -> Times:
    """Requests of 50 ms and of `slow_ms`."""
    bounds = series.TTFT.bounds
    counts = [0] * (len(bounds) + 1)
    counts[bounds.index(60_000)], counts[bounds.index(slow_ms * 1000)] = fast, slow
    return Times(bounds, (*counts, fast * 50_000 + slow * slow_ms * 1000))


def test_slower_rolls_back_and_says_by_how_much() -> None:
    verdict = decide(POLICY, Arm(700, 0, times(70, 630)), Arm(80, 0, times(60, 20)), 0)
    assert verdict.action is Action.ROLL_BACK
    assert verdict.reason == "mean ttft is 4.08 times the baseline's"
    assert verdict.figures["canary"]["ttft_ms"] == {"count": 80, "mean": 387.5, "p50": 500.0, "p99": 500.0}


def test_a_slow_mean_that_may_be_chance_is_watched() -> None:
    verdict = decide(POLICY, Arm(7000, 0, times(70, 6930)), Arm(508, 0, times(5, 503, 40_000)), 3)
    assert verdict.action is Action.WATCH
    assert "which may be chance" in verdict.reason


def outcomes(baseline: Behaviour, canary: Behaviour, runs: int, requests: int = 2100) -> Counter[Action]:
    return Counter(rollout(baseline, canary, 5, requests, POLICY, seed)[0] for seed in range(runs))


def test_a_canary_that_is_no_different_is_seldom_rolled_back() -> None:
    same = Behaviour()
    found = outcomes(same, same, 200)
    allowed = 200 * RISK + 3 * math.sqrt(200 * RISK)  # three standard deviations above the promised rate
    assert found[Action.ROLL_BACK] <= allowed, found
    assert found[Action.PROMOTE] > 100, found


@pytest.mark.parametrize(
    "worse",
    [Behaviour(error_rate=0.08), Behaviour(ttft_ms=180), Behaviour(duration_ms=2700)],
    ids=["fails more", "starts later", "takes longer"],
)
def test_a_canary_that_is_worse_is_rolled_back(worse: Behaviour) -> None:
    found = outcomes(Behaviour(), worse, 30)
    assert found[Action.PROMOTE] == 0, found
    assert found[Action.ROLL_BACK] >= 28, found
