"""Targets that took turns on the same schedule: what the second adds to the first, request by request."""

from __future__ import annotations

import msgspec
import numpy as np

from bench.measure.define import DEFINITIONS, Floats, Reading
from bench.measure.record import Record
from bench.measure.stats import Interval, bootstrap_mean, bootstrap_quantile
from bench.measure.summary import QUANTILES, Readings, segments_of

METRICS = ("ttft_ms", "tpot_ms", "stall_ms", "e2el_ms")


class PairedDifference(msgspec.Struct):
    """The distribution of (other - base) over requests that were sent alike to both."""

    base: str
    other: str
    metric: str
    pairs: int
    blocks: int
    difference: dict[str, Interval]
    relative_percent: float | None  # mean difference over the base's mean; None where that is zero

    @property
    def significant(self) -> bool:
        """Whether the interval of the mean leaves zero out."""
        mean = self.difference["mean"]
        return mean.low > 0 or mean.high < 0

    @property
    def title(self) -> str:
        """The metric's name, as tables have it."""
        return DEFINITIONS[self.metric].title


def paired_differences(record: Record, grouped: Readings) -> list[PairedDifference]:
    """Every later target against the first, over the blocks that both had."""
    names = list(dict.fromkeys(segment.target for segment in record.header.segments))
    found = []
    for other in names[1:]:
        blocks = _matched(record, grouped, names[0], other)
        for metric in METRICS:
            difference = _difference(names[0], other, metric, blocks)
            if difference is not None:
                found.append(difference)
    return found


Matched = list[list[tuple[Reading, Reading]]]


def _matched(record: Record, grouped: Readings, base: str, other: str) -> Matched:
    """Pairs of readings of the same request in each block."""
    by_pair = {s.pair: grouped[s.number] for s in segments_of(record, base) if s.pair is not None}
    blocks = []
    for segment in segments_of(record, other):
        if segment.pair in by_pair:
            twins = {(r.request.index, r.request.turn): r for r in by_pair[segment.pair] if r.failure is None}
            blocks.append(
                [
                    (twins[key], reading)
                    for reading in grouped[segment.number]
                    if reading.failure is None and (key := (reading.request.index, reading.request.turn)) in twins
                ]
            )
    return [block for block in blocks if block]


def _difference(base: str, other: str, metric: str, blocks: Matched) -> PairedDifference | None:
    differences: list[Floats] = []
    base_values: list[float] = []
    for block in blocks:
        values = [(getattr(a, metric), getattr(b, metric)) for a, b in block]
        known = [(a, b) for a, b in values if a is not None and b is not None]
        base_values += [a for a, _ in known]
        if known:
            differences.append(np.asarray([b - a for a, b in known]))
    if not differences:
        return None
    mean = bootstrap_mean(differences)
    base_mean = float(np.mean(base_values))
    return PairedDifference(
        base=base,
        other=other,
        metric=metric,
        pairs=len(base_values),
        blocks=len(differences),
        difference={"mean": mean} | {name: bootstrap_quantile(differences, q) for name, q in QUANTILES.items()},
        relative_percent=100 * mean.value / base_mean if base_mean else None,
    )
