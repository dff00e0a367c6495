"""One inference request from its body to the end of its answer: a state machine driven by both connections' events.

    body_end ─> decode, resolve ─> room? ─> pick, connect ─> send ─> upstream_head ─> upstream_data* ─> upstream_end
                                    └ wait ─┘       ^                     └ lost: once more, or the rest of the stream
                                                    └────────────────────────────────────────────────┘
    at any point: client_gone, upstream_lost, tick (silence), _too_late, stop

There is no task and nothing is awaited, so no event can arrive half way through another. Every path ends in `_over`,
once: it gives up the place in the queue, frees the in-flight slot, lets go of the engine's connection, and counts.
"""

from __future__ import annotations

import asyncio
import re
import time

from gateway.errors import EngineError, EngineTimeout, GatewayError, NotFound, PayloadTooLarge, Unavailable
from gateway.observe import series
from gateway.relay import resume
from gateway.relay.admit import seconds
from gateway.relay.answers import Usage, engine_error, error_event, stream_error, usage_of
from gateway.relay.client import ClientConnection
from gateway.relay.continuing import Continuing
from gateway.relay.http import EVENT_STREAM, JSON, Request
from gateway.relay.placing import LOADING
from gateway.relay.resume import ResumedStream, Transcript
from gateway.relay.route import Table
from gateway.relay.sse import KEEPALIVE, EventStream, EventTooLong, ResponsesStream
from gateway.relay.traffic import Endpoint, Traffic

KEEPALIVE_S = 15
_STALE_S = 1.0  # a kept connection that the engine had closed shows it at once; later, the request may have run
_MAX_REPLICAS_TRIED = 2
_ANY_MODEL = re.compile(rb'"model":\s*"(?:[^"\\]|\\.)*"')


