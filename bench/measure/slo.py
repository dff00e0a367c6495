"""Service-level objectives: limits in milliseconds on a metric of each request, and on the share of requests within."""

from __future__ import annotations

import math
import re

import msgspec

from bench.measure.define import Reading, values_with_failures
from bench.measure.stats import quantile

METRICS = ("ttft", "tpot", "e2el")
# model, scenario -> p99 limits in ms on TTFT and TPOT, from the load generator's rules
MLPERF = {
    "llama2-70b": {"server": (2000, 200), "interactive": (450, 40)},
    "llama3.1-8b": {"server": (2000, 100), "interactive": (500, 30)},
    "llama3.1-405b": {"server": (6000, 175), "interactive": (4500, 80)},
}
_TERM = re.compile(r"(ttft|tpot|e2el)_p(\d{1,2}(?:\.\d+)?)=(\d+(?:\.\d+)?)")


class Limit(msgspec.Struct, frozen=True):
    """`quantile` of a metric must not exceed `limit_ms`."""

    metric: str
    quantile: float
    limit_ms: float

    def __str__(self) -> str:
        return f"{self.metric} p{self.quantile * 100:g} <= {self.limit_ms:g} ms"


def parse_slo(text: str) -> list[Limit]:
    """Read the one-line form; an empty one is no objective. Raises ValueError that shows what is allowed."""
    if not text:
        return []
    if text.startswith("mlperf:"):
        _, model, scenario = (*text.split(":"), "", "")[:3]
        if scenario not in MLPERF.get(model, {}):
            allowed = ", ".join(f"mlperf:{name}:{kind}" for name, kinds in MLPERF.items() for kind in kinds)
            raise ValueError(f"unknown objective {text!r}; allowed: {allowed}")
        ttft_ms, tpot_ms = MLPERF[model][scenario]
        return [Limit("ttft", 0.99, ttft_ms), Limit("tpot", 0.99, tpot_ms)]
    limits = []
    for term in text.split(","):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise ValueError(f"unknown objective {term!r}; write METRIC_pQUANTILE=MS with ttft, tpot or e2el")
        limits.append(Limit(match[1], float(match[2]) / 100, float(match[3])))
    return limits


def meets(reading: Reading, limits: list[Limit]) -> bool:
    """Whether one request succeeded within every limit. A metric that one token cannot have is not held against it."""
    if reading.failure is not None:
        return False
    values = [(getattr(reading, f"{limit.metric}_ms"), limit.limit_ms) for limit in limits]
    return all(value is None or value <= limit_ms for value, limit_ms in values)


def judge(readings: list[Reading], limits: list[Limit]) -> dict[str, tuple[float, bool]]:
    """limit -> (observed quantile with failures as infinitely slow, whether it holds)."""
    verdicts = {}
    for limit in limits:
        observed = quantile(values_with_failures(readings, f"{limit.metric}_ms"), limit.quantile)
        verdicts[str(limit)] = (observed, not math.isnan(observed) and observed <= limit.limit_ms)
    return verdicts
