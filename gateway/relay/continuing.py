"""A stream that has lost its engine: another one is found and asked for the rest, or the client is told why not.

_go_on ─> _find_heir ─> (placing: a slot, a connection) ─> _aside: counts the prompt's tokens, or refuses
              ^ each second, while there is none        └> _resumed: the rest comes, as one stream with the beginning

What can be continued, and how another engine is asked to, is resume.py's to say.
"""

from __future__ import annotations

import re
import time

from gateway.errors import EngineError, GatewayError
from gateway.observe import series
from gateway.relay import resume
from gateway.relay.answers import Usage, engine_error, usage_of
from gateway.relay.client import ClientConnection
from gateway.relay.http import Request
from gateway.relay.placing import RESUME_WITHIN_S, Placing
from gateway.relay.resume import Rest, ResumedStream, Transcript, Unfit
from gateway.relay.route import Candidate, Table
from gateway.relay.sse import DONE, EventStream
from gateway.relay.traffic import Endpoint, Traffic

_MAX_RESUMES = 3  # of one stream


class Continuing(Placing):
    """The part of an inference request that outlives its engine; forward.Inference calls it, and is the rest."""

    __slots__ = (
        "_answer", "_before", "_client", "_counting", "_events", "_lost_s", "_resumes", "_resuming", "_sent", "_status",
        "_tried", "_unfit",
    )  # fmt: skip

    def __init__(
        self, client: ClientConnection, request: Request, endpoint: Endpoint, table: Table, traffic: Traffic
    ) -> None:
        super().__init__(request, endpoint, table, traffic)
        self._client = client
        self._tried: list[Candidate] = []
        self._status = 0  # of the engine's answer, 0 until its head came
        self._answer: list[bytes] = []  # of an engine that answers in one piece
        self._events: EventStream | None = None
        self._sent: Transcript | None = None  # of a stream that can be continued: what the client has
        self._lost_s = 0.0
        self._before: EventStream | None = None  # what the lost engine sent, while there is no other
        self._unfit = "only chats and completions of plain text are"  # why there is no `_sent`
        self._resuming: Rest | None = None
        self._counting = False  # the next engine is first asked how many tokens the prompt has
        self._resumes = 0

    def _broken(self, error: GatewayError, kind: str) -> None:
        raise NotImplementedError

    def _over(self, status: int, outcome: str, usage: Usage | None = None) -> None:
        raise NotImplementedError

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
