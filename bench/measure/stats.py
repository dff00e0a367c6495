"""Statistics without a statistics package: quantiles, block bootstrap, Student's t, trend and fit tests.

Requests of one run are not independent: a slow second slows all that are in it. So the unit that is resampled is a
block of consecutive time, never a request.
"""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 1000
_LEVELS = 200  # candidates for a quantile, as many again within _NEAR of it
_NEAR = 0.08
_SEED = 20_240_501  # the same record gives the same interval


class Interval(msgspec.Struct, frozen=True):
    """An estimate with its 95 % confidence interval and standard error; `blocks` independent parts stand behind it."""

    value: float
    low: float
    high: float
    stderr: float
    blocks: int

    @property
    def half_width(self) -> float:
        """Half the interval's width: the number behind a plus-minus sign."""
        return (self.high - self.low) / 2


def quantile(values: Floats, q: float) -> float:
    """The value below which a share q lies: an observed value, so that infinity never blends into a finite one."""
    return float(np.quantile(values, q, method="inverted_cdf")) if len(values) else math.nan


def quantile_of_sorted(ordered: Floats, q: float) -> float:
    """As `quantile`, of values that are in order already."""
    return float(ordered[max(0, math.ceil(q * len(ordered)) - 1)]) if len(ordered) else math.nan


def bootstrap_mean(blocks: list[Floats]) -> Interval:
    """Mean over all values, with an interval from resampled blocks."""
    sums = np.asarray([float(block.sum()) for block in blocks])
    sizes = np.asarray([float(len(block)) for block in blocks])
    return bootstrap_ratio(sums, sizes)


def bootstrap_ratio(numerators: Floats, denominators: Floats) -> Interval:
    """sum(numerators) / sum(denominators), one of each a block: a throughput, a share or a mean."""
    kept = denominators > 0
    numerators, denominators = numerators[kept], denominators[kept]
    if not len(numerators):
        return _unknown(math.nan, 0)
    value = float(numerators.sum() / denominators.sum())
    if len(numerators) < 2 or not math.isfinite(value):
        return _unknown(value, len(numerators))
    draws = _draws(len(numerators))
    weights = draws @ denominators
    return _interval(value, (draws @ numerators)[weights > 0] / weights[weights > 0], len(numerators))


def bootstrap_quantile(blocks: list[Floats], q: float) -> Interval:
    """A quantile over all values, with an interval from resampled blocks."""
    blocks = [block for block in blocks if len(block)]
    if not blocks:
        return _unknown(math.nan, 0)
    pooled = np.sort(np.concatenate(blocks))
    value = quantile_of_sorted(pooled, q)
    if len(blocks) < 2 or not math.isfinite(value):
        return _unknown(value, len(blocks))
    levels = pooled
    if len(levels) > 2 * _LEVELS:
        near = np.linspace(max(0.0, q - _NEAR), min(1.0, q + _NEAR), _LEVELS)
        ranks = np.concatenate([near, np.linspace(0, 1, _LEVELS)]) * (len(pooled) - 1)
        levels = np.unique(pooled[ranks.astype(int)])
    at_or_below = np.asarray([np.searchsorted(np.sort(block), levels, side="right") for block in blocks], dtype=float)
    estimates = levels[_lowest_level(at_or_below, q)]
    return _interval(value, estimates[np.isfinite(estimates)], len(blocks))


def _lowest_level(at_or_below: Floats, q: float) -> NDArray[np.int64]:
    """For every resample, the first level that a share q of its values is at or below: all bisected side by side."""
    draws = _draws(len(at_or_below))
    wanted = q * (draws @ at_or_below[:, -1])
    low = np.zeros(len(draws), dtype=np.int64)
    high = np.full(len(draws), at_or_below.shape[1] - 1)
    for _ in range(int(high[0]).bit_length()):
        middle = (low + high) // 2
        enough = np.einsum("db,bd->d", draws, at_or_below[:, middle]) >= wanted
        low, high = np.where(enough, low, np.minimum(middle + 1, high)), np.where(enough, middle, high)
    return low


