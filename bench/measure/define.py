"""What every figure means. One place; every table takes its names, units and formulas from here.

t0  the intended send when the load is a rate (waiting for a slow client or server counts), else the actual send
f   arrival of the first event that carries generated text, reasoning or a tool call
l   arrival of the last such event
n   generated tokens; how they were counted is part of the reading
k1  tokens in the first such event
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from bench.measure.outcome import failure
from bench.measure.record import CHOICES, CONTENT, GENERATED, TOOL, Events, RequestRecord

# how n was known, best first
PER_CHUNK = "usage per chunk"  # every event stated the count so far: token times are true
FINAL = "final usage"  # the server's total; spread evenly over the events for rates
TOKENIZER = "server tokenizer"  # no usage: the text tokenized again, which is not always invertible
CHUNKS = "chunks"  # events counted as if each were one token

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Reading(msgspec.Struct):
    """One request reduced to its figures. What the stream could not tell is None. Milliseconds from t0."""

    request: RequestRecord
    failure: str | None
    t0_ns: int
    tokens: float
    counted_by: str
    t_ns: Ints  # arrival of every event
    flags: Ints  # what each carried
    token_t_ns: Ints  # arrival of every event with tokens
    token_counts: Floats  # tokens in each
    gaps_ms: Floats  # time between events with tokens
    ttft_ms: float | None = None
    ttft_from_send_ms: float | None = None
    answer_ttft_ms: float | None = None
    e2el_ms: float | None = None
    tpot_ms: float | None = None
    ntpot_ms: float | None = None
    user_tokens_per_s: float | None = None
    stall_ms: float | None = None
    send_lag_ms: float = 0.0
    connect_ms: float | None = None

    @property
    def token_times_known(self) -> bool:
        """Whether the time of each token is known: counts per chunk, or as many events as tokens (the end-of-sequence
        token may be counted and not shown)."""
        return self.counted_by == PER_CHUNK or (
            self.counted_by == FINAL and 0 <= self.tokens - len(self.token_t_ns) <= 1
        )


class Definition(msgspec.Struct, frozen=True):
    """A metric of a request, as tables and reports show it."""

    name: str
    title: str
    unit: str
    formula: str
    lower_is_better: bool = True


DEFINITIONS = {
    definition.name: definition
    for definition in (
        Definition("ttft_ms", "TTFT", "ms", "f - t0"),
        Definition("answer_ttft_ms", "TTFT of the answer", "ms", "first event with text that is not reasoning - t0"),
        Definition("tpot_ms", "TPOT", "ms/token", "(l - f) / (n - k1), a request"),
        Definition("itl_ms", "ITL", "ms/token", "gap / tokens of the event that ends it, a token; all requests"),
        Definition("chunk_gap_ms", "chunk gap", "ms", "time between events with tokens; all requests"),
        Definition("e2el_ms", "E2EL", "ms", "l - t0"),
        Definition("ntpot_ms", "E2EL per token", "ms/token", "(l - t0) / n"),
        Definition("stall_ms", "longest stall", "ms", "largest chunk gap of a request"),
        Definition("user_tokens_per_s", "speed per user", "tokens/s", "1000 / TPOT", lower_is_better=False),
        Definition("send_lag_ms", "send lag", "ms", "actual send - intended send"),
        Definition("ttft_from_send_ms", "TTFT from send", "ms", "f - actual send"),
        Definition("connect_ms", "connect", "ms", "time to open a connection, where one was opened"),
    )
}
REQUEST_METRICS = tuple(name for name in DEFINITIONS if name not in ("itl_ms", "chunk_gap_ms"))


def read(record: RequestRecord) -> Reading:
    """All figures of one request."""
    t0_ns = record.sent_ns if record.intended_ns is None else record.intended_ns
    t_ns = np.array(record.events.t_ns, dtype=np.int64)
    flags = np.array(record.events.flags, dtype=np.int64)
    times_ns, counts, total, counted_by = _count_tokens(record, t_ns, flags)
    reading = Reading(
        request=record,
        failure=failure(record),
        t0_ns=t0_ns,
        tokens=total,
        counted_by=counted_by,
        t_ns=t_ns,
        flags=flags,
        token_t_ns=times_ns,
        token_counts=counts,
        gaps_ms=(times_ns[1:] - times_ns[:-1]) / 1e6,
        send_lag_ms=(record.sent_ns - t0_ns) / 1e6,
        connect_ms=None if record.connect_ns is None else record.connect_ns / 1e6,
    )
    if len(times_ns):
        _time(reading, record)
    return reading


def _time(reading: Reading, record: RequestRecord) -> None:
    times_ns = reading.token_t_ns
    first_ns, last_ns = int(times_ns[0]), int(times_ns[-1])
    reading.ttft_ms = (first_ns - reading.t0_ns) / 1e6
    reading.ttft_from_send_ms = (first_ns - record.sent_ns) / 1e6
    answer_ns = first_time(record.events, CONTENT | TOOL)
    reading.answer_ttft_ms = None if answer_ns is None else (answer_ns - reading.t0_ns) / 1e6
    reading.e2el_ms = (last_ns - reading.t0_ns) / 1e6
    if reading.tokens > 0:
        reading.ntpot_ms = reading.e2el_ms / reading.tokens
    later_tokens = float(reading.token_counts[1:].sum())
    if later_tokens > 0:
        reading.tpot_ms = (last_ns - first_ns) / 1e6 / later_tokens
        reading.stall_ms = float(reading.gaps_ms.max())
        if reading.tpot_ms > 0:
            reading.user_tokens_per_s = 1000 / reading.tpot_ms


def _count_tokens(record: RequestRecord, t_ns: Ints, flags: Ints) -> tuple[Ints, Floats, float, str]:
    """(times of the events with tokens, tokens in each, n, how n is known)."""
    generated = (flags & GENERATED) != 0
    stated = np.array(record.events.tokens, dtype=np.int64)
    if generated.any() and (stated[generated] >= 0).all():
        # a count that grows at an event without text is a token too: the end of sequence, or half a character
        known = stated >= 0
        steps = np.zeros(len(stated))
        steps[known] = np.diff(stated[known], prepend=0)
        token_events = generated | (((flags & CHOICES) != 0) & (steps > 0))
        if int(stated[generated].max()) > 1 or int(generated.sum()) == 1:
            return t_ns[token_events], steps[token_events], float(stated.max()), PER_CHUNK
    times_ns = t_ns[generated]
    n, counted_by = _total(record, len(times_ns))
    counts = np.full(len(times_ns), n / len(times_ns)) if len(times_ns) else np.zeros(0)
    return times_ns, counts, n, counted_by


def _total(record: RequestRecord, events: int) -> tuple[float, str]:
    if record.output_tokens is not None:
        return float(record.output_tokens), FINAL
    if record.retokenized_tokens is not None:
        return float(record.retokenized_tokens), TOKENIZER
    return float(events), CHUNKS


def first_time(events: Events, mask: int) -> int | None:
    """Arrival of the first event with any of the flags."""
    return next((t_ns for t_ns, flags in zip(events.t_ns, events.flags, strict=True) if flags & mask), None)


def values_of(readings: list[Reading], metric: str) -> Floats:
    """A request metric over the requests that have it, in the order given."""
    get: Callable[[Reading], float | None] = lambda reading: getattr(reading, metric)  # noqa: E731
    return np.asarray([value for value in map(get, readings) if value is not None])


def values_with_failures(readings: list[Reading], metric: str) -> Floats:
    """As `values_of`, with every failed request as infinitely slow: a tail that errors cannot improve."""
    values = [np.inf if r.failure else getattr(r, metric) for r in readings]
    return np.asarray([value for value in values if value is not None])
