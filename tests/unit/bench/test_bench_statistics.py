"""The statistics do what they claim: intervals cover, noise is called noise, a small slowdown is found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.measure.compare import p_value
from bench.measure.stats import (
    Interval,
    bootstrap_mean,
    bootstrap_quantile,
    bootstrap_ratio,
    exponential_fit,
    holm,
    quantile,
    repeats_interval,
    t_quantile,
    t_two_sided,
    trend,
    welch,
)

Rng = np.random.Generator


def run_of_blocks(rng: Rng, blocks: int, size: int, block_sd: float, request_sd: float) -> list[np.ndarray]:
    """Latencies around 100 whose blocks differ: what a real run looks like."""
    return [100 + rng.normal(0, block_sd) + rng.normal(0, request_sd, size) for _ in range(blocks)]


def covers(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize(("block_sd", "request_sd"), [(0.0, 10.0), (3.0, 10.0), (5.0, 1.0)])
def test_interval_of_the_mean_covers_the_truth_in_95_percent(block_sd: float, request_sd: float) -> None:
    rng = np.random.default_rng(1)
    hits = [covers(bootstrap_mean(run_of_blocks(rng, 20, 30, block_sd, request_sd)), 100) for _ in range(300)]
    assert 0.92 <= np.mean(hits) <= 0.98


def test_interval_of_the_median_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    hits = [covers(bootstrap_quantile(run_of_blocks(rng, 20, 30, 3.0, 10.0), 0.5), 100) for _ in range(120)]
    assert 0.91 <= np.mean(hits) <= 0.99


def test_interval_of_the_99th_percentile_covers_the_truth() -> None:
    rng = np.random.default_rng(3)
    truth = 100 * -math.log(0.01)
    hits = [covers(bootstrap_quantile([rng.exponential(100, 100) for _ in range(20)], 0.99), truth) for _ in range(100)]
    assert np.mean(hits) >= 0.90


def test_interval_of_a_throughput_covers_the_truth() -> None:
    rng = np.random.default_rng(4)
    hits = [covers(bootstrap_ratio(rng.poisson(500, 20).astype(float), np.full(20, 2.0)), 250) for _ in range(300)]
    assert 0.92 <= np.mean(hits) <= 0.98


def test_interval_over_repeats_covers_what_moves_whole_repeats() -> None:
    rng = np.random.default_rng(5)
    hits = []
    for _ in range(400):
        repeats = 100 + rng.normal(0, 2, 3)
        hits.append(covers(repeats_interval(float(repeats.mean()), repeats), 100))
    assert 0.92 <= np.mean(hits) <= 0.98


def figures_of(rng: Rng, level: float, repeats: int) -> tuple[Interval, np.ndarray]:
    """One run's figure: repeats that differ by 0.4 %, and what the bootstrap makes of it."""
    values = level * (1 + rng.normal(0, 0.004, repeats))
    blocks = [value * (1 + rng.normal(0, 0.01, 50)) for value in values for _ in range(7)]
    return bootstrap_mean(blocks), values


def test_two_alike_runs_are_called_noise_in_95_percent() -> None:
    rng = np.random.default_rng(6)
    found = 0
    for _ in range(300):
        # seven figures looked at, as `compare` does
        p_values = {}
        for number in range(7):
            (a, a_repeats), (b, b_repeats) = figures_of(rng, 10.0, 5), figures_of(rng, 10.0, 5)
            p_values[str(number)] = p_value(a, b, a_repeats, b_repeats)
        found += min(holm(p_values).values()) < 0.05
    assert found / 300 <= 0.05 + 0.025


def test_a_slowdown_of_3_percent_is_found() -> None:
    rng = np.random.default_rng(7)
    found = 0
    for _ in range(100):
        p_values = {}
        for number in range(7):
            (a, a_repeats), (b, b_repeats) = figures_of(rng, 10.0, 5), figures_of(rng, 10.3, 5)
            p_values[str(number)] = p_value(a, b, a_repeats, b_repeats)
        found += holm(p_values)["0"] < 0.05
    assert found >= 95


def test_failures_never_improve_a_tail() -> None:
    fast = np.full(99, 10.0)
    assert quantile(np.append(fast, math.inf), 0.99) == 10
    assert quantile(np.append(fast[:97], [math.inf] * 3), 0.99) == math.inf
    assert bootstrap_quantile([np.array([1.0, math.inf]), np.array([1.0, 1.0])], 0.5).value == 1.0


def test_student_t_agrees_with_published_tables() -> None:
    assert t_quantile(0.975, 2) == pytest.approx(4.3027, abs=1e-3)
    assert t_quantile(0.975, 19) == pytest.approx(2.0930, abs=1e-3)
    assert t_two_sided(2.571, 5) == pytest.approx(0.05, abs=1e-3)
    assert t_two_sided(0.0, 7) == pytest.approx(1.0)


def test_welch_on_a_worked_example() -> None:
    a = np.array([27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4])
    b = np.array([27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 30.5, 24.4])
    assert welch(a, b) == pytest.approx(0.0082, abs=2e-3)


def test_poisson_gaps_pass_and_even_gaps_do_not() -> None:
    rng = np.random.default_rng(8)
    rejected = np.mean([exponential_fit(rng.exponential(1, 200)) <= 0.05 for _ in range(300)])
    assert rejected <= 0.08
    assert exponential_fit(np.full(200, 1.0)) <= 0.001
    assert exponential_fit(rng.gamma(4, 0.25, 400)) <= 0.001


def test_trend_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(9)
    assert trend(np.arange(10) + rng.normal(0, 1, 10)) < 0.01
    assert np.mean([trend(rng.normal(0, 1, 10)) < 0.05 for _ in range(300)]) <= 0.08
