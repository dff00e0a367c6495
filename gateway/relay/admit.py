"""Admission: a request goes to a replica while that has room, else it waits its turn, or is told at once to come later.

    room ─> forward        no room ─> can it start in time? ─> FairQueue ─> a slot comes free ─> forward
                                       └ no: 503 with retry-after-ms

Room is counted over all relays in the shared cells (`--max-in-flight` a replica). Each relay queues its own clients.
A slot that a relay frees is its own to give away, so long as it holds no more than its share: while others wait too,
that is the replica's room divided by the relays that wait. What it may not keep the others find within _POLL_S.
Two relays may take the last slot in the same instant: a replica can be over its room by one a relay, for a moment.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from gateway.errors import GatewayError, Overloaded, RateLimited
from gateway.observe import series
from gateway.relay.account import Meter
from gateway.relay.fair import FairQueue, Ticket
from gateway.relay.http import Request
from gateway.relay.route import Candidate, Engine
from gateway.relay.waiters import Breakable, tell

BATCH_PRIORITY = -1_000_000  # below every key's
RESUME_PRIORITY = 1_000_000  # a stream that has begun and lost its engine
_POLL_S = 0.005
_EXACT_BELOW = 64
_WAITING_BYTES = 64_000_000  # of request bodies, a relay
_RATE_S = 5.0  # over which the service rate is taken
_RETRY_AFTER_MS = (250, 60_000)  # the least and the most that a client is told
BYTES_A_TOKEN = 4
_ANSWER_TOKENS = 256  # where a request does not say
_MOST_ANSWER_TOKENS = 1_000_000  # that are believed


@dataclass(frozen=True, slots=True)
class Room:
    """What the operator allows."""

    max_in_flight: int  # a replica, over all relays
    max_waiting: int  # a relay
    max_wait_s: float


class Waiter(Breakable, Protocol):
    """A request that may have to wait."""

    def fitting(self) -> Sequence[Candidate]:
        """Who could answer it."""

    def admitted(self, candidates: Sequence[Candidate]) -> None:
        """Its turn has come; these have room."""

    def turned_away(self, error: GatewayError) -> None:
        """It waited in vain."""

    def rerouted(self) -> None:
        """Who serves what has changed."""


class Rate:
    """How fast the queue is served lately. Pure; times are monotonic seconds."""

    def __init__(self) -> None:
        self._count = 0.0  # decayed
        self._counted_s = 0.0
        self._began_s = 0.0

    def began(self, now_s: float) -> None:
        """The queue was empty, and is no longer."""
        if now_s - self._counted_s > _RATE_S:
            self._count, self._began_s, self._counted_s = 0.0, now_s, now_s

    def served(self, now_s: float) -> None:
        """One of the queue got its slot."""
        self._count = self._decayed(now_s) + 1
        self._counted_s = now_s

    def per_s(self, now_s: float) -> float | None:
        """Requests a second; None while there is nothing to go by."""
        known_s = now_s - self._began_s
        if not self._count or known_s < 0.1:
            return None
        return self._decayed(now_s) / _RATE_S / (1 - math.exp(-known_s / _RATE_S))

    def _decayed(self, now_s: float) -> float:
        return self._count * math.exp((self._counted_s - now_s) / _RATE_S)


class Admission:
    """One relay's door. `waiting` is what the token path looks at; 0 nearly always."""

    def __init__(self, meter: Meter, room: Room, loop: asyncio.AbstractEventLoop) -> None:
        self.waiting = 0
        self._meter = meter
        self._room = room
        self._loop = loop
        # Below it the others' counts may be some ms old: no look at each relay's cells for each request.
        self._plenty = room.max_in_flight // 2 if room.max_in_flight >= _EXACT_BELOW else 0
        self._queue = FairQueue()
        self._rate = Rate()
        self._found: list[Candidate] = []
        self._pumping = False
        self._polling: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Admission {self._queue!r}>"

    def has_room(self, engine: Engine) -> bool:
        """Whether a request may go to that replica now."""
        if self._meter.in_flight(engine.row) < self._plenty:
            return True
        own, others = self._meter.load(engine.row)
        most = self._room.max_in_flight
        if own + others >= most:
            return False
        rivals = self._meter.rivals()
        return not rivals or own < max(1, most // (rivals + 1))

    def wait(self, ticket: Ticket) -> None:
        """Queue up; the waiter is told when its turn comes, which may be at once. Raises Overloaded, RateLimited."""
        if ticket.priority != RESUME_PRIORITY:
            self._check(ticket)
        if not self._queue.waiting:
            self._rate.began(ticket.since_s)
        self._queue.add(ticket)
        self.pump()

    def forget(self, ticket: Ticket) -> None:
        """The waiter is no longer interested."""
        self._queue.remove(ticket)
        self._say_waiting()

    def pump(self) -> None:
        """Give away what room there is. Called when a slot comes free, and when what has room may have changed."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._queue.waiting and (ticket := self._queue.take(self._fits)) is not None:
                now_s = time.monotonic()
                self._rate.served(now_s)
                self._meter.waited(now_s - ticket.since_s)
                tell(ticket.waiter, ticket.waiter.admitted, self._found)
        finally:
            self._pumping = False
        self._say_waiting()
        if self._queue.waiting and self._polling is None and self._meter.has_peers:
            self._polling = self._loop.call_later(_POLL_S, self._poll)

    def tick(self) -> None:
        """A second has passed."""
        if self.waiting:
            now_s = time.monotonic()
            for ticket in [ticket for ticket in self._queue if ticket.deadline_s <= now_s]:
                self._queue.remove(ticket)
                refusal = self._refusal("expired", now_s - ticket.since_s, 0.0)
                tell(ticket.waiter, ticket.waiter.turned_away, refusal)
            self.pump()  # a replica may be avoided no longer

    def reroute(self) -> None:
        """The routes have changed."""
        if self.waiting:
            for ticket in list(self._queue):
                tell(ticket.waiter, ticket.waiter.rerouted)
            self.pump()

    def _fits(self, ticket: Ticket) -> bool:
        self._found = [candidate for candidate in ticket.waiter.fitting() if self.has_room(candidate.engine)]
        return bool(self._found)

    def _poll(self) -> None:
        self._polling = None
        self.pump()

    def _say_waiting(self) -> None:
        self.waiting = self._queue.waiting
        self._meter.queued(self.waiting, self._queue.above(BATCH_PRIORITY))

    def _check(self, ticket: Ticket) -> None:
        """Whether it could be served in time, and there is a place for it."""
        queue, now_s = self._queue, ticket.since_s
        left_s = ticket.deadline_s - now_s
        rate = self._rate.per_s(now_s)
        if queue.waiting and rate is not None:
            wait_s = (queue.ahead(ticket.key, ticket.priority) + 1) / max(rate, 1e-9)
            if wait_s > left_s:
                raise self._refusal("too_late", wait_s, left_s)
        wait_s = queue.waiting / rate if rate else 1.0
        yielding: list[Ticket] = []
        while queue.waiting >= self._room.max_waiting or queue.bytes + ticket.bytes > _WAITING_BYTES:
            other = queue.yielding(ticket.key, ticket.priority)
            if other is None:
                for kept in reversed(yielding):  # in vain: back to their places, which were the last ones
                    queue.add(kept)
                raise self._refusal("full", wait_s, 0.0)
            queue.remove(other)
            yielding.append(other)
        for other in yielding:
            tell(other.waiter, other.waiter.turned_away, self._refusal("yielded", wait_s, 0.0))

    def _refusal(self, reason: str, wait_s: float, left_s: float) -> GatewayError:
        self._meter.count(series.REFUSALS, reason)
        least, most = _RETRY_AFTER_MS
        error: GatewayError
        if reason == "yielded":
            error = RateLimited("Too many of your requests wait here, and others have none. Send fewer at a time.")
        elif reason == "too_late":
            error = Overloaded(
                f"All replicas are busy: this request would wait for about {min(wait_s, 1e6):.1f} s, "
                f"and has {left_s:.1f} s. Try again later."
            )
        elif reason == "expired":
            error = Overloaded(f"All replicas were busy for the {wait_s:.1f} s that this request could wait.")
        else:
            error = Overloaded(f"All replicas are busy, and {self._queue.waiting} requests wait already.")
        after_ms = min(max((wait_s - left_s) * 1e3, least), most) * random.uniform(1.0, 1.25)  # noqa: S311 - no herd
        error.retry_after_ms = int(after_ms)
        return error


# What a ticket says


class _Size(msgspec.Struct):
    max_tokens: Any = None
    max_completion_tokens: Any = None


_decode_size = msgspec.json.Decoder(_Size).decode


def ticket_for(waiter: Waiter, request: Request, adapter: str | None, body: bytes, max_wait_s: float) -> Ticket:
    """A place in the queue for a request, from its headers and body (which is known to be a JSON object)."""
    now_s = time.monotonic()
    account = request.account
    priority = account.key.priority if account is not None else 0
    if request.headers.get(b"x-priority", b"").lower() == b"batch":
        priority = BATCH_PRIORITY
    read_s = seconds(request.headers.get(b"x-stainless-read-timeout"))
    deadline_s = now_s + max_wait_s
    if read_s is not None:
        deadline_s = min(deadline_s, request.started_s + read_s)
    cost = len(body) / BYTES_A_TOKEN + _answer_tokens(body)
    return Ticket(waiter, request.key_id, adapter, priority, cost, len(body), now_s, deadline_s)


def _answer_tokens(body: bytes) -> int:
    """How many tokens the answer may have; an estimate where the body does not say so in a way that can be read."""
    try:
        size = _decode_size(body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _ANSWER_TOKENS  # the engine will refuse it
    tokens = size.max_completion_tokens or size.max_tokens
    return min(tokens, _MOST_ANSWER_TOKENS) if isinstance(tokens, int) and tokens > 0 else _ANSWER_TOKENS


def seconds(header: bytes | None, unit: float = 1.0) -> float | None:
    """A header's time in s; None where there is none, or what is no positive number. unit: of the header, in s."""
    if not header:
        return None
    try:
        value = float(header) * unit
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
