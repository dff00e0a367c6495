"""Records made by hand, whose figures are known."""

from __future__ import annotations

from typing import Any

from bench.config import RunConfig, resolved
from bench.measure.record import (
    CHOICES,
    CONTENT,
    DONE,
    FINISH,
    RECORD_VERSION,
    Events,
    Header,
    Mark,
    Record,
    RequestRecord,
    Sample,
    Segment,
)

MS = 1_000_000
S = 1_000_000_000


def answer(
    index: int, t0_ms: float, ttft_ms: float = 50, gap_ms: float = 10, tokens: int = 20, **extra: Any
) -> RequestRecord:
    times = [int((t0_ms + ttft_ms + gap_ms * k) * MS) for k in range(tokens)]
    events = Events(
        [*times, times[-1] + 1],
        [CHOICES | CONTENT] * (tokens - 1) + [CHOICES | CONTENT | FINISH, DONE],
        [5] * tokens + [0],
        [*range(1, tokens + 1), -1],
    )
    fields: dict[str, Any] = {
        "index": index, "segment": 0, "target": "a", "model": "m", "intended_ns": int(t0_ms * MS),
        "sent_ns": int(t0_ms * MS), "end_ns": times[-1] + 2, "status": 200, "finish": "length",
        "prompt_tokens": 100, "prompt_tokens_asked": 100, "output_tokens": tokens, "output_tokens_asked": tokens,
        "cached_tokens": 0, "events": events,
    }  # fmt: skip
    return RequestRecord(**(fields | extra))


def record_of(
    requests: list[RequestRecord], config: dict[str, Any] | None = None, segments: list[Segment] | None = None
) -> Record:
    held = resolved(RunConfig(rate=10.0, duration=60.0)) | (config or {})
    header = Header(
        RECORD_VERSION, "2026-01-01T00:00:00", 0, held, "hash", {"workers": 1}, {"a": {"version": "1"}},
        segments or [Segment(0, "load", "a", 0, 0, 60 * S, 10.0)], "kernel",
    )  # fmt: skip
    return Record(header, requests)


def steady(count: int = 600, **each: Any) -> list[RequestRecord]:
    return [answer(n, n * 100.0, ttft_ms=50 + n % 7, **each) for n in range(count)]


def rich_record() -> Record:
    """A minute with everything that a report shows: adapters, failures, a server's metrics, a GPU, a change."""
    requests = steady()
    for number, request in enumerate(requests):
        request.model = f"adapter-{number % 5}"
        if number % 40 == 0:
            request.finish = None
    record = record_of(requests, {"slo": "ttft_p99=200"})
    seconds = range(60)
    record.samples = [
        Sample(
            "server:a",
            n * S,
            {"running": 3.0 + n % 4, "waiting": 1.0 + n % 3, "kv_usage": 0.2 + n / 200}
            | {"cache_hit_tokens": 30.0 * n, "cache_query_tokens": 100.0 * n},
        )
        for n in seconds
    ]
    record.samples += [Sample("gpu:0", n * S, {"power_w": 300.0 + n, "memory_bytes": 7e10}) for n in seconds]
    record.marks = [Mark(20 * S, "load fresh", S // 2, True, "200")]
    return record