class Inference(Continuing):
    """Handles one request and waits for its upstream answer (client.Handler and upstream.Sink)."""

    __slots__ = ("_content_type", "_expiry", "_first_s", "_pieces", "_resent")

    def __init__(
        self, client: ClientConnection, request: Request, endpoint: Endpoint, table: Table, traffic: Traffic
    ) -> None:
        """Raises PayloadTooLarge where the head already says so."""
        super().__init__(client, request, endpoint, table, traffic)
        if (request.declared_bytes or 0) > traffic.limits.max_body_bytes:
            raise self._too_large(request.declared_bytes)
        self._pieces: list[bytes] = []
        self._expiry: asyncio.TimerHandle | None = None
        self._resent = False
        self._content_type = b""
        self._first_s = 0.0
        client.want_body()

    # The client's side

    def body(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._traffic.limits.max_body_bytes:
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
            if self._awaits is None and self._ticket is None:
                if self._lost is not None:
                    self._find_heir(any_replica=True)
                return  # else the body is still coming, which the server watches
            if self._awaits is not None and self._route is not None and self._is_back():
                return
        self._silent_s += 1
        if self._candidate is not None and self._silent_s >= self._traffic.limits.request_timeout_s:
            self._silence()
            return
        if self._is_stream and not self._paused and self._silent_s % KEEPALIVE_S == 0:
            if self._awaits is not None and not self._started:
                self._request.limit_headers += LOADING
            self._start()
            self._client.write(KEEPALIVE)
            self._meter.keepalive()

    def stop(self) -> None:
        self._fail(Unavailable("The gateway is stopping."), "stopped")

    # Dispatch

    def _dispatch(self) -> None:
        self._read()
        self._check_task()
        headers, traffic = self._request.headers, self._traffic
        if headers.get(b"x-stainless-retry-count", b"0") == b"0":
            traffic.budget.requests += 1
        else:
            traffic.budget.charge(time.monotonic())
        timeout_s = seconds(headers.get(b"x-request-timeout-ms"), 1e-3)
        if timeout_s is not None:
            self._expires_s = self._request.started_s + timeout_s
            self._expiry = traffic.loop.call_later(self._expires_s - time.monotonic(), self._too_late)
        self._find_route()

    def _check_task(self) -> None:
        """An engine started for the other task may die of such a request. Raises NotFound."""
        task = self._endpoint.task
        if task not in (None, self._table.task):
            raise NotFound(
                f"{self._endpoint.path.decode()} is not served here: the model was started for the task "
                f"`{self._table.task}`, this needs `{task}` (--task)."
            )

    # The engine's side

    def upstream_unreachable(self, reason: str) -> None:
        self._connecting = None
        what = f"No replica can be reached for `{self._name}`: {reason}. Try again in a moment."
        self._broken(Unavailable(what), "connect")

    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status
        self._silent_s = 0
        self._content_type = headers.get(b"content-type", b"")
        if status != 200 or not self._content_type.startswith(b"text/event-stream"):
            return
        rename = self._rename
        if self._endpoint.stream == "responses":
            self._events = ResponsesStream(rename)
            return
        if self._lost is not None:
            self._resumed(rename)
            return
        self._events = EventStream(self._wants_usage, rename)
        assert self._head is not None
        if self._endpoint.stream == "chunks" and self._head.plain and len(self._body) <= resume.KEPT_BYTES:
            self._sent = Transcript()

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
                if self._sent is None:
                    self._body = b""  # no longer to be sent again
            self._client.write(out)
            sent = self._sent
            if sent is not None:
                sent.pieces.append(out)
                if len(sent.pieces) >= resume.FOLD_AT:
                    sent.fold()
                    if sent.unfit:
                        self._unfit, self._sent, self._body = sent.unfit, None, b""
        if events.done:
            self._start()
            self._leave_upstream()
            self._client.end()
            self._over(200, "ok")
        elif events.error is not None:
            assert self._candidate is not None
            if isinstance(events, ResumedStream) and events.strayed:
                self._strayed()
                return
            self._broken(stream_error(events.error, self._endpoint.path, self._name, self._candidate), "in_band")

    def upstream_end(self) -> None:
        self._upstream = None
        candidate = self._candidate
        assert candidate is not None
        if self._events is not None:
            self._broken(EngineError("The engine ended the stream before its answer was complete."), "truncated")
            return
        body = b"".join(self._answer)
        if self._lost is not None:
            self._aside(body)
            return
        if not 200 <= self._status < 300:
            self._broken(engine_error(self._status, body, self._endpoint.path, self._name, candidate), "status")
            return
        if self._started:
            self._broken(EngineError("The engine answered without a stream where one was asked for."), "nonsense")
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

    # The engine fails

    def _silence(self) -> None:
        timeout_s = self._traffic.limits.request_timeout_s
        if self._paused:
            self._client.abort()
            self._over(499, "client_stalled")
        else:
            self._broken(EngineTimeout(f"The engine was silent for {timeout_s} s."), "timeout")

    def _broken(self, error: GatewayError, kind: str) -> None:
        """The engine failed this request: another takes it over, or the client is told."""
        candidate = self._candidate
        assert candidate is not None
        if error.status < 500:  # it refused; the next one would too
            candidate.engine.health.answered()
            self._fail(error, "refused_by_engine")
            return
        self._release()
        self._meter.upstream_error(candidate.engine, kind)
        if candidate.engine.health.failed(time.monotonic(), certain=kind == "connect"):
            self._meter.count(series.EJECTIONS, candidate.engine.id, "circuit")
        self._tried.append(candidate)
        self._resent, self._status, self._content_type = False, 0, b""
        self._answer.clear()
        if self._first_s:
            self._go_on(error)
        else:
            self._try_again(error, kind)

    def _try_again(self, error: GatewayError, kind: str) -> None:
        """The client has nothing of the answer. What may have run is run again only where that has no effects.

        Where no other replica has its adapter, it waits until one has, or the same can be reached again.
        """
        assert self._route is not None
        self._events = None
        rest = tuple(other for other in self._route.candidates if other not in self._tried)
        may = kind == "connect" or (kind != "timeout" and not self._endpoint.has_effects)
        waits = not rest and self._table.loads(self._name)
        if waits and kind == "connect":
            self._tried.clear()
        if (rest or waits) and may and len(self._tried) < _MAX_REPLICAS_TRIED:
            if kind == "connect" or self._traffic.budget.take(time.monotonic()):
                self._meter.count(series.RETRIES, kind)
                try:
                    if waits:
                        self._await_load()
                    else:
                        self._seek(rest)
                except GatewayError as refusal:
                    self._fail(refusal, "engine_error")
                return
            self._meter.count(series.RETRIES, "no_budget")
        self._discourage(error)
        self._fail(error, "engine_error")

    # Ends

    def _too_late(self) -> None:
        """The client's own deadline is over."""
        self._expiry = None
        given = self._request.headers[b"x-request-timeout-ms"].decode("latin-1")
        self._fail(EngineTimeout(f"There is no answer within {given} ms (x-request-timeout-ms)."), "deadline")

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
        if self._awaits is not None:
            self._table.awaiting.leave(self._awaits, self)
        if self._ticket is not None:
            self._traffic.admission.forget(self._ticket)
            self._ticket = None
        if self._expiry is not None:
            self._expiry.cancel()
        if self._candidate is not None:
            if outcome == "ok":
                self._candidate.engine.health.answered()
            self._release()
        self._lost = None
        if self._route is None:
            self._meter.plain(self._request, self._endpoint.path.decode(), status, outcome)
            return
        prompt_tokens = completion_tokens = None
        events = self._events or self._before
        if events is not None:
            usage = events.usage
            completion_tokens = events.events  # of a stream cut short: what was passed on
        if usage is not None:
            prompt_tokens, completion_tokens = usage.prompt, usage.completion
        self._meter.inference(
            self._request,
            self._endpoint.path.decode(),
            self._route.label,
            self._replica,
            status,
            outcome,
            events is not None,
            prompt_tokens,
            completion_tokens,
            self._first_s,
            self._estimate(outcome) if usage is None else 0,
        )

    # Small things

    @property
    def _is_stream(self) -> bool:
        """Whether the client has the head of a stream, or may be sent it though there is no answer: while it waits."""
        if self._started or self._events is not None:
            return True
        head = self._head
        return self._candidate is None and self._endpoint.stream is not None and head is not None and bool(head.stream)

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
        limit = self._traffic.limits.max_body_bytes
        return PayloadTooLarge(f"The request's body has {size} bytes or more; this gateway takes up to {limit}.")
