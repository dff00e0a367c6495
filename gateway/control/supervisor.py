"""Keeps one replica running: adopt or start, wait until it answers, watch, start again with growing delays."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2

from backends import upstream
from backends.base import BackendError, EngineUnreachable
from backends.process import EngineStartError
from gateway.control.hosting import Engine, Host
from gateway.control.replica import Replica, State
from gateway.control.timings import Timings

_log = logging.getLogger(__name__)
_SHOWN_LOG_LINES = 5


@dataclass(frozen=True, slots=True)
class Duties:
    """What others do at points of a replica's life."""

    static_adapters: Callable[[], Mapping[str, Path]]  # for an engine that takes adapters only at its start
    start_failed: Callable[[Replica, frozenset[str], str], Awaitable[None]]  # with these static adapters, for a reason
    keep_adapters: Callable[[Replica], Awaitable[None]]  # runs while the replica is ready


@dataclass(frozen=True, slots=True)
class _End:
    """How one life of an engine ended."""

    state: State
    reason: str
    ready_s: float = 0.0  # how long it answered
    planned: bool = False


class _StartFailed(Exception):
    def __init__(self, reason: str, known: bool) -> None:
        """known: the cause is certain, so that the next start would fail the same way."""
        super().__init__(reason)
        self.known = known


class Supervisor:
    """Runs one replica. `run` never returns; cancelling it leaves the engine running."""

    def __init__(self, replica: Replica, host: Host, duties: Duties, timings: Timings) -> None:
        self._replica = replica
        self._host = host
        self._duties = duties
        self._timings = timings

    async def run(self) -> None:
        """Keep the replica running until cancelled."""
        replica, failures = self._replica, 0
        engine = await asyncio.to_thread(self._host.adopt)
        if engine is None:
            replica.settle()
        while True:
            end, engine = await self._life(engine)
            replica.settle()
            failures = 0 if end.planned or end.ready_s > self._timings.steady_s else failures + 1
            state = end.state
            if state is State.UNHEALTHY and not end.ready_s and failures >= self._timings.patience:
                state = State.FAILED
            _log.warning("replica %s: %s", replica.id, end.reason)
            replica.become(state, end.reason)
            if engine is not None:
                await asyncio.to_thread(engine.stop, self._timings.stop_grace_s)
                engine = None
            if not end.planned:
                await asyncio.sleep(self._timings.backoff_s(failures))
            replica.restarts += 1

    async def _life(self, engine: Engine | None) -> tuple[_End, Engine | None]:
        """From a start (or an adopted engine) to its end; returns the engine, which may still have to be stopped."""
        replica = self._replica
        static: Mapping[str, Path] = {}
        try:
            if engine is None:
                # What went wrong before stays readable until it is ready.
                replica.become(State.STARTING, replica.reason)
                static = self._duties.static_adapters()
                engine = await asyncio.to_thread(self._host.start, static)
            async with upstream.connect(engine.endpoint) as client:
                replica.connect(engine.endpoint, client)
                await self._wait_ready(engine, client)
                return await self._serve(engine, client), engine
        except (_StartFailed, BackendError) as error:
            known = error.known if isinstance(error, _StartFailed) else not isinstance(error, EngineUnreachable)
            blamed = () if isinstance(error, EngineStartError) else static  # no process has seen them
            await self._duties.start_failed(replica, frozenset(blamed), str(error))
            return _End(State.FAILED if known else State.UNHEALTHY, str(error)), engine
        finally:
            replica.disconnect()

    async def _wait_ready(self, engine: Engine, client: httpx2.AsyncClient) -> None:
        self._replica.become(State.LOADING, self._replica.reason)
        deadline = time.monotonic() + self._timings.start_s
        while (backend := await self._host.ready(client)) is None:
            if not engine.alive():
                raise self._start_failure(engine, f"the engine {_ended(engine)} while it started")
            if time.monotonic() > deadline:
                waited = f"the engine did not answer within {self._timings.start_s:g} s (--start-timeout-s)"
                raise self._start_failure(engine, waited)
            await asyncio.sleep(self._timings.poll_s)
        cards = await upstream.list_models(client)
        self._replica.backend = backend
        self._replica.max_model_len = cards[0].max_model_len if cards else None
        self._replica.become(State.READY)

    def _start_failure(self, engine: Engine, what: str) -> _StartFailed:
        tail = engine.log_tail()
        cause = self._host.cause(tail)
        if cause is not None:
            return _StartFailed(f"{what}. {cause}", known=True)
        lines = [line.strip() for line in tail.splitlines() if line.strip()][-_SHOWN_LOG_LINES:]
        said = f"; its last words: {' | '.join(lines)}" if lines else ""
        return _StartFailed(what + said, known=False)

    async def _serve(self, engine: Engine, client: httpx2.AsyncClient) -> _End:
        since = time.monotonic()
        keeper = asyncio.ensure_future(self._duties.keep_adapters(self._replica))
        try:
            reason, planned = await self._watch(engine, client, keeper)
            # Out of traffic at once: ending what the keeper does may take a moment.
            self._replica.become(State.LOADING if planned else State.UNHEALTHY, reason)
        finally:
            keeper.cancel()
            await asyncio.wait([keeper])
        return _End(self._replica.state, reason, time.monotonic() - since, planned)

    async def _watch(
        self, engine: Engine, client: httpx2.AsyncClient, keeper: asyncio.Future[None]
    ) -> tuple[str, bool]:
        """Until the engine must be started again: why, and whether that was planned."""
        misses, health_at = 0, time.monotonic() + self._timings.health_every_s
        while True:
            if keeper.done():
                keeper.result()
            if engine.exit_status() is not None:  # its workers may still be ending
                return f"the engine {_ended(engine)}", False
            if self._replica.restart_wanted is not None:
                return self._replica.restart_wanted
            if time.monotonic() >= health_at:
                misses = 0 if await self._healthy(client) else misses + 1
                health_at = time.monotonic() + self._timings.health_every_s
                if misses >= self._timings.health_misses:
                    return f"the engine did not answer {misses} health checks in a row", False
            await asyncio.sleep(self._timings.poll_s)

    async def _healthy(self, client: httpx2.AsyncClient) -> bool:
        try:
            return await self._host.ready(client) is not None
        except EngineUnreachable:
            return False


def _ended(engine: Engine) -> str:
    status = engine.exit_status()
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
