"""Which of several replicas gets a request: pure functions over their loads, and the one that the operator chose.

    least_load    the fewest requests in flight, over all relays
    affinity      the replica that had this prompt's beginning before, while it carries no more than its share
    engine_load   the fewest in flight, corrected by what the engines themselves say: who queues, whose cache is full

Each takes lists with an item a replica and gives an index. docs/results/routing.md compares them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.observe.loads import Loads
    from gateway.relay.route import Candidate

BOUND = 1.25  # a replica's share of the load, as affinity lets it grow, over the mean
PREFIX_BYTES = 1024  # of a prompt, that decide where it goes
_SEARCHED_BYTES = 4096  # for the prompt's beginning: clients put little before it
_QUEUED = 2.0  # what a request that an engine queues weighs: it waits for room, where others only share time
_FULL = 0.9  # of the KV cache; from there on an engine throws out running requests
_FULL_WEIGHT = 8.0
_MASK = (1 << 64) - 1

ROUTINGS = ("least-load", "affinity", "engine-load")

Choose = Callable[["Sequence[Candidate]", Callable[[int], int], float, int, str | None, bytes], "Candidate"]


def least_load(loads: Sequence[float], turn: int) -> int:
    """The least loaded; equals take turns. turn: a number that grows from call to call."""
    least = min(loads)
    start = turn % len(loads)
    for index in range(start, len(loads)):
        if loads[index] == least:
            return index
    return loads.index(least)


def affinity(loads: Sequence[int], rows: Sequence[int], key: int) -> int:
    """The first in the key's own order of replicas that carries less than its bounded share.

    rows: what each replica is called for ever. A key's order changes as little as can be when replicas come and go.
    """
    most = math.ceil(BOUND * (sum(loads) + 1) / len(loads))
    ranks = [_rank(key, row) for row in rows]
    best = ranks.index(max(ranks))
    if loads[best] < most:
        return best
    order = sorted(range(len(rows)), key=ranks.__getitem__, reverse=True)
    return next(index for index in order if loads[index] < most)


def _rank(key: int, row: int) -> int:
    """Where a replica stands in a key's order; the same in every process. The constants are splitmix64's."""
    mixed = (key * 0xBF58476D1CE4E5B9 + (row + 1) * 0x9E3779B97F4A7C15) & _MASK
    return ((mixed ^ mixed >> 29) * 0x94D049BB133111EB) & _MASK


def engine_load(loads: Sequence[int], waiting: Sequence[int], kv_used: Sequence[float], turn: int) -> int:
    """The least loaded, where what an engine queues or has no memory for counts more.

    waiting: requests in the engines' own queues; kv_used: share of their KV caches in use. Both as of the last look.
    """
    scores = [
        load * (1 + used) + _QUEUED * queued + (_FULL_WEIGHT if used >= _FULL else 0.0)
        for load, queued, used in zip(loads, waiting, kv_used, strict=True)
    ]
    return least_load(scores, turn)


def prefix_key(adapter: str | None, body: bytes) -> int:
    """A number for an adapter and the beginning of a prompt, found in a request's bytes without decoding them.

    Of a chat it takes what comes before the end of the first user message, which stays the same from turn to turn.
    Engines share no cache between adapters, so the same text with another one is another key.
    """
    start = body.find(b'"messages"', 0, _SEARCHED_BYTES)
    if start < 0:
        start = max(0, body.find(b'"prompt"', 0, _SEARCHED_BYTES), body.find(b'"input"', 0, _SEARCHED_BYTES))
        end = start + PREFIX_BYTES
    else:
        end = start + PREFIX_BYTES
        user = body.find(b'"user"', start, end)
        if user >= 0 and (closed := body.find(b"}", user, end)) >= 0:
            end = closed
    return zlib.crc32(body[start:end], zlib.crc32(adapter.encode()) if adapter is not None else 0)


def chooser(routing: str, loads: Loads | None = None) -> Choose:
    """The operator's policy as a function of (candidates, in_flight, now_s, turn, adapter, body).

    in_flight: row -> requests over all relays. Replicas that just failed come last, whatever the policy says.
    """

    def choose(
        candidates: Sequence[Candidate],
        in_flight: Callable[[int], int],
        now_s: float,
        turn: int,
        adapter: str | None,
        body: bytes,
    ) -> Candidate:
        if len(candidates) == 1:
            return candidates[0]
        choices = [one for one in candidates if one.engine.health.avoid_until_s <= now_s] or candidates
        rows = [one.engine.row for one in choices]
        load = [in_flight(row) for row in rows]
        if routing == "affinity":
            return choices[affinity(load, rows, prefix_key(adapter, body))]
        if routing == "engine-load" and loads is not None:
            waiting, kv_used = loads.of(rows, now_s)
            return choices[engine_load(load, waiting, kv_used, turn)]
        return choices[least_load(load, turn)]

    return choose
