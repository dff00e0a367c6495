"""Two runs held against each other: what differs beyond chance, and what was not the same to begin with."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec
import numpy as np

from bench.measure.define import DEFINITIONS
from bench.measure.record import Record
from bench.measure.stats import Interval, holm, t_two_sided, welch
from bench.measure.summary import TargetSummary

ALPHA = 0.05
_REPEATS_ENOUGH = 3
# metric, column -> the plain column of a repeat, where there is one
COMPARED = {
    "ttft_p50": ("ttft_ms", "p50"),
    "ttft_p99": ("ttft_ms", "p99"),
    "tpot_p50": ("tpot_ms", "p50"),
    "tpot_p99": ("tpot_ms", "p99"),
    "e2el_p50": ("e2el_ms", "p50"),
    "e2el_p99": ("e2el_ms", "p99"),
}
THROUGHPUT = "output_tokens_per_s"
_IGNORED = {
    "out",
    "name",
    "quiet",
    "url",
    "target",
    "api_key",
    "workers",
    "slo",
    "gpus",
    "gpu_hour_price",
    "metrics_url",
}
_GATE = re.compile(r"(\w+):([+-])(\d+(?:\.\d+)?)%")


class Change(msgspec.Struct):
    """How one figure moved. `p_value` is corrected for the number of figures looked at."""

    name: str
    unit: str
    before: Interval
    after: Interval
    change_percent: float
    p_value: float
    better: bool

    @property
    def significant(self) -> bool:
        """Whether chance is a poor explanation."""
        return self.p_value < ALPHA

    @property
    def verdict(self) -> str:
        """faster, slower or noise."""
        return ("faster" if self.better else "slower") if self.significant else "noise"


class Comparison(msgspec.Struct):
    """Two runs."""

    changes: list[Change]
    differing: dict[str, tuple[Any, Any]]


class Gate(msgspec.Struct, frozen=True):
    """A bound on how much worse a figure may be, in percent, for CI."""

    name: str
    limit_percent: float  # signed: +5 allows a rise of 5 %, -5 a fall

    def broken_by(self, change: Change) -> bool:
        """Whether the change is beyond the bound, and not by chance."""
        beyond = change.change_percent > self.limit_percent if self.limit_percent > 0 else (
            change.change_percent < self.limit_percent
        )  # fmt: skip
        return beyond and change.significant


def parse_gate(text: str) -> Gate:
    """Read `tpot_p99:+5%`. Raises ValueError that lists the figures."""
    match = _GATE.fullmatch(text)
    names = (*COMPARED, THROUGHPUT)
    if match is None or match[1] not in names:
        raise ValueError(f"gate {text!r}: write FIGURE:+5% or FIGURE:-5% with FIGURE one of {', '.join(names)}")
    return Gate(match[1], float(f"{match[2]}{match[3]}"))


def refuse_unlike(before: Record, after: Record) -> None:
    """Two runs of different work cannot be compared. Raises ValueError that names what differs."""
    if before.header.workload_hash != after.header.workload_hash:
        keys = differing_inputs(before, after)
        named = ", ".join(f"{key}: {a!r} and {b!r}" for key, (a, b) in keys.items() if key.startswith("config."))
        raise ValueError(
            f"the two runs offered different work ({named}); compare needs the same workload, load and seed"
        )


def differing_inputs(before: Record, after: Record) -> dict[str, tuple[Any, Any]]:
    """Every input that was not the same: configuration, servers' own descriptions, machines and versions."""
    first, second = _inputs(before), _inputs(after)
    return {
        key: (first.get(key), second.get(key))
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    }


def _inputs(record: Record) -> dict[str, Any]:
    header = record.header
    config = {f"config.{key}": value for key, value in header.config.items() if key not in _IGNORED}
    found = config | {f"client.{key}": value for key, value in header.environment.items() if key != "load_average"}
    for number, server in enumerate(header.servers.values()):
        found |= _flat(f"server{number or ''}", server)
    for record_mean, name in (
        (_mean(record, "prompt_tokens"), "prompt_tokens"),
        (_mean(record, "output_tokens"), "output"),
    ):
        found[f"measured.{name}_mean"] = record_mean
    return found


def _mean(record: Record, field: str) -> float | None:
    values = [value for value in (getattr(request, field) for request in record.requests) if value is not None]
    return round(float(np.mean(values)), 1) if values else None


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: item for name, part in value.items() for key, item in _flat(f"{prefix}.{name}", part).items()}
    return {prefix: value}


def compare_targets(before: TargetSummary, after: TargetSummary) -> list[Change]:
    """Every compared figure of two targets, with corrected p-values."""
    changes = []
    for name, (metric, column) in COMPARED.items():
        pair = [part.steady.metrics.get(metric) for part in (before, after)]
        if pair[0] is not None and pair[1] is not None:
            held = (_repeats(before, name), _repeats(after, name))
            changes.append(_change(name, DEFINITIONS[metric].unit, pair[0][column], pair[1][column], *held, True))
    rates = before.steady.output_tokens_per_s, after.steady.output_tokens_per_s
    held = (_repeats(before, THROUGHPUT), _repeats(after, THROUGHPUT))
    changes.append(_change(THROUGHPUT, "tokens/s", *rates, *held, False))
    corrected = holm({change.name: change.p_value for change in changes})
    for change in changes:
        change.p_value = corrected[change.name]
    return changes


def _repeats(target: TargetSummary, name: str) -> list[float]:
    return [row[name] for row in target.repeats if name in row and math.isfinite(row[name])]


def _change(
    name: str,
    unit: str,
    before: Interval,
    after: Interval,
    repeats_before: list[float],
    repeats_after: list[float],
    lower_is_better: bool,
) -> Change:
    percent = 100 * (after.value / before.value - 1) if before.value else math.nan
    return Change(
        name=name,
        unit=unit,
        before=before,
        after=after,
        change_percent=percent,
        p_value=p_value(before, after, np.asarray(repeats_before), np.asarray(repeats_after)),
        better=(percent < 0) == lower_is_better,
    )


def p_value(
    before: Interval,
    after: Interval,
    repeats_before: np.ndarray[tuple[int], np.dtype[np.float64]],
    repeats_after: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> float:
    """The chance of so large a difference between equals.

    Where both runs have three repeats or more, what happened between repeats decides; the spread within a run sees
    nothing of a machine that is slower today. With fewer, the spread within is all there is.
    """
    if len(repeats_before) >= _REPEATS_ENOUGH and len(repeats_after) >= _REPEATS_ENOUGH:
        return welch(repeats_before, repeats_after)
    spread = math.hypot(before.stderr, after.stderr)
    if math.isnan(spread):
        return 1.0
    if spread == 0:
        return 1.0 if before.value == after.value else 0.0
    return t_two_sided((after.value - before.value) / spread, before.blocks + after.blocks - 2)
