"""Makes each replica's adapters what the registry wants: compare with what the engine lists, mend one difference, look
again.

Operations on one replica are serial. Contents that no engine has answered with yet are tried on one replica at a time,
so that an adapter that kills engines does not take all of them; two deaths condemn it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
from sqlalchemy.exc import SQLAlchemyError

from backends import upstream
from backends.base import AdapterRejected, Backend, EngineBusy, EngineUnreachable, UnsupportedSpec
from backends.spec import AdapterLoading, Task
from gateway.adapters.names import is_content_id
from gateway.control.gate import Asked, Gate
from gateway.control.plan import Action, Load, Unload, plan
from gateway.control.registry import Registry
from gateway.control.replica import AdapterState, Replica
from gateway.control.residents import Residents
from gateway.control.timings import Timings
from gateway.errors import StorageFull

_log = logging.getLogger(__name__)
_DEATHS_LIMIT = 2
_LISTED_TRIES = 3  # engines list what they loaded a moment later, if at all
_LISTED_EVERY_S = 0.2
_UNREACHABLE_RETRY_S = 1.0
_STORE_RETRY_S = 5.0
_ROLL = "adapter change"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the reconciler asks of others."""

    published: Callable[[], Awaitable[None]]  # returns once relays route by the present state
    in_flight: Callable[[Replica], Awaitable[int]]  # requests that relays have at a replica
    served_name: str  # the base model's, at the engines
    task: Task
    owned: bool  # whether replicas can be started again by us
    gate: Gate


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A replica refused an adapter that works elsewhere."""

    times: int
    again_at: float  # monotonic


class Reconciler:
    """Keeps the adapters of all replicas. `keep` runs for each while it is ready."""

    def __init__(self, registry: Registry, residents: Residents, surroundings: Surroundings, timings: Timings) -> None:
        self._registry = registry
        self._residents = residents
        self._around = surroundings
        self._timings = timings
        self._wakes: dict[str, asyncio.Event] = {}
        self._proving: dict[str, str] = {}  # content id -> the one replica that tries it first
        self._deaths: Counter[str] = Counter()
        self._stopping: set[str] = set()  # replicas that are being stopped for good
        self._rolling: str | None = None  # the one replica that is started again for its adapters

    def wake(self) -> None:
        """Look at every replica now: something changed."""
        for wake in self._wakes.values():
            wake.set()

    def spare(self, replica_id: str) -> None:
        """That replica is about to be stopped: what it tries at the moment is not to blame for its end."""
        self._stopping.add(replica_id)

    def forget(self, replica_id: str) -> None:
        """That replica is gone for good."""
        self._wakes.pop(replica_id, None)
        self._stopping.discard(replica_id)
        if self._rolling == replica_id:
            self._rolling = None
            self.wake()

    async def keep(self, replica: Replica) -> None:
        """Until the replica is to be started again, or we are cancelled because it is not ready any more."""
        assert replica.backend is not None
        at_start = replica.backend.capabilities.adapter_loading is AdapterLoading.AT_START
        wake = self._wakes.setdefault(replica.id, asyncio.Event())
        refusals: dict[str, _Refusal] = {}
        replica.resume(_ROLL)
        while replica.restart_wanted is None:
            wake.clear()
            try:
                observed = await replica.backend.list_adapters(_client(replica))
                await self._condemn_killers()
                desired = self._residents.desired(replica, observed)
                _forget_lost(replica, observed, desired, self._registry)
                _prune(refusals, desired)
                step = self._static_step if at_start else self._step
                wait_s = await step(replica, replica.backend, observed, desired, refusals)
                if wait_s > 0:  # nothing is left to be done
                    replica.settle()
            except EngineUnreachable as error:
                # Whether it is dead is the supervisor's to judge; if it only was busy, it is asked again.
                _log.info("replica %s: %s", replica.id, error)
                wait_s = _UNREACHABLE_RETRY_S
            except (StorageFull, SQLAlchemyError) as error:
                # The engine goes on serving what it has; what could not be written down is tried again.
                _log.error("replica %s: the registry cannot be written: %s", replica.id, error)
                wait_s = _STORE_RETRY_S
            try:
                async with asyncio.timeout(wait_s):
                    await wake.wait()
            except TimeoutError:
                continue

    async def start_failed(self, replica: Replica, static_adapters: frozenset[str], reason: str) -> None:
        """An engine that takes adapters at its start did not start: what was new among them is to blame."""
        for content_id in static_adapters:
            if self._registry.unproven(content_id):
                await self._registry.condemn(content_id, f"{replica.id} did not start with it: {reason}")

    async def _step(
        self,
        replica: Replica,
        backend: Backend,
        observed: frozenset[str],
        desired: Sequence[str],
        refusals: dict[str, _Refusal],
    ) -> float:
        """The next action on a replica that loads at run time; seconds until the next look."""
        verified = [name for name in observed if replica.adapter_ready(name)]
        actions = plan(desired, observed, verified, self._held_back(replica, refusals))
        if not actions:
            waits = [refusal.again_at - time.monotonic() for refusal in refusals.values()]
            return max(0.0, min([self._timings.resync_s, *waits]))
        _queue(replica, actions)
        full = sum(map(is_content_id, observed)) >= self._registry.capacity
        for action in actions:
            if isinstance(action, Unload):
                if await self._unload(replica, backend, action.content_id):
                    return 0.0
            elif not (full and isinstance(action, Load)):
                await self._bring_up(replica, backend, action.content_id, isinstance(action, Load), refusals)
                return 0.0
        return self._timings.poll_s  # what is in the way drains

    async def _static_step(
        self,
        replica: Replica,
        backend: Backend,
        observed: frozenset[str],
        desired: Sequence[str],
        refusals: dict[str, _Refusal],
    ) -> float:
        """The same for an engine that takes adapters only at its start. What it has too much stays until then."""
        missing = [name for name in desired if name not in observed]
        unverified = [name for name in desired if name in observed and not replica.adapter_ready(name)]
        held_back = self._held_back(replica, refusals)
        if not missing and self._rolling == replica.id and not unverified:
            self._rolling = None
            self.wake()
        for name in unverified:
            if name not in held_back:
                await self._bring_up(replica, backend, name, False, refusals)
                return 0.0
        if not missing:
            return self._timings.resync_s
        if not self._around.owned:
            for name in missing:
                reason = f"{backend.name} takes adapters only at its start: start the attached engine with this one"
                replica.set_adapter(name, AdapterState.FAILED, reason)
            return self._timings.resync_s
        if self._rolling not in (None, replica.id):
            for name in missing:
                replica.set_adapter(name, AdapterState.LOADING, f"waits until {self._rolling} is back with it")
            return self._timings.resync_s
        await self._roll(replica, backend, missing)
        return self._timings.resync_s

    async def _roll(self, replica: Replica, backend: Backend, missing: Sequence[str]) -> None:
        """Take the replica out of traffic and have it started again with all desired adapters."""
        self._rolling = replica.id
        reason = f"{replica.id} starts again: {backend.name} takes adapters only at its start"
        for name in missing:
            replica.set_adapter(name, AdapterState.LOADING, reason)
        replica.drain(_ROLL)
        await self._around.published()
        await self._quiet(replica, self._timings.drain_s)
        replica.request_restart(f"{reason} ({', '.join(missing)})", planned=True)

    async def _bring_up(
        self, replica: Replica, backend: Backend, content_id: str, load: bool, refusals: dict[str, _Refusal]
    ) -> None:
        """Load and verify one adapter, and record how it went."""
        unproven = self._registry.unproven(content_id)
        started_s = time.monotonic()
        if unproven:
            self._proving[content_id] = replica.id
            self._deaths[content_id] += 1  # taken back unless the engine dies or hangs, which cancels us
        try:
            if load:
                replica.set_adapter(content_id, AdapterState.LOADING)
                await self._load(replica, backend, content_id)
            replica.set_adapter(content_id, AdapterState.VERIFYING)
            seen = await self._verify(replica, backend, content_id)
        except (AdapterRejected, UnsupportedSpec) as error:
            self._deaths.pop(content_id, None)
            replica.set_adapter(content_id, AdapterState.FAILED, str(error))
            if unproven:
                await self._registry.condemn(content_id, str(error))
            else:
                refusals[content_id] = self._refusal(refusals.get(content_id))
                self._residents.refused(replica, content_id, str(error))
        except EngineBusy as error:
            if unproven:
                self._deaths[content_id] -= 1
            replica.set_adapter(content_id, AdapterState.VERIFYING, str(error))
            refusals[content_id] = self._refusal(refusals.get(content_id))
        except asyncio.CancelledError:
            if unproven and replica.id in self._stopping:
                self._deaths[content_id] -= 1
            raise
        except EngineUnreachable as error:
            replica.set_adapter(content_id, AdapterState.LOADING, str(error))
            replica.request_restart(f"it did not take {content_id}: {error}")
        else:
            self._deaths.pop(content_id, None)
            refusals.pop(content_id, None)
            # First for good, then to be seen: another replica that starts now must not take it for unproven.
            await self._registry.prove(content_id)
            replica.set_adapter(content_id, AdapterState.READY, seen)
            if load:
                self._residents.loaded(replica, content_id, time.monotonic() - started_s)
        finally:
            if self._proving.pop(content_id, None):
                self.wake()

    async def _load(self, replica: Replica, backend: Backend, content_id: str) -> None:
        await backend.load_adapter(_client(replica), content_id, self._registry.path_of(content_id))
        for _ in range(_LISTED_TRIES):
            if content_id in await backend.list_adapters(_client(replica)):
                return
            await asyncio.sleep(_LISTED_EVERY_S)
        raise AdapterRejected(f"{backend.name} said that it loaded {content_id}, and does not list it")

    async def _verify(self, replica: Replica, backend: Backend, content_id: str) -> str:
        """A real request for one token, by the adapter's name, then its golden prompts; what those showed, in words."""
        model = backend.engine_model(self._around.served_name, content_id)
        path, body = "/v1/completions", {"model": model, "prompt": "a", "max_tokens": 1, "temperature": 0}
        if self._around.task == "embed":
            path, body = "/v1/embeddings", {"model": model, "input": "a"}
        await upstream.try_adapter(_client(replica), path, body, self._timings.verify_s, "the first request with it")
        if self._around.task == "embed":
            return ""
        if content_id not in replica.passed:
            asked = Asked(_client(replica), self._around.served_name, replica.max_model_len, self._timings.verify_s)
            directory = self._registry.path_of(content_id)
            replica.passed[content_id] = await self._around.gate.check(backend, asked, content_id, directory)
        return replica.passed[content_id]

    async def _unload(self, replica: Replica, backend: Backend, content_id: str) -> bool:
        """Unload what no request uses any more; False while one does."""
        status = replica.status(content_id)
        if status is None or status.state is not AdapterState.DRAINING:
            replica.set_adapter(content_id, AdapterState.DRAINING)
            await self._around.published()
        if not self._residents.quiet(replica, content_id):
            return False
        try:
            await backend.unload_adapter(_client(replica), content_id)
            listed = content_id in await backend.list_adapters(_client(replica))
        except EngineUnreachable as error:
            replica.request_restart(f"it did not unload {content_id}: {error}")
            return True
        if listed:
            replica.request_restart(f"it said that it unloaded {content_id}, and still lists it")
            return True
        replica.forget_adapter(content_id)
        self._residents.unloaded(replica, content_id)
        return True

    async def _quiet(self, replica: Replica, limit_s: float) -> None:
        """Wait until no request is in flight on the replica, or the time is over."""
        deadline = time.monotonic() + limit_s
        while await self._around.in_flight(replica):
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(self._timings.poll_s)

    async def _condemn_killers(self) -> None:
        for content_id in [name for name, deaths in self._deaths.items() if deaths >= _DEATHS_LIMIT]:
            if content_id not in self._proving:
                reason = f"the engine died or hung {_DEATHS_LIMIT} times while it took this adapter"
                await self._registry.condemn(content_id, reason)
                self._deaths.pop(content_id, None)  # only now: until it is condemned, no other replica may try it

    def _held_back(self, replica: Replica, refusals: dict[str, _Refusal]) -> set[str]:
        now = time.monotonic()
        refused = {name for name, refusal in refusals.items() if refusal.again_at > now}
        return refused | {name for name, owner in self._proving.items() if owner != replica.id}

    def _refusal(self, before: _Refusal | None) -> _Refusal:
        times = before.times + 1 if before else 1
        wait_s = min(self._timings.last_retry_s, self._timings.retry_s * 2.0 ** (times - 1))
        return _Refusal(times, time.monotonic() + wait_s)


