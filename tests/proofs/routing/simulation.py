"""Requests, replicas and a policy put together; what came of it."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.relay.policy import affinity, engine_load, least_load, prefix_key
from tests.proofs.routing.engine import Ask, Engine, Speed

LOOK_S = 1.0  # how old what engines say may be

Route = Callable[["Sequence[Engine]", Ask, int, "Seen"], int]


@dataclass
class Seen:
    """What the engines said when they were last asked."""

    at_s: float
    waiting: list[int]
    kv_used: list[float]


def _round_robin(engines: Sequence[Engine], ask: Ask, turn: int, seen: Seen) -> int:
    return turn % len(engines)


def _least_load(engines: Sequence[Engine], ask: Ask, turn: int, seen: Seen) -> int:
    return least_load([engine.in_flight for engine in engines], turn)


def _affinity(engines: Sequence[Engine], ask: Ask, turn: int, seen: Seen) -> int:
    loads = [engine.in_flight for engine in engines]
    return affinity(loads, range(len(engines)), prefix_key(ask.adapter, ask.body))


def _engine_load(engines: Sequence[Engine], ask: Ask, turn: int, seen: Seen) -> int:
    return engine_load([engine.in_flight for engine in engines], seen.waiting, seen.kv_used, turn)


POLICIES: dict[str, Route] = {
    "round-robin": _round_robin,
    "least-load": _least_load,
    "affinity": _affinity,
    "engine-load": _engine_load,
}


@dataclass(frozen=True)
class Outcome:
    """What a policy came to."""

    requests: int
    hit_rate: float  # of prompt blocks
    ttft_p50_ms: float
    ttft_p99_ms: float
    latency_p50_s: float
    fairness: float  # Jain's index over the tenants' mean slowness: 1 is even
    imbalance: float  # most requests at a replica over the mean


def simulate(asks: Sequence[Ask], route: Route, replicas: int, speed: Speed | None = None) -> list[Ask]:
    """Send each request to a replica, and run all of them to their ends. Gives them in the order of their ends."""
    engines = [Engine(speed or Speed()) for _ in range(replicas)]
    seen = Seen(0.0, [0] * replicas, [0.0] * replicas)
    turns = itertools.count()
    done: list[Ask] = []
    due: list[tuple[float, int]] = []  # (when, which) engine begins its next step

    def run_until(at_s: float) -> None:
        while due and due[0][0] <= at_s:
            _, which = heapq.heappop(due)
            engine = engines[which]
            done.extend(engine.step())
            if engine.in_flight:
                heapq.heappush(due, (engine.now_s, which))

    for ask in asks:
        run_until(ask.arrived_s)
        if ask.arrived_s - seen.at_s >= LOOK_S:
            seen = Seen(
                ask.arrived_s, [len(engine.waiting) for engine in engines], [engine.kv_used for engine in engines]
            )
        which = route(engines, ask, next(turns), seen)
        idle = not engines[which].in_flight
        engines[which].add(ask)
        if idle:
            heapq.heappush(due, (engines[which].now_s, which))
        ask.replica = which
    run_until(float("inf"))
    return done


def judge(done: Sequence[Ask], replicas: int) -> Outcome:
    """The figures of a finished run."""
    first = sorted(ask.first_s - ask.arrived_s for ask in done)
    whole = sorted(ask.done_s - ask.arrived_s for ask in done)
    blocks = sum(len(ask.blocks) for ask in done)
    slowness = defaultdict(list)
    for ask in done:
        slowness[ask.tenant].append((ask.done_s - ask.arrived_s) / ask.answer_tokens)
    means = [sum(values) / len(values) for values in slowness.values()]
    at = [sum(1 for ask in done if ask.replica == which) for which in range(replicas)]
    return Outcome(
        requests=len(done),
        hit_rate=sum(ask.cached_blocks for ask in done) / blocks,
        ttft_p50_ms=first[len(first) // 2] * 1e3,
        ttft_p99_ms=first[len(first) * 99 // 100] * 1e3,
        latency_p50_s=whole[len(whole) // 2],
        fairness=sum(means) ** 2 / (len(means) * sum(mean * mean for mean in means)),
        imbalance=max(at) / (sum(at) / replicas),
    )
