"""`bench sweep` and `bench capacity`: one server under several loads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np

from bench.config import RunConfig
from bench.load.watch import Watch
from bench.load.worker import Tick
from bench.measure.record import Record, Segment
from bench.measure.slo import Limit, judge, parse_slo
from bench.measure.stats import Interval
from bench.measure.summary import Figures, figures, readings_by_segment, segments_of
from bench.measure.window import drift, full_window, steady_window
from bench.run import Observer, Session, session
from bench.workload.calibrate import ServerError

STEP_RATIO = 1.1  # the edge is known to within this factor
_LATE_SHARE = 0.5  # answers that go on for this share of the load's time after it mean a queue
_MOST_PROBES = 12
_BURST_USERS, _BURST_S = (64, 8, 1), 10.0  # fewer where a server cannot answer so many in time
_BRAKE_TICKS = 16  # four seconds of them
_BRAKE_REQUESTS = 8


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
        done = next((rate for users in _BURST_USERS if (rate := _burst(now, users, observer)) > 0), 0.0)
    if not done:
        raise ServerError("no request succeeded, not even with one user: give the loads by --rates")
    low, high = done * 0.1, done * 1.1
    return [low * (high / low) ** (step / (count - 1)) for step in range(count)]


def _burst(now: Session, users: int, observer: Observer) -> float:
    """Answers per second that so many users get, from the first request to the last answer."""
    order = now.order(now.prepared.targets[0].name, "load", 0, min(now.config.duration, _BURST_S), concurrency=users)
    segment = now.run(order, observer)
    answered = [reading for reading in now.readings(segment) if reading.failure is None]
    return len(answered) / full_window(segment, answered).length_s


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

    An edge that fails a trial is lowered by the step and has to be kept twice there: one lucky probe makes no result.
    """
    limits = parse_slo(config.slo)
    probes: list[Probe] = []
    with session(config) as now:
        now.warm_up(observer)
        while (rate := next_rate(probes, start_rate)) is not None and rate * config.duration >= 1:
            probes.append(_probe(now, rate, len(probes), limits, observer))
        kept = [probe.rate for probe in probes if probe.kept]
        failed = min([probe.rate for probe in probes if not probe.kept], default=math.inf)
        edge = max([rate for rate in kept if rate < failed], default=None)
        times_kept = 1
        while edge is not None and times_kept < 2 and len(probes) < 2 * _MOST_PROBES:
            again = _probe(now, edge, len(probes), limits, observer)
            probes.append(again)
            times_kept = times_kept + 1 if again.kept else 0
            edge = edge if again.kept else edge / STEP_RATIO
        confirmed = edge is not None and times_kept == 2
        return Capacity(edge if confirmed else None, confirmed, probes), now.record()


class _Brake:
    """Looks on for another observer, and ends a segment's sending once the server has plainly fallen behind."""

    def __init__(self, observer: Observer, cut: Callable[[], None]) -> None:
        self._observer, self._cut = observer, cut
        self._newest: dict[int, Tick] = {}
        self._levels: list[float] = []
        self._first_ns = self._answered_ns = 0
        self.pulled = False

    def segment(self, segment: Segment) -> None:
        """A segment begins."""
        self._observer.segment(segment)

    def ticks(self, ticks: list[Tick], watch: Watch) -> None:
        """Workers reported."""
        self._observer.ticks(ticks, watch)
        for tick in ticks:
            self._newest[tick.worker] = tick
            self._first_ns = self._first_ns or tick.t_ns
            if tick.done and not self._answered_ns:
                self._answered_ns = tick.t_ns
        t_ns = ticks[-1].t_ns
        # until answers come back as fast as requests go out, what is in flight grows on any server
        if self._answered_ns and t_ns - self._first_ns > 2 * (self._answered_ns - self._first_ns):
            self._levels.append(float(sum(tick.in_flight for tick in self._newest.values())))
        if not self.pulled and falls_behind(self._levels):
            self.pulled = True
            self._cut()


def falls_behind(levels: list[float]) -> bool:
    """Whether requests in flight, looked at a few times a second, have kept growing to twice what they were, beyond
    the few that a random process alone makes."""
    if len(levels) < _BRAKE_TICKS or levels[-1] < _BRAKE_REQUESTS:
        return False
    moved = drift(np.asarray(levels))
    return moved.real and moved.change > 1


def _probe(now: Session, rate: float, number: int, limits: list[Limit], observer: Observer) -> Probe:
    brake = _Brake(observer, now.fleet.cut)
    segment = _segment(now, "rate", rate, number, brake)
    if brake.pulled:
        return Probe(rate, False, "requests in flight kept growing: stopped early")
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