def _client(replica: Replica) -> httpx2.AsyncClient:
    assert replica.client is not None, "a ready replica is connected"
    return replica.client


def _queue(replica: Replica, actions: Sequence[Action]) -> None:
    """Show what waits for its turn."""
    for action in actions:
        if isinstance(action, Load):
            replica.set_adapter(action.content_id, AdapterState.LOADING)


def _forget_lost(replica: Replica, observed: frozenset[str], desired: Sequence[str], registry: Registry) -> None:
    """Drop what the engine does not have any more; a refusal stays readable while someone names the contents."""
    for content_id, status in replica.adapters.items():
        if content_id in observed:
            continue
        waiting = status.state is AdapterState.LOADING and content_id in desired
        refused = status.state is AdapterState.FAILED and registry.index.users(content_id) and not registry.on_demand
        if not waiting and not refused:
            replica.forget_adapter(content_id)


def _prune(refusals: dict[str, _Refusal], desired: Collection[str]) -> None:
    for content_id in refusals.keys() - set(desired):
        del refusals[content_id]


def static_adapters(registry: Registry, backend: Backend) -> dict[str, Path]:
    """What an engine that takes adapters only at its start is started with: content id -> directory."""
    if backend.capabilities.adapter_loading is not AdapterLoading.AT_START:
        return {}
    return {content_id: registry.path_of(content_id) for content_id in registry.desired}
