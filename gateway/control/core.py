"""Control's parts put together, and the one loop that turns changes into snapshots.

registry (what should be) ─┐                       ┌─> snapshot to the relays
                           ├─ changed() ─> refresh ┤
replicas (what is) ────────┘                       └─> reconciler, whoever waits
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from backends.base import Backend
from backends.spec import AdapterLoading, Task
from gateway.adapters.storage import AdapterStorage
from gateway.control.catalog import Adapter, Cause, Version
from gateway.control.fleet import Fleet
from gateway.control.gate import Gate
from gateway.control.gauging import gauge
from gateway.control.hosting import Host
from gateway.control.key_store import KeyStore
from gateway.control.keys import KeyRing
from gateway.control.picture import Picture
from gateway.control.pins import Pins
from gateway.control.publish import Public
from gateway.control.publisher import Publisher
from gateway.control.reconcile import Reconciler, Surroundings, static_adapters
from gateway.control.registry import Registry
from gateway.control.replica import AdapterState, Replica
from gateway.control.residency import Rules
from gateway.control.residents import Residents, Ties
from gateway.control.rollout import Rollouts
from gateway.control.score import ScoreCommand
from gateway.control.store import Store
from gateway.control.supervisor import Duties
from gateway.control.timings import Timings
from gateway.errors import Conflict, StorageFull
from gateway.observe import loads
from gateway.observe.cells import InFlight
from gateway.snapshot import Limits

_log = logging.getLogger(__name__)
_STORE_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What a core is made for; tests give it their own hosts and timings."""

    public: Public
    task: Task
    backend: Backend | None  # of the engines we start; None where engines are attached
    capacity: int  # adapter contents that one replica keeps loaded, the spare one included
    run_dir: Path
    hosts: Sequence[tuple[str, Host]]  # replica id and its host
    timings: Timings
    api_keys: Sequence[str] = dataclasses.field(default=(), repr=False)  # of the configuration: they open everything
    gate: Gate = dataclasses.field(default_factory=Gate)
    rules: Rules = dataclasses.field(default_factory=Rules)
    score: ScoreCommand | None = None  # asked before a canary is promoted
    gauge: bool = False  # engines are asked how busy they are, for the relays


