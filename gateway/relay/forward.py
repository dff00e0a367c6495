"""One inference request from its body to the end of its answer: a state machine driven by both connections' events.

    body_end ─> decode, resolve, pick ─> connect ─> send ─> upstream_head ─> upstream_data* ─> upstream_end
    at any point: client_gone, upstream_lost, tick (silence), stop

There is no task and nothing is awaited, so no event can arrive half way through another. Every path ends in `_over`,
once: it frees the in-flight slot, lets go of the engine's connection and counts the request.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import Literal

from gateway.errors import (
    EngineError,
    EngineTimeout,
    GatewayError,
    NotFound,
    PayloadTooLarge,
    Unavailable,
)
from gateway.relay.account import Meter, ModelCells
from gateway.relay.answers import Usage, engine_error, error_event, stream_error, usage_of
from gateway.relay.client import ClientConnection
from gateway.relay.http import EVENT_STREAM, JSON, Request
from gateway.relay.request import Head, decode, overridden, refuse_empty_prompt, with_usage
from gateway.relay.route import Candidate, Route, Table, pick
from gateway.relay.sse import KEEPALIVE, EventStream, EventTooLong, ResponsesStream
from gateway.relay.upstream import Connection

KEEPALIVE_S = 15
_STALE_S = 1.0  # a kept connection that the engine had closed shows it at once; later, the request may have run
_AVOID_S = 1.0  # how long a replica that refused a connection comes last
_MAX_REPLICAS_TRIED = 2
_ANY_MODEL = re.compile(rb'"model":\s*"(?:[^"\\]|\\.)*"')
_TRACE = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}").fullmatch


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An inference route: its path here and on the engines, and how it streams."""

    path: bytes
    task: str | None = None  # what an engine must have been started for; None: either
    stream: Literal["chunks", "responses"] | None = None
    absent_from: frozenset[str] = frozenset()  # backends whose engine has no such route
    names_checkpoint: frozenset[str] = frozenset()  # backends that answer with the checkpoint's path as `model`
    takes_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows."""

    max_body_bytes: int
    request_timeout_s: int  # longest silence of an engine, or of a client that does not read


class Inference:
    """Handles one request and waits for its upstream answer (client.Handler and upstream.Sink)."""

    __slots__ = (
        "_answer", "_body", "_candidate", "_client", "_connecting", "_content_type", "_endpoint", "_events", "_first_s",
        "_head", "_limits", "_meter", "_model", "_paused", "_pieces", "_request", "_resent", "_route", "_sent_s",
        "_silent_s", "_size", "_started", "_status", "_table", "_tried", "_upstream",
    )  # fmt: skip

    def __init__(
        self,
        client: ClientConnection,
        request: Request,
        endpoint: Endpoint,
        table: Table,
        meter: Meter,
        limits: Limits,
    ) -> None:
        """Raises PayloadTooLarge where the head already says so."""
        self._limits = limits
        if (request.declared_bytes or 0) > limits.max_body_bytes:
            raise self._too_large(request.declared_bytes)
        self._client = client
        self._request = request
        self._endpoint = endpoint
        self._table = table
        self._meter = meter
        self._pieces: list[bytes] = []
        self._size = 0
        self._body = b""
        self._head: Head | None = None
        self._route: Route | None = None
        self._model: ModelCells | None = None
        self._candidate: Candidate | None = None  # whose in-flight slot is held
        self._tried: list[Candidate] = []
        self._connecting: asyncio.Task[None] | None = None
        self._upstream: Connection | None = None
        self._resent = False
        self._sent_s = 0.0
        self._status = 0  # of the engine's answer, 0 until its head came
        self._content_type = b""
        self._answer: list[bytes] = []
        self._events: EventStream | None = None
        self._started = False  # the client has the head of a stream
        self._first_s = 0.0
        self._paused = False
        self._silent_s = 0
        client.want_body()

    # The client's side

    def body(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._limits.max_body_bytes:
            self._fail(self._too_large(self._size), "refused")
        else:
            self._pieces.append(data)

    def body_end(self) -> None:
        pieces, self._pieces = self._pieces, []
        self._body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        try:
            self._dispatch()
        except GatewayError as error:
            self._fail(error, "refused")

    def client_gone(self) -> None:
        self._over(499, "client_gone")

    def client_paused(self) -> None:
        self._paused = True
        if self._upstream is not None:
            self._upstream.pause()

    def client_resumed(self) -> None:
        self._paused = False
        self._silent_s = 0
        if self._upstream is not None:
            self._upstream.resume()

    def tick(self) -> None:
        if self._candidate is None:
            return  # the body is still coming; the server watches that
        self._silent_s += 1
        if self._silent_s >= self._limits.request_timeout_s:
            self._silence()
        elif self._events is not None and not self._paused and self._silent_s % KEEPALIVE_S == 0:
            self._start()
            self._client.write(KEEPALIVE)
            self._meter.keepalive()

    def stop(self) -> None:
        self._fail(Unavailable("The gateway is stopping."), "stopped")

    # Dispatch

    def _dispatch(self) -> None:
        self._head = decode(self._body)
        self._check_task()
        if self._endpoint.takes_prompt:
            refuse_empty_prompt(self._body)
        route = self._table.resolve(self._head.model)
        self._route = route
        self._model = self._meter.model(route.label)
        self._choose(route.candidates)

    def _check_task(self) -> None:
        """An engine started for the other task may die of such a request. Raises NotFound."""
        task = self._endpoint.task
        if task not in (None, self._table.task):
            raise NotFound(
                f"{self._endpoint.path.decode()} is not served here: the model was started for the task "
                f"`{self._table.task}`, this needs `{task}` (--task)."
            )

    def _choose(self, candidates: tuple[Candidate, ...]) -> None:
        """Take a slot of the least loaded replica and send it the request. Raises NotFound, Unavailable."""
        absent_from = self._endpoint.absent_from
        fit = tuple(c for c in candidates if c.engine.backend not in absent_from) if absent_from else candidates
        if not fit:
            backend = candidates[0].engine.backend
            raise NotFound(f"{self._endpoint.path.decode()} is not served here: {backend} has no such route.")
        candidate = fit[0]
        if len(fit) > 1:
            now_s = time.monotonic()
            self._meter.look(now_s)
            candidate = pick(fit, self._meter.in_flight, now_s, self._table.next_turn())
        self._candidate = candidate
        self._meter.enter(candidate.engine)
        self._silent_s = 0
        connection = candidate.engine.origin.take()
        if connection is None:
            self._connecting = candidate.engine.origin.connect(self)
        else:
            self.upstream_connected(connection)

    def _members(self, candidate: Candidate) -> bytes:
        """What is appended to the body: our name for the model, and usage at the end of a stream."""
        head = self._head
        assert head is not None
        if self._endpoint.stream == "chunks" and head.stream and not self._wants_usage:
            return candidate.override + with_usage(self._body, head.stream_options)
        return candidate.override

    @property
    def _wants_usage(self) -> bool:
        options = self._head.stream_options if self._head is not None else None
        return options is not None and bool(options.include_usage)

    # The engine's side

    def upstream_connected(self, connection: Connection) -> None:
        self._connecting = None
        candidate = self._candidate
        if candidate is None:  # over, in the very moment the connection came
            connection.abort()
            return
        members = self._members(candidate)
        body: list[bytes | memoryview] = overridden(self._body, members) if members else [self._body]
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
        connection.send(self, [head, *body])

    def upstream_unreachable(self, reason: str) -> None:
        self._connecting = None
        candidate = self._candidate
        assert candidate is not None
        assert self._route is not None
        candidate.engine.avoid_until_s = time.monotonic() + _AVOID_S
        self._meter.upstream_error(candidate.engine, "connect")
        self._meter.leave(candidate.engine)
        self._candidate = None
        self._tried.append(candidate)
        rest = tuple(c for c in self._route.candidates if c not in self._tried)
        try:
            if not rest or len(self._tried) >= _MAX_REPLICAS_TRIED:
                raise Unavailable(f"No replica can be reached for `{self._name}`: {reason}. Try again in a moment.")
            self._choose(rest)
        except GatewayError as error:
            self._fail(error, "engine_error")

    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status
        self._silent_s = 0
        self._body = b""  # no longer to be sent again
        self._content_type = headers.get(b"content-type", b"")
        if status != 200 or not self._content_type.startswith(b"text/event-stream"):
            return
        rename = self._rename
        if self._endpoint.stream == "responses":
            self._events = ResponsesStream(rename)
        else:
            self._events = EventStream(self._wants_usage, rename)

    def upstream_data(self, data: bytes) -> None:
        self._silent_s = 0
        events = self._events
        if events is None:
            self._answer.append(data)
            return
        try:
            out = events.feed(data)
        except EventTooLong as error:
            self._broken(EngineError(f"The engine sent {error}."), "nonsense")
            return
        if out:
            if not self._first_s:
                self._first_s = time.monotonic()
                self._start()
            self._client.write(out)
        if events.done:
            self._start()
            self._leave_upstream()
            self._client.end()
            self._over(200, "ok")
        elif events.error is not None:
            assert self._candidate is not None
            self._broken(stream_error(events.error, self._endpoint.path, self._name, self._candidate), "in_band")

    def upstream_end(self) -> None:
        self._upstream = None
        if self._events is not None:
            self._broken(EngineError("The engine ended the stream before its answer was complete."), "truncated")
            return
        body = b"".join(self._answer)
        candidate = self._candidate
        assert candidate is not None
        if not 200 <= self._status < 300:
            error = engine_error(self._status, body, self._endpoint.path, self._name, candidate)
            if error.status >= 500:
                self._broken(error, "status")
            else:
                self._fail(error, "refused_by_engine")
            return
        try:
            usage = usage_of(body)
        except EngineError as error:
            self._broken(error, "nonsense")
            return
        rename = self._rename
        if rename is not None:
            body = rename[0].sub(rename[1], body, count=1)
        self._client.answer(self._status, JSON, body)
        self._over(self._status, "ok", usage)

    def upstream_lost(self, reason: str) -> None:
        connection, self._upstream = self._upstream, None
        assert connection is not None
        assert self._candidate is not None
        stale = connection.reused and not connection.received
        if stale and not self._resent and time.monotonic() - self._sent_s < _STALE_S:
            self._resent = True
            self._connecting = self._candidate.engine.origin.connect(self)
            return
        where = "while it answered" if self._status else "before it answered"
        self._broken(EngineError(f"The connection to the engine was lost {where}: {reason}."), "lost")

    def upstream_paused(self) -> None:
        """The body is in memory as it is, and the transport keeps it: nothing to hold back."""

    def upstream_resumed(self) -> None:
        """See `upstream_paused`."""

    # Ends

    def _silence(self) -> None:
        timeout_s = self._limits.request_timeout_s
        if self._paused:
            self._client.abort()
            self._over(499, "client_stalled")
        else:
            self._broken(EngineTimeout(f"The engine was silent for {timeout_s} s."), "timeout")

    def _broken(self, error: GatewayError, kind: str) -> None:
        """The engine failed this request."""
        assert self._candidate is not None
        self._meter.upstream_error(self._candidate.engine, kind)
        self._fail(error, "engine_error")

    def _fail(self, error: GatewayError, outcome: str) -> None:
        """Tell the client, in a stream that has begun as an event, and finish."""
        if self._started:
            self._client.write(error_event(error))
            self._client.end()
        else:
            self._client.answer_error(error)
        self._over(error.status, outcome)

    def _over(self, status: int, outcome: str, usage: Usage | None = None) -> None:
        """Free and count. The only place that does; called once."""
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._upstream is not None:
            self._upstream.abort()  # the engine takes it as the order to stop
            self._upstream = None
        candidate, self._candidate = self._candidate, None
        if candidate is not None:
            self._meter.leave(candidate.engine)
        if self._model is None:
            self._meter.plain(self._request, self._endpoint.path.decode(), status, outcome)
            return
        prompt_tokens = completion_tokens = None
        events = self._events
        if events is not None:
            usage = events.usage
            completion_tokens = events.events  # of a stream cut short: what was passed on
        if usage is not None:
            prompt_tokens, completion_tokens = usage.prompt, usage.completion
        self._meter.inference(
            self._request,
            self._endpoint.path.decode(),
            self._model,
            candidate.engine.id if candidate is not None else None,
            status,
            outcome,
            events is not None,
            prompt_tokens,
            completion_tokens,
            self._first_s,
        )

    # Small things

    @property
    def _name(self) -> str:
        assert self._head is not None
        return self._head.model

    @property
    def _rename(self) -> tuple[re.Pattern[bytes], bytes] | None:
        assert self._candidate is not None
        assert self._route is not None
        if self._candidate.engine.backend in self._endpoint.names_checkpoint:
            return _ANY_MODEL, self._route.public
        pattern = self._candidate.engine_name
        return (pattern, self._route.public) if pattern is not None else None

    def _start(self) -> None:
        """Send the head of a stream, with whatever is written next."""
        if not self._started:
            self._started = True
            self._client.start(200, EVENT_STREAM)

    def _leave_upstream(self) -> None:
        if self._upstream is not None:
            if self._paused:
                self._upstream.resume()
            self._upstream.leave()
            self._upstream = None

    def _too_large(self, size: int | None) -> PayloadTooLarge:
        limit = self._limits.max_body_bytes
        return PayloadTooLarge(f"The request's body has {size} bytes or more; this gateway takes up to {limit}.")
