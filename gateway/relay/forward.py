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
from gateway.relay.http import EVENT_STREAM, JSON, Request
from gateway.relay.placing import RESUME_WITHIN_S, Placing
from gateway.relay.resume import Rest, ResumedStream, Transcript, Unfit
from gateway.relay.route import Candidate, Table
from gateway.relay.sse import DONE, KEEPALIVE, EventStream, EventTooLong, ResponsesStream
from gateway.relay.traffic import Endpoint, Traffic

KEEPALIVE_S = 15
_STALE_S = 1.0  # a kept connection that the engine had closed shows it at once; later, the request may have run
_MAX_REPLICAS_TRIED = 2
_MAX_RESUMES = 3  # of one stream
_ANY_MODEL = re.compile(rb'"model":\s*"(?:[^"\\]|\\.)*"')


class Inference(Placing):
    """Handles one request and waits for its upstream answer (client.Handler and upstream.Sink)."""

    __slots__ = (
        "_answer", "_before", "_client", "_content_type", "_counting", "_events", "_expiry", "_first_s",
        "_lost_s", "_pieces", "_resent", "_resumes", "_resuming", "_sent", "_status", "_tried", "_unfit",
    )  # fmt: skip

    def __init__(
        self, client: ClientConnection, request: Request, endpoint: Endpoint, table: Table, traffic: Traffic
    ) -> None:
        """Raises PayloadTooLarge where the head already says so."""
        super().__init__(request, endpoint, table, traffic)
        if (request.declared_bytes or 0) > traffic.limits.max_body_bytes:
            raise self._too_large(request.declared_bytes)
        self._client = client
        self._pieces: list[bytes] = []
        self._expiry: asyncio.TimerHandle | None = None
        self._tried: list[Candidate] = []
        self._resent = False
        self._status = 0  # of the engine's answer, 0 until its head came
        self._content_type = b""
        self._answer: list[bytes] = []
        self._events: EventStream | None = None
        self._sent: Transcript | None = None  # of a stream that can be continued: what the client has
        self._lost_s = 0.0
        self._before: EventStream | None = None  # what the lost engine sent, while there is no other
        self._unfit = "only chats and completions of plain text are"  # why there is no `_sent`
        self._resuming: Rest | None = None
        self._counting = False  # the next engine is first asked how many tokens the prompt has
        self._resumes = 0
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

    # A stream goes on

    def _go_on(self, error: GatewayError) -> None:
        """The client has the beginning of a stream: find a replica for the rest, where there can be one."""
        if self._lost is None:
            self._lost, self._lost_s = error, time.monotonic()
            self._before, self._events = self._events, None
            try:
                if self._sent is None:
                    raise Unfit(self._unfit)
                if self._resumes >= _MAX_RESUMES:
                    raise Unfit(f"it was {_MAX_RESUMES} times before")
                chat = self._endpoint.path == b"/v1/chat/completions"
                self._resuming = resume.continuation(self._body, self._sent, chat)
            except Unfit as why:
                if self._sent is not None and self._sent.finished and not self._wants_usage:
                    self._client.write(DONE)
                    self._client.end()
                    self._over(200, "ok")
                else:
                    self._gone_for_good(error, "unfit", str(why))
                return
            self._counting = self._wants_usage and self._resuming.tokens > 0 and self._sent.prompt_tokens is None
            self._rest = resume.counting(self._body) if self._counting else self._resuming.body
        self._find_heir(any_replica=False)

    def _find_heir(self, any_replica: bool) -> None:
        """Send the request for the rest, if there is one to send it to. any_replica: also one that has lost it."""
        assert self._lost is not None
        now_s = time.monotonic()
        if now_s - self._lost_s > RESUME_WITHIN_S:
            self._gone_for_good(self._lost, "failed", f"no other replica was ready within {RESUME_WITHIN_S:g} s")
            return
        candidates = self._current_candidates()
        failed = [candidate.engine for candidate in self._tried]
        heirs = tuple(other for other in candidates if other.engine not in failed)
        if not heirs and any_replica:
            heirs = tuple(other for other in candidates if other.engine.health.avoid_until_s <= now_s)
        if heirs:
            try:
                self._seek(heirs)
            except GatewayError as refusal:
                self._gone_for_good(self._lost, "failed", refusal.message)

    def _aside(self, body: bytes) -> None:
        """An engine answered in one piece: how many tokens the prompt has, or why it does not go on."""
        candidate, sent, status = self._candidate, self._sent, self._status
        assert candidate is not None
        assert sent is not None
        assert self._lost is not None
        assert self._resuming is not None
        self._status = 0
        self._answer.clear()
        if status >= 500:
            self._broken(self._lost, "status")
        elif self._counting:
            if status == 200:
                try:
                    usage = usage_of(body)
                except EngineError as nonsense:
                    self._broken(nonsense, "nonsense")
                    return
                sent.prompt_tokens = usage.prompt if usage is not None else None
            self._counting = False
            self._rest = self._resuming.body
            self._connect(candidate)
        else:
            refusal = engine_error(status, body, self._endpoint.path, self._name, candidate).message
            self._gone_for_good(self._lost, "failed", f"another replica refused to: {refusal}")

    def _resumed(self, rename: tuple[re.Pattern[bytes], bytes] | None) -> None:
        """An engine goes on."""
        assert self._before is not None
        assert self._sent is not None
        assert self._resuming is not None
        if self._sent.id:
            self._events = ResumedStream(self._wants_usage, rename, self._sent, self._resuming, self._before.events)
        else:  # the client has no chunk of it
            self._events = EventStream(self._wants_usage, rename)
        self._lost = self._before = None
        self._resumes += 1
        self._tried.clear()
        self._meter.count(series.CONTINUATIONS, "continued")

    def _strayed(self) -> None:
        """The engine that goes on said something else in place of the last that was sent."""
        self._release()
        error = EngineError("The engine was lost while it answered.")
        self._gone_for_good(error, "failed", "the next engine said something else in place of the last words sent")

    def _gone_for_good(self, error: GatewayError, outcome: str, why: str) -> None:
        self._meter.count(series.CONTINUATIONS, outcome)
        error.message = f"{error.message.rstrip('.')}. The stream was not continued: {why.rstrip('.')}."
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
