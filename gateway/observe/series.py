"""The relays' metrics as data: names, labels, units, buckets. Written by relays, rendered by control.

Cells are whole numbers, so a metric in seconds counts microseconds (`per_unit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MICROSECONDS = 1_000_000  # cell units in a second

_TTFT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_DURATION_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its Prometheus name (a counter's without `_total`) and how cells become its value."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    per_unit: int = 1
    buckets: tuple[float, ...] = ()  # upper bounds, in units; the last bucket, +Inf, is not listed

    @property
    def cells(self) -> int:
        """Cells that one labelled series takes: 1, or a histogram's buckets, +Inf and sum."""
        return len(self.buckets) + 2 if self.kind == "histogram" else 1

    @property
    def bounds(self) -> tuple[int, ...]:
        """The buckets' upper bounds in cell units."""
        return tuple(round(bound * self.per_unit) for bound in self.buckets)


REQUESTS = Metric(
    "tunegate_requests",
    "counter",
    "Requests answered. status is what the client met: 499 if it went away, the error's code if a stream broke.",
    ("route", "model", "status"),
)
PROMPT_TOKENS = Metric("tunegate_prompt_tokens", "counter", "Prompt tokens that engines reported.", ("model",))
COMPLETION_TOKENS = Metric(
    "tunegate_completion_tokens",
    "counter",
    "Tokens generated, as engines reported; of a stream cut short, the events passed on.",
    ("model",),
)
TTFT = Metric(
    "tunegate_time_to_first_token_seconds",
    "histogram",
    "From a streaming request's head to its first event.",
    ("model",),
    MICROSECONDS,
    _TTFT_S,
)
TOKEN_TIME = Metric(
    "tunegate_time_per_output_token_seconds",
    "histogram",
    "Mean time a token after the first, of each finished stream.",
    ("model",),
    MICROSECONDS,
    _TOKEN_S,
)
DURATION = Metric(
    "tunegate_request_duration_seconds",
    "histogram",
    "From a request's head to the end of its answer.",
    ("model",),
    MICROSECONDS,
    _DURATION_S,
)
IN_FLIGHT = Metric("tunegate_in_flight_requests", "gauge", "Requests that a replica is working on.", ("replica",))
DISCONNECTS = Metric("tunegate_client_disconnects", "counter", "Clients gone before their answer's end.", ("model",))
UPSTREAM_ERRORS = Metric(
    "tunegate_upstream_errors",
    "counter",
    "Failures of a replica: connect, lost, timeout, status, in_band, truncated, nonsense.",
    ("replica", "kind"),
)
KEEPALIVES = Metric("tunegate_keepalives", "counter", "Comments sent to keep silent streams open.", ("relay",))
RELAY_CPU = Metric(
    "tunegate_relay_cpu_seconds", "counter", "CPU time of a relay process.", ("relay",), per_unit=MICROSECONDS
)
ADAPTER_WAITING = Metric(
    "tunegate_adapter_waiting_requests", "gauge", "Requests that wait for their adapter to be loaded.", ("relay",)
)
ADAPTER_MISSES = Metric(
    "tunegate_adapter_misses", "counter", "Requests whose adapter was loaded nowhere when they came.", ("relay",)
)
QUEUE_DEPTH = Metric("tunegate_queue_depth", "gauge", "Requests that wait for room at a replica.", ("relay",))
QUEUE_WAIT = Metric(
    "tunegate_queue_wait_seconds",
    "histogram",
    "How long requests waited for room, of those that had to and were served.",
    (),
    MICROSECONDS,
    _DURATION_S,
)
REFUSALS = Metric(
    "tunegate_queue_refusals",
    "counter",
    "Requests told to come later: too_late (could not start in time), full, yielded (to another key), expired.",
    ("reason",),
)
RETRIES = Metric(
    "tunegate_retries",
    "counter",
    "Requests sent to another replica before the client had a byte, by what went wrong; no_budget: that were not.",
    ("reason",),
)
EJECTIONS = Metric(
    "tunegate_replica_ejections",
    "counter",
    "A relay stays away from a replica for a while: circuit (failures in a row), outlier (more than the others).",
    ("replica", "reason"),
)
CONTINUATIONS = Metric(
    "tunegate_stream_continuations",
    "counter",
    "Streams whose engine was lost: continued on another, or not: unfit (cannot be continued), failed.",
    ("outcome",),
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        REQUESTS,
        PROMPT_TOKENS,
        COMPLETION_TOKENS,
        TTFT,
        TOKEN_TIME,
        DURATION,
        IN_FLIGHT,
        DISCONNECTS,
        UPSTREAM_ERRORS,
        KEEPALIVES,
        RELAY_CPU,
        QUEUE_DEPTH,
        QUEUE_WAIT,
        REFUSALS,
        RETRIES,
        EJECTIONS,
        CONTINUATIONS,
        ADAPTER_WAITING,
        ADAPTER_MISSES,
    )
}
