"""Control's parts put together, and the one loop that turns changes into snapshots.

registry (what should be) ─┐                       ┌─> snapshot to the relays
                           ├─ changed() ─> refresh ┤
replicas (what is) ────────┘                       └─> reconciler, whoever waits
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from backends.base import Backend
from backends.spec import Task
from gateway.adapters.storage import AdapterStorage
from gateway.control.catalog import Adapter, Version, VersionState
from gateway.control.hosting import Host
from gateway.control.publish import Public, Publisher, build
from gateway.control.reconcile import Reconciler, Surroundings, static_adapters
from gateway.control.registry import Registry
from gateway.control.replica import AdapterState, Replica
from gateway.control.store import Store
from gateway.control.supervisor import Duties, Supervisor
from gateway.control.timings import Timings
from gateway.errors import StorageFull
from gateway.observe.exposition import sum_relays
from gateway.observe.series import IN_FLIGHT

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


class Core:
    """Replicas, registry and publisher of one gateway."""

    def __init__(self, setup: Setup, store: Store, storage: AdapterStorage) -> None:
        self.setup = setup
        self.registry = Registry(store, storage, setup.capacity, self._changed)
        self.replicas = [Replica(id, index, self._changed) for index, (id, _) in enumerate(setup.hosts)]
        self.publisher = Publisher(setup.run_dir / "snapshots.sock")
        owned = setup.backend is not None
        around = Surroundings(self.published, self._in_flight, setup.public.base, setup.task, owned)
        self._reconciler = Reconciler(self.registry, around, setup.timings)
        duties = Duties(self._static_adapters, self._reconciler.start_failed, self._reconciler.keep)
        self._supervisors = [
            Supervisor(replica, host, duties, setup.timings)
            for replica, (_, host) in zip(self.replicas, setup.hosts, strict=True)
        ]
        self._dirty = asyncio.Event()
        self._round = asyncio.Condition()
        self._begun, self._ended = 0, 0  # rounds of refreshing
        self._desired: tuple[str, ...] = ()
        self._garbage = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Core {len(self.registry.adapters)} adapters, {self.publisher!r}, {self.replicas}>"

    async def open(self) -> None:
        """Load the registry and listen for relays, so that `run` can start. Raises what the store raises."""
        await self.registry.open()
        await self.publisher.start()

    async def run(self) -> None:
        """Keep everything going until cancelled; engines are left running."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._refresh_on_change())
                tasks.create_task(self._collect_garbage())
                for supervisor in self._supervisors:
                    tasks.create_task(supervisor.run())
        finally:
            await self.publisher.stop()

    async def stop_engines(self) -> None:
        """Stop every engine for good. Call it after `run` has ended."""
        grace_s = self.setup.timings.stop_grace_s
        await asyncio.gather(*(asyncio.to_thread(host.close, grace_s) for _, host in self.setup.hosts))

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

    def _changed(self) -> None:
        self._dirty.set()

    def _static_adapters(self) -> dict[str, Path]:
        return static_adapters(self.registry, self.setup.backend) if self.setup.backend is not None else {}

    async def _in_flight(self, replica: Replica) -> int:
        relays = await asyncio.to_thread(sum_relays, self.setup.run_dir)
        return sum(relays.get(IN_FLIGHT.name, {}).get((replica.id,), [0]))

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
                self._ended = self._begun
                self._round.notify_all()

    async def _refresh(self) -> None:
        draft = build(0, self.setup.public, self.replicas, self.registry.adapters)
        current = self.publisher.current
        if current is None or msgspec.structs.replace(current, version=0) != draft:
            number = await self.registry.next_snapshot_version()
            await self.publisher.publish(msgspec.structs.replace(draft, version=number))
        if self.registry.desired != self._desired:
            self._desired = self.registry.desired
            self._reconciler.wake()
        for version in self._risen():
            await self.registry.promote(version)
        self._garbage.set()

    def _risen(self) -> list[Version]:
        """Versions that every replica taking part has ready, newer than what their names point to."""
        replicas = [replica for replica in self.replicas if replica.takes_part]
        return [
            adapter.newest
            for adapter in self.registry.adapters.values()
            if _on_its_way(adapter)
            and replicas
            and all(replica.adapter_ready(adapter.newest.content_id) for replica in replicas)
        ]

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


def _on_its_way(adapter: Adapter) -> bool:
    newest = adapter.newest
    return newest.version != adapter.current and newest.state is not VersionState.FAILED
