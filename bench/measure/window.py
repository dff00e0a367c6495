"""Which stretch of a segment counts: the whole of it, and the part in which the load was at its plateau."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.measure.define import Reading
from bench.measure.record import Segment
from bench.measure.stats import trend

Floats = NDArray[np.float64]
_PLATEAU = 0.8
_LATEST_START = 0.4  # a plateau that has not begun by this share of the load is none


class Window(msgspec.Struct, frozen=True):
    """A stretch of time within a segment, in nanoseconds after the run's origin."""

    segment: Segment
    start_ns: int
    end_ns: int

    @property
    def length_s(self) -> float:
        """How long it is."""
        return max(0.0, (self.end_ns - self.start_ns) / 1e9)

    def holds(self, t_ns: int) -> bool:
        """Whether a time lies in it."""
        return self.start_ns <= t_ns < self.end_ns


def full_window(segment: Segment, readings: list[Reading]) -> Window:
    """From the first intended send to the last byte of the last answer."""
    start_ns = min([segment.start_ns, *(reading.t0_ns for reading in readings)])
    end_ns = max([start_ns + 1, *(reading.request.end_ns + 1 for reading in readings)])
    return Window(segment, start_ns, end_ns)


def steady_window(segment: Segment, readings: list[Reading]) -> Window:
    """From when the requests in flight reach their usual number to the end of the offered load."""
    if not readings:
        return Window(segment, segment.start_ns, segment.start_ns + segment.duration_ns)
    last_sent_ns = max(reading.t0_ns for reading in readings)
    end_ns = min(segment.start_ns + segment.duration_ns, last_sent_ns + 1)
    times, levels = in_flight(readings)
    span_ns = end_ns - segment.start_ns
    middle = (times >= segment.start_ns + span_ns * 0.3) & (times < segment.start_ns + span_ns * 0.9)
    if not middle.any():
        return Window(segment, segment.start_ns, end_ns)
    usual = float(np.median(levels[middle]))
    reached = times[levels >= _PLATEAU * usual]
    start_ns = int(min(reached[0] if len(reached) else segment.start_ns, segment.start_ns + span_ns * _LATEST_START))
    return Window(segment, max(start_ns, segment.start_ns), end_ns)


def in_flight(readings: list[Reading]) -> tuple[Floats, Floats]:
    """(times in ns, requests in flight from each time on)."""
    starts = np.sort(np.asarray([reading.request.sent_ns for reading in readings], dtype=np.float64))
    ends = np.sort(np.asarray([reading.request.end_ns for reading in readings], dtype=np.float64))
    times = np.unique(np.concatenate([starts, ends]))
    levels = np.searchsorted(starts, times, side="right") - np.searchsorted(ends, times, side="right")
    return times, levels.astype(np.float64)


def tokens_by_slice(readings: list[Reading], window: Window, slices: int) -> Floats:
    """Tokens that arrived in each of equal slices of a window."""
    edges = np.linspace(window.start_ns, window.end_ns, slices + 1)
    if not readings:
        return np.zeros(slices)
    times = np.concatenate([reading.token_t_ns for reading in readings])
    counts = np.concatenate([reading.token_counts for reading in readings])
    return np.histogram(times, bins=edges, weights=counts)[0]


class Drift(msgspec.Struct, frozen=True):
    """How a quantity moved: the change from the first to the last third, and whether chance explains it."""

    change: float
    p_value: float

    @property
    def real(self) -> bool:
        """A tenth or more, and not by chance."""
        return abs(self.change) >= 0.1 and self.p_value < 0.01


def drift(values: Floats) -> Drift:
    """The drift of a series of equally spaced values."""
    third = max(1, len(values) // 3)
    first, last = float(values[:third].mean()), float(values[-third:].mean())
    return Drift((last - first) / first if first else 0.0, trend(values))