class Core:
    """Replicas, registry and publisher of one gateway."""

    def __init__(self, setup: Setup, store: Store, storage: AdapterStorage) -> None:
        self.setup = setup
        self.registry = Registry(store, storage, setup.capacity, self._changed)
        self.fleet = Fleet(self._duties, setup.timings, self._changed)
        self.replicas = self.fleet.replicas
        self.backend = setup.backend  # of the engines we start, now
        self._limits: Limits | None = None  # as reloaded
        self._since_s = time.monotonic()
        self._reloads = 0
        self.keys = KeyRing(KeyStore(store), setup.run_dir, setup.api_keys, self._changed)
        self._cells = InFlight(setup.run_dir)
        self.pins = Pins(store)
        ties = Ties(self._replan, lambda answer: self.publisher.answer(answer), lambda: self.pins.all)
        self.residents = Residents(self.registry, self.replicas, self._cells, ties, setup.rules)
        self.publisher = Publisher(setup.run_dir / "snapshots.sock", self.residents.want)
        self._picture = Picture(self.registry, self.replicas, lambda r, id: self.residents.rows.cell(r.id, id))
        owned = setup.backend is not None
        around = Surroundings(self.published, self._in_flight, setup.public.base, setup.task, owned, setup.gate)
        self._reconciler = Reconciler(self.registry, self.residents, around, setup.timings)
        self.rollouts = Rollouts(self.registry, setup.run_dir, self.can_take_over, setup.timings.canary_s, setup.score)
        self._dirty = asyncio.Event()
        self._round = asyncio.Condition()
        self._begun, self._ended = 0, 0  # rounds of refreshing
        self._desired: tuple[str, ...] = ()
        self._number: int | None = None  # of the next snapshot
        self._garbage = asyncio.Event()
        for id, host in setup.hosts:
            self.fleet.add(id, int(id.removeprefix("r")), host, setup.backend)

    def __repr__(self) -> str:
        return f"<Core {len(self.registry.adapters)} adapters, {self.publisher!r}, {self.replicas}>"

    async def open(self) -> None:
        """Load the registry and listen for relays, so that `run` can start. Raises what the store raises."""
        await self.registry.open()
        await self.keys.open()
        await self.pins.open()
        await self.publisher.start()

    async def run(self) -> None:
        """Keep everything going until cancelled; engines are left running."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._refresh_on_change())
                tasks.create_task(self._collect_garbage())
                tasks.create_task(self.keys.run())
                tasks.create_task(self.rollouts.run())
                tasks.create_task(self.fleet.run())
                asyncio.get_running_loop().call_later(self.setup.timings.adopt_s + 0.1, self._changed)
                tasks.create_task(self.residents.run())
                if self.setup.gauge:
                    tasks.create_task(gauge(self.replicas, loads.Loads(self.setup.run_dir / loads.NAME)))
        finally:
            await self.publisher.stop()

    async def stop_engines(self) -> None:
        """Stop every engine for good. Call it after `run` has ended."""
        await self.fleet.close()

    async def remove(self, replica: Replica) -> None:
        """Stop a replica for good. What is in flight there breaks: drain it first."""
        self._reconciler.spare(replica.id)
        await self.fleet.remove(replica)
        self._reconciler.forget(replica.id)

    async def in_flight(self, replica: Replica) -> int:
        """Requests that relays have at a replica."""
        return await self._in_flight(replica)

    def configure(self, limits: Limits) -> None:
        """Have relays go by these, and read their certificate again."""
        self._limits = limits
        self._reloads += 1
        self._changed()

    async def published(self) -> None:
        """Return once all relays route by the present state, or have had their time."""
        self._changed()
        async with self._round:
            target = self._begun + 1
            await self._round.wait_for(lambda: self._ended >= target)
        if self.publisher.current is not None:
            await self.publisher.wait_applied(self.publisher.current.version, self.setup.timings.relays_s)

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Until the condition holds, looked at after each change; False when the time is over."""
        try:
            async with asyncio.timeout(timeout_s), self._round:
                await self._round.wait_for(condition)
                return True
        except TimeoutError:
            return False

    @property
    def _public(self) -> Public:
        return dataclasses.replace(
            self.setup.public, keys=self.keys.published, limits=self._limits, reloads=self._reloads
        )

    def _changed(self) -> None:
        self._dirty.set()

    def _duties(self, backend: Backend | None) -> Duties:
        def static() -> dict[str, Path]:
            return static_adapters(self.registry, backend) if backend is not None else {}

        return Duties(static, self._reconciler.start_failed, self._reconciler.keep)

    async def _in_flight(self, replica: Replica) -> int:
        return self._cells.replica(replica.index)

    def _replan(self) -> None:
        """Replicas are to hold other adapters."""
        self._reconciler.wake()
        self._changed()

    async def _refresh_on_change(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            self._begun += 1
            try:
                await self._refresh()
            except (StorageFull, SQLAlchemyError) as error:
                _log.error("the registry cannot be written, trying again in %g s: %s", _STORE_RETRY_S, error)
                asyncio.get_running_loop().call_later(_STORE_RETRY_S, self._changed)
            async with self._round:
                self._round.notify_all()

    async def _refresh(self) -> None:
        loading = self.backend.capabilities.adapter_loading if self.backend is not None else None
        self.registry.at_start = loading is AdapterLoading.AT_START
        if self._number is None:  # first: it is what can fail, and a difference is given out once
            self._number = await self.registry.next_snapshot_version()
        number, current = self._number, self.publisher.current
        if current is None and self._knows_itself():
            self._number = None
            await self.publisher.publish(msgspec.structs.replace(self._picture.whole(self._public), version=number))
        elif current is not None and (delta := self._picture.change(self._public, current)) is not None:
            self._number = None
            await self.publisher.change(msgspec.structs.replace(delta, version=number))
        self._ended = self._begun
        self.residents.look()
        if self.registry.desired != self._desired:
            self._desired = self.registry.desired
            self._reconciler.wake()
        for adapter, (version, cause) in self._risen():
            with contextlib.suppress(Conflict):  # somebody moved it since: that is to hold, and makes another round
                await self.registry.promote(version, cause, seen=adapter)
        self._garbage.set()

    def _knows_itself(self) -> bool:
        """Whether there can be a picture: one without engines that only were not looked at yet would stop traffic."""
        waited = time.monotonic() - self._since_s > self.setup.timings.adopt_s
        return waited or all(replica.settled for replica in self.replicas)

    def can_take_over(self, version: Version) -> bool:
        """Whether every replica that is to have this version answers with it, so that a name may point to it."""
        replicas = self.residents.holders(version.content_id)
        return bool(replicas) and all(replica.adapter_ready(version.content_id) for replica in replicas)

    def _risen(self) -> list[tuple[Adapter, tuple[Version, Cause]]]:
        """Names and the versions that they are to point to, and now can."""
        moving = [self.registry.adapters[name] for name in self.registry.index.moving]
        return [(one, target) for one in moving if (target := one.target) and self.can_take_over(target[0])]

    async def _collect_garbage(self) -> None:
        """Delete contents of deleted adapters, once no replica has them loaded."""
        while True:
            await self._garbage.wait()
            self._garbage.clear()
            loaded = {
                content_id
                for replica in self.replicas
                for content_id, status in replica.adapters.items()
                if status.state is not AdapterState.FAILED
            }
            try:
                await self.registry.collect(loaded)
            except OSError as error:
                _log.error("contents of deleted adapters are left until the next start: %s", error)
