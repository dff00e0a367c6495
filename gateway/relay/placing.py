"""How a request comes to a replica: its route, a place in the queue where there is no room, a slot, a connection.

find_route ─> seek ─> go ─> upstream_connected: the request is sent
               └ no room: Ticket ─> admitted ─^
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence

from gateway.errors import GatewayError, InternalError, NotFound
from gateway.relay.admit import BYTES_A_TOKEN, RESUME_PRIORITY, ticket_for
from gateway.relay.awaiting import NotResident
from gateway.relay.fair import Ticket
from gateway.relay.http import Request
from gateway.relay.request import Head, decode, overridden, refuse_empty_prompt, with_usage
from gateway.relay.route import Candidate, Route, Table
from gateway.relay.traffic import Endpoint, Traffic
from gateway.relay.upstream import Connection

RESUME_WITHIN_S = 15.0  # how long a stream that lost its engine waits for a replica to go on with it
_TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}").fullmatch

_CHARGED = frozenset({"ok", "client_gone", "client_stalled", "deadline"})  # outcomes that are no failure of ours
_LOADED = b"x-tunegate-adapter: loaded\r\n"  # tells a client why its answer took longer
LOADING = b"x-tunegate-adapter: loading\r\n"  # the same in a head that is sent before the load is over


class Placing:
    """The half of an inference request that seeks a replica and holds its slot (admit.Waiter, awaiting.Waiter).

    The other half, forward.Inference, is told nothing: it finds `_candidate` set, or `_fail` called.
    """

    __slots__ = (
        "_awaits", "_awaits_since_s", "_body", "_candidate", "_choices", "_connecting", "_endpoint", "_expires_s",
        "_head", "_lost", "_meter", "_paused", "_replica", "_request", "_rest", "_route", "_sent_s",
        "_silent_s", "_size", "_started", "_table", "_ticket", "_traffic", "_upstream", "_usage_members",
    )  # fmt: skip

    def __init__(self, request: Request, endpoint: Endpoint, table: Table, traffic: Traffic) -> None:
        self._request = request
        self._endpoint = endpoint
        self._table = table
        self._traffic = traffic
        self._meter = traffic.meter
        self._size = 0  # of the body in bytes, as far as it came
        self._body = b""
        self._rest = b""  # what the next engine is asked instead of `_body`
        self._head: Head | None = None
        self._usage_members = b""  # appended, so that a stream ends with usage
        self._expires_s = 0.0  # monotonic, where the client gave a deadline
        self._awaits: str | None = None  # the name that it waits for, whose adapter is loaded nowhere
        self._awaits_since_s = 0.0  # when it first did; it waits no longer for being parked twice
        self._route: Route | None = None
        self._choices: Sequence[Candidate] = ()  # while it waits for room
        self._ticket: Ticket | None = None  # its place in the queue
        self._candidate: Candidate | None = None  # whose in-flight slot is held
        self._replica: str | None = None  # the last one it was sent to
        self._connecting: asyncio.Task[None] | None = None
        self._upstream: Connection | None = None
        self._sent_s = 0.0
        self._silent_s = 0
        self._started = False  # the client has the head of a stream
        self._lost: GatewayError | None = None  # why a stream that has begun is without an engine, while it is
        self._paused = False  # the client does not read

    def _fail(self, error: GatewayError, outcome: str) -> None:
        raise NotImplementedError

    def broke(self) -> None:
        """A defect of ours was met while it waited."""
        self._fail(InternalError("The gateway failed on this request. Its log says why."), "defect")

    def _read(self) -> None:
        """Decode what there is to decode, before a place or a slot is held. Raises InvalidRequest."""
        head = self._head = decode(self._body)
        if self._endpoint.takes_prompt:
            refuse_empty_prompt(self._body)
        if self._endpoint.stream == "chunks" and head.stream and not self._wants_usage:
            self._usage_members = with_usage(self._body, head.stream_options)

    def _find_route(self) -> None:
        """Send it to where its model is; where that is nowhere yet, wait. Raises NotFound, Unavailable, RateLimited."""
        assert self._head is not None
        try:
            route = self._table.resolve(self._head.model)
        except NotResident:
            self._await_load()
            return
        if route.split is not None:
            route = route.split.choose(route, self._body, self._request)
        self._route = route
        self._seek(route.candidates)

    def _await_load(self) -> None:
        """Wait for its adapter to be loaded. Raises Unavailable when too many wait."""
        self._awaits_since_s = self._awaits_since_s or time.monotonic()
        self._table.awaiting.park(self._name, self, self._awaits_since_s)
        self._awaits = self._name

    @property
    def parked_key(self) -> str | None:
        return self._request.key_id

    @property
    def parked_bytes(self) -> int:
        return self._size

    def adapter_loaded(self, table: Table) -> None:
        self._awaits = None
        self._table = table
        try:
            self._find_route()
        except GatewayError as error:
            self._fail(error, "refused")
            return
        if self._awaits is None and _LOADED not in self._request.limit_headers:
            self._request.limit_headers += _LOADED

    def _is_back(self) -> bool:
        """It waits though it had a replica: whether that takes requests again, and it is on its way there, or over."""
        now_s = time.monotonic()
        back = tuple(other for other in self._current_candidates() if other.engine.health.avoid_until_s <= now_s)
        if not back:
            return False
        assert self._awaits is not None
        self._table.awaiting.leave(self._awaits, self)
        self._awaits = None
        try:
            self._seek(back)
        except GatewayError as error:
            self._fail(error, "refused")
        return True

    def adapter_not_loaded(self, error: GatewayError) -> None:
        self._awaits = None
        self._fail(error, "adapter_not_loaded")

    def _seek(self, candidates: Sequence[Candidate]) -> None:
        """Go to one of these, or wait for room at one. Raises NotFound, Overloaded, RateLimited."""
        fit = self._fit(candidates)
        if not fit:
            backend = candidates[0].engine.backend
            raise NotFound(f"{self._endpoint.path.decode()} is not served here: {backend} has no such route.")
        admission = self._traffic.admission
        if not admission.waiting:
            candidate = self._pick(fit)
            if admission.has_room(candidate.engine):
                self._go(candidate)
                return
            roomy = [other for other in fit if other is not candidate and admission.has_room(other.engine)]
            if roomy:
                self._go(self._pick(roomy))
                return
        self._choices = fit
        assert self._route is not None
        max_wait_s = self._traffic.limits.max_wait_s
        ticket = ticket_for(self, self._request, self._route.adapter, self._body, max_wait_s)
        if self._lost is not None:
            ticket.priority, ticket.deadline_s = RESUME_PRIORITY, ticket.since_s + RESUME_WITHIN_S
        if self._expires_s:
            ticket.deadline_s = min(ticket.deadline_s, self._expires_s)
        self._ticket = ticket
        try:
            admission.wait(ticket)
        except GatewayError as error:
            self._ticket = None
            self._discourage(error)
            raise

    def _fit(self, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Those whose engine has such a route."""
        absent_from = self._endpoint.absent_from
        return tuple(c for c in candidates if c.engine.backend not in absent_from) if absent_from else candidates

    def _pick(self, fit: Sequence[Candidate]) -> Candidate:
        now_s = time.monotonic()
        self._meter.look(now_s)
        if len(fit) == 1:
            return fit[0]
        assert self._route is not None
        turn, adapter = self._table.next_turn(), self._route.adapter
        return self._traffic.choose(fit, self._meter.in_flight, now_s, turn, adapter, self._body)

    def fitting(self) -> Sequence[Candidate]:
        return self._choices

    def admitted(self, candidates: Sequence[Candidate]) -> None:
        self._ticket = None
        self._go(self._pick(candidates))

    def turned_away(self, error: GatewayError) -> None:
        self._ticket = None
        self._discourage(error)
        self._fail(error, "refused")

    def rerouted(self) -> None:
        candidates = self._fit(self._current_candidates())
        if candidates:
            self._choices = candidates
        elif self._ticket is not None and self._table.loads(self._name):  # unloaded while it queued
            self._traffic.admission.forget(self._ticket)
            self._ticket = None
            if self._lost is None:
                try:
                    self._await_load()
                except GatewayError as error:
                    self._fail(error, "refused")

    def _go(self, candidate: Candidate) -> None:
        """Take its slot and a connection to it."""
        engine = candidate.engine
        self._candidate = candidate
        self._replica = engine.id
        self._meter.enter(candidate)
        if engine.health.failures:
            engine.health.begins(time.monotonic())
        self._connect(candidate)

    def _connect(self, candidate: Candidate) -> None:
        self._silent_s = 0
        connection = candidate.engine.origin.take()
        if connection is None:
            self._connecting = candidate.engine.origin.connect(self)  # type: ignore[arg-type]  # the other half is one
        else:
            self.upstream_connected(connection)

    def _members(self, candidate: Candidate) -> bytes:
        """What is appended to the body: our name for the model, and usage at the end of a stream."""
        return candidate.override + self._usage_members

    @property
    def _wants_usage(self) -> bool:
        options = self._head.stream_options if self._head is not None else None
        return options is not None and bool(options.include_usage)

    def _current_candidates(self) -> tuple[Candidate, ...]:
        """Who answers now for what this request was sent to; none if its name means something else by now."""
        table, before = self._traffic.table, self._route
        assert before is not None
        try:
            route = table.resolve(self._name) if table is not None else before
        except NotResident:
            self._table.awaiting.want(self._name)  # a stream that goes on is not parked: it looks every second
            return ()
        except GatewayError:
            return ()
        if route.split is not None and route.split.canary.adapter == before.adapter:
            route = route.split.canary
        return route.candidates if route.adapter == before.adapter else ()

    def upstream_connected(self, connection: Connection) -> None:
        self._connecting = None
        candidate = self._candidate
        if candidate is None:  # over, in the very moment the connection came
            connection.abort()
            return
        members = self._members(candidate)
        asked = self._rest or self._body
        body: list[bytes | memoryview] = overridden(asked, members) if members else [asked]
        trace = self._request.headers.get(b"traceparent", b"")
        head = b"POST %b HTTP/1.1\r\n%bx-request-id: %b\r\ncontent-length: %d\r\n%b\r\n" % (
            self._endpoint.path,
            candidate.engine.head,
            self._request.id,
            sum(map(len, body)),
            b"traceparent: %b\r\n" % trace if trace and _TRACE(trace) else b"",
        )
        self._upstream = connection
        self._sent_s = time.monotonic()
        connection.send(self, [head, *body])  # type: ignore[arg-type]  # as above
        if self._paused:
            connection.pause()

    def _estimate(self, outcome: str) -> int:
        """Prompt tokens to charge where no engine counted them: who leaves before the end pays for the work too."""
        if not self._sent_s or self._endpoint.task is None or outcome not in _CHARGED:
            return 0
        return self._size // BYTES_A_TOKEN

    def _discourage(self, error: GatewayError) -> None:
        """Tell the client not to try again either, once there have been too many retries."""
        if self._traffic.budget.spent(time.monotonic()):
            error.should_retry = False

    def _release(self) -> None:
        """Let go of the replica: what it does for this request ends, and its slot is free."""
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._upstream is not None:
            self._upstream.abort()  # the engine takes it as the order to stop
            self._upstream = None
        candidate, self._candidate = self._candidate, None
        if candidate is not None:
            self._meter.leave(candidate)
            if self._traffic.admission.waiting:
                self._traffic.admission.pump()

    @property
    def _name(self) -> str:
        assert self._head is not None
        return self._head.model