def repeats_interval(value: float, repeats: Floats) -> Interval:
    """Student's interval over whole repeats, around the pooled value: it sees what differs between repeats."""
    count = len(repeats)
    stderr = float(repeats.std(ddof=1)) / math.sqrt(count)
    half = t_quantile(0.975, count - 1) * stderr
    return Interval(value, value - half, value + half, stderr, count)


def wider(first: Interval, second: Interval) -> Interval:
    """The more cautious of two intervals. An unknown one loses."""
    if math.isnan(first.stderr):
        return second
    return second if second.high - second.low > first.high - first.low else first


@cache
def _draws(blocks: int) -> Floats:
    rng = np.random.default_rng(_SEED)
    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=RESAMPLES).astype(np.float64)


def _interval(value: float, estimates: Floats, blocks: int) -> Interval:
    if len(estimates) < RESAMPLES // 2:
        return _unknown(value, blocks)
    # Resampling few blocks understates the spread; widening the tails by Student's t restores the coverage.
    expanded = t_quantile(0.975, blocks - 1) * math.sqrt(blocks / (blocks - 1))
    tail = 1 - NormalDist().cdf(expanded)
    low, high = np.quantile(estimates, [tail, 1 - tail])
    stderr = float(estimates.std(ddof=1)) * math.sqrt(blocks / (blocks - 1))
    return Interval(value, min(float(low), value), max(float(high), value), stderr, blocks)


def _unknown(value: float, blocks: int) -> Interval:
    return Interval(value, math.nan, math.nan, math.nan, blocks)


def t_two_sided(t: float, df: float) -> float:
    """The chance that |T| is at least |t| under Student's distribution."""
    if math.isinf(t):
        return 0.0
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t))


@cache
def t_quantile(p: float, df: float) -> float:
    """The value that Student's T stays below with chance p (p at least one half)."""
    low, high = 0.0, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        if 1 - t_two_sided(middle, df) / 2 < p:
            low = middle
        else:
            high = middle
    return high


def welch(first: Floats, second: Floats) -> float:
    """p-value of equal means of two samples whose spreads may differ."""
    a, b = first.var(ddof=1) / len(first), second.var(ddof=1) / len(second)
    if a + b == 0:
        return 1.0 if first.mean() == second.mean() else 0.0
    df = (a + b) ** 2 / (a * a / (len(first) - 1) + b * b / (len(second) - 1))
    return t_two_sided(float((first.mean() - second.mean()) / math.sqrt(a + b)), float(df))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p-values corrected for how many were looked at (Holm)."""
    corrected: dict[str, float] = {}
    running = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, p * (len(p_values) - rank)))
        corrected[name] = running
    return corrected


def exponential_fit(gaps: Floats) -> float:
    """p-value that gaps are exponential, the mean taken from them too (Lilliefors, by Stephens' formula)."""
    count = len(gaps)
    if count < 8:
        return 1.0
    cdf = 1 - np.exp(-np.sort(gaps) / gaps.mean())
    ranks = np.arange(1, count + 1)
    distance = max(float((ranks / count - cdf).max()), float((cdf - (ranks - 1) / count).max()))
    scaled = (distance - 0.2 / count) * (math.sqrt(count) + 0.26 + 0.5 / math.sqrt(count))
    # Stephens 1974, table 54: upper tail of the scaled distance
    levels = ((0.926, 0.15), (0.990, 0.10), (1.094, 0.05), (1.190, 0.025), (1.308, 0.01), (1.6, 0.001))
    return min([p for bound, p in levels if scaled >= bound], default=1.0)


def trend(values: Floats) -> float:
    """p-value of "no trend" in a series (Mann-Kendall)."""
    count = len(values)
    if count < 5:
        return 1.0
    signs = np.sign(values[None, :] - values[:, None])
    score = float(np.triu(signs, 1).sum())
    variance = count * (count - 1) * (2 * count + 5) / 18
    z = (abs(score) - 1) / math.sqrt(variance) if score else 0.0
    return 2 * (1 - NormalDist().cdf(max(z, 0.0)))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function, by its continued fraction (Lentz)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / max(tiny, 1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 300):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + term * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + term / (c if abs(c) > tiny else tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-12:
            break
    return front * fraction
