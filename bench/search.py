"""`bench sweep` and `bench capacity`: one server under several loads."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from bench.config import RunConfig
from bench.measure.record import Record, Segment
from bench.measure.slo import Limit, judge, parse_slo
from bench.measure.stats import Interval
from bench.measure.summary import Figures, figures, readings_by_segment, segments_of
from bench.measure.window import full_window, steady_window
from bench.run import Observer, Session, session
from bench.workload.calibrate import ServerError

STEP_RATIO = 1.1  # the edge is known to within this factor
_LATE_SHARE = 0.5  # answers that go on for this share of the load's time after it mean a queue
_MOST_PROBES = 12


class Point(msgspec.Struct):
    """One load and what it gave."""

    load: float
    kind: str  # rate | concurrency
    figures: Figures

    def of(self, metric: str, column: str) -> Interval:
        """A figure; not-a-number where there is none."""
        row = self.figures.metrics.get(metric)
        return row[column] if row else Interval(math.nan, math.nan, math.nan, math.nan, 0)


def sweep(config: RunConfig, loads: list[float], kind: Literal["rate", "concurrency"], observer: Observer) -> Record:
    """Run every load in turn, from low to high, each `repeats` times."""
    with session(config) as now:
        now.warm_up(observer)
        for load in sorted(loads):
            for repeat in range(config.repeats):
                _segment(now, kind, load, repeat, observer)
        return now.record()


def points_of(record: Record) -> list[Point]:
    """The points of a sweep's record, each with all its repeats."""
    grouped = readings_by_segment(record)
    target = next(iter(record.header.servers))
    by_load: dict[tuple[str, float], list[Segment]] = {}
    for segment in segments_of(record, target):
        kind = "rate" if segment.rate_per_s is not None else "concurrency"
        by_load.setdefault((kind, segment.rate_per_s or float(segment.concurrency or 0)), []).append(segment)
    objective = str(record.header.config.get("slo", ""))
    points = []
    for (kind, load), segments in by_load.items():
        held = {segment.number: grouped[segment.number] for segment in segments}
        windows = [steady_window(segment, held[segment.number]) for segment in segments]
        points.append(Point(load, kind, figures(held, windows, objective)))
    return sorted(points, key=lambda point: point.load)


def auto_rates(config: RunConfig, observer: Observer, count: int = 5) -> list[float]:
    """Rates from a tenth of what the server can do to a little above: found from a short closed-loop burst.

    Raises ServerError when nothing comes back.
    """
    with session(msgspec.structs.replace(config, metrics_url=())) as now:
        now.warm_up(observer)
        order = now.order(now.prepared.targets[0].name, "load", 0, min(config.duration, 10.0), concurrency=64)
        now.run(order, observer)
        record = now.record()
    done = points_of(record)[0].figures.requests_per_s.value
    if not done > 0:
        raise ServerError("no request succeeded at 64 users: give the loads by --rates")
    low, high = done * 0.1, done * 1.1
    return [low * (high / low) ** (step / (count - 1)) for step in range(count)]


class Probe(msgspec.Struct):
    """One rate tried by the search."""

    rate: float
    kept: bool
    why: str


class Capacity(msgspec.Struct):
    """The highest rate that kept the objective, and was kept again when tried once more."""

    rate: float | None
    confirmed: bool
    probes: list[Probe]


def next_rate(probes: list[Probe], start: float) -> float | None:
    """The next rate to try: doubling until one fails, then the geometric middle; None when the edge is near enough."""
    kept = [probe.rate for probe in probes if probe.kept]
    failed = [probe.rate for probe in probes if not probe.kept]
    if len(probes) >= _MOST_PROBES:
        return None
    if not probes:
        return start
    if not failed:
        return max(kept) * 2
    if not kept:
        return min(failed) / 2
    low, high = max(kept), min(failed)
    if low >= high:  # a rate that failed once is held to be above the edge
        low = max([rate for rate in kept if rate < high], default=high / 2)
    return None if high / low <= STEP_RATIO else math.sqrt(low * high)


def capacity(config: RunConfig, start_rate: float, observer: Observer) -> tuple[Capacity, Record]:
    """Search the highest rate under the configured objective, then try the edge again.

    An edge that fails its second trial is lowered by the step, so that a lucky probe does not make the result.
    """
    limits = parse_slo(config.slo)
    probes: list[Probe] = []
    with session(config) as now:
        now.warm_up(observer)
        while (rate := next_rate(probes, start_rate)) is not None:
            probes.append(_probe(now, rate, len(probes), limits, observer))
        kept = [probe.rate for probe in probes if probe.kept]
        failed = min([probe.rate for probe in probes if not probe.kept], default=math.inf)
        edge = max([rate for rate in kept if rate < failed], default=None)
        confirmed = False
        while edge is not None and not confirmed and len(probes) < 2 * _MOST_PROBES:
            again = _probe(now, edge, len(probes), limits, observer)
            probes.append(again)
            confirmed = again.kept
            edge = edge if confirmed else edge / STEP_RATIO
        return Capacity(edge if confirmed else None, confirmed, probes), now.record()


def _probe(now: Session, rate: float, number: int, limits: list[Limit], observer: Observer) -> Probe:
    segment = _segment(now, "rate", rate, number, observer)
    readings = now.readings(segment)
    if not readings:
        return Probe(rate, False, "no request was sent: the rate is too low for the duration")
    window = steady_window(segment, readings)
    inside = [reading for reading in readings if window.holds(reading.t0_ns)]
    verdicts = judge(inside, limits)
    broken = [f"{limit}: {observed:.1f}" for limit, (observed, kept) in verdicts.items() if not kept]
    if broken:
        return Probe(rate, False, "; ".join(broken))
    late_s = full_window(segment, readings).length_s - segment.duration_ns / 1e9
    if late_s > _LATE_SHARE * segment.duration_ns / 1e9:
        return Probe(rate, False, f"answers went on for {late_s:.1f} s after the load: the queue grew")
    return Probe(rate, True, "kept")


def _segment(
    now: Session, kind: Literal["rate", "concurrency"], load: float, repeat: int, observer: Observer
) -> Segment:
    config = now.config
    rate, users = (load, None) if kind == "rate" else (None, round(load))
    target = now.prepared.targets[0].name
    return now.run(now.order(target, "load", repeat, config.duration, rate, users), observer)
