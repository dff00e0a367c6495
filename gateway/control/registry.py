"""The registry for async code: the catalogue in memory, every change written to the store first."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from gateway.adapters.intake import Accepted
from gateway.adapters.storage import AdapterStorage
from gateway.control import catalog
from gateway.control.catalog import NO_CAUSE, Adapter, Canary, Cause, Event, Version, VersionState
from gateway.control.index import Index
from gateway.control.store import NewVersion, Store
from gateway.errors import Conflict

_log = logging.getLogger(__name__)
SPARE = 1  # of the capacity: a new version is loaded there before it replaces the one that serves
_RESERVED = 1000  # snapshot versions taken from the store at a time


class Registry:
    """Adapters and their versions. Reads are plain look-ups; every write is one transaction, then visible."""

    def __init__(self, store: Store, storage: AdapterStorage, capacity: int, on_change: Callable[[], None]) -> None:
        """capacity: contents that one replica keeps loaded, SPARE included. on_change: called after each change."""
        self.capacity = capacity
        self.adapters: dict[str, Adapter] = {}
        self.aliases: dict[str, str] = {}  # alias -> the adapter that has it
        # Content ids that every replica should hold, most wanted first; empty where they are loaded on demand.
        self.desired: tuple[str, ...] = ()
        self._desired_set: frozenset[str] = frozenset()
        self.index = Index()
        self.at_start = False  # engines take adapters only when they start: there is no loading on demand
        self.generation = 0  # grows with each change
        self._changed_names: set[str] = set()
        self._left = False  # contents may lie in the storage that nothing names
        # Held from an upload's commit to its registration, so that `collect` does not see it as garbage between.
        self.contents_lock = asyncio.Lock()
        self._write_lock = asyncio.Lock()
        self._store = store
        self._storage = storage
        self._on_change = on_change
        self._snapshot_versions: Iterator[int] = iter(())

    async def open(self) -> None:
        """Migrate the store, load the catalogue, and clear the storage of what a crash left."""
        await asyncio.to_thread(self._store.migrate)
        for name, adapter in (await asyncio.to_thread(self._store.adapters)).items():
            self._put(name, adapter)
        orphans = await asyncio.to_thread(self._storage.sweep, catalog.contents(self.adapters))
        if orphans:
            _log.warning("removed adapter contents that no version names: %s", ", ".join(orphans))
        await self._reserve_snapshot_versions()
        self._changed()

    @property
    def on_demand(self) -> bool:
        """Whether more is registered than a replica holds, so that adapters are loaded when they are asked for."""
        return not self.at_start and (len(self.adapters) > self.capacity - SPARE or self.index.needed > self.capacity)

    @property
    def everywhere(self) -> frozenset[str] | None:
        """The contents that every replica should hold; None where they are loaded on demand."""
        return None if self.on_demand else self._desired_set

    def take_changed(self) -> set[str]:
        """The names of adapters that changed since the last call."""
        changed, self._changed_names = self._changed_names, set()
        return changed

    def path_of(self, content_id: str) -> Path:
        """Where the contents lie."""
        return self._storage.path_of(content_id)

    def unproven(self, content_id: str) -> bool:
        """Whether no engine has ever answered with these contents."""
        return self.index.unproven(content_id)

    def find(self, name: str, number: int | None) -> Version | None:
        """The version that a name, an alias or `name@vN` stands for."""
        adapter, number = self._resolve(name, number)
        if adapter is None:
            return None
        return adapter.shown if number is None else adapter.versions.get(number)

    def heading(self, name: str, number: int | None) -> Version | None:
        """The same, but where the name is on its way to another version, that one."""
        adapter, number = self._resolve(name, number)
        if adapter is not None and number is None and adapter.target is not None:
            return adapter.target[0]
        return self.find(name, number)

    def _resolve(self, name: str, number: int | None) -> tuple[Adapter | None, int | None]:
        """What a name or an alias belongs to, and the version that it is held to."""
        if name in self.aliases:
            name, number = self.aliases[name], self.adapters[self.aliases[name]].aliases[name]
        return self.adapters.get(name), number

    def check_room(self, name: str) -> None:
        """Refuse what could not be called. Raises Conflict.

        Where adapters come and go while an engine serves, any number may be registered. An engine that takes them
        only at its start must hold them all.
        """
        if not self.at_start and self.capacity > SPARE:
            return
        taken = self.index.needed
        if name not in self.adapters and taken >= self.capacity - SPARE:
            raise Conflict(
                f"{taken} adapters are registered, the most that one replica keeps loaded; delete one or restart "
                f"with --max-adapters {taken + 1}",
                code="too_many_adapters",
            )
        if taken >= self.capacity:
            raise Conflict(
                "other adapters are changing versions, which takes all the room there is for it; try again when "
                "they are ready, or restart with a higher --max-adapters",
                code="too_many_adapters",
            )

    async def admit(
        self, name: str, base: str, accepted: Accepted, cause: Cause | None = NO_CAUSE
    ) -> tuple[Version, bool]:
        """Register stored contents under a name; the version and whether it is new, or tried anew after it failed.

        cause: of the pointer's move to it, once every replica has it; None leaves the pointer where it is. Raises
        Conflict.
        """
        stored = accepted.stored
        known = self.adapters.get(name)
        for version in known.versions.values() if known else ():
            if version.sha256 == stored.sha256:
                again = version.state is VersionState.FAILED
                if again:
                    await self._set_state(version, VersionState.VALIDATED, "")
                if cause is not None:
                    await self.aim(version, cause)
                adapter = self.adapters.get(name)
                if adapter is None or version.version not in adapter.versions:
                    raise Conflict(f"{name}@v{version.version} was deleted meanwhile; send it again")
                return adapter.versions[version.version], again
        new = NewVersion(
            content_id=stored.content_id,
            sha256=stored.sha256,
            base=base,
            rank=accepted.rank,
            target_modules=accepted.target_modules,
            size_bytes=stored.size_bytes,
            metadata=accepted.metadata,
        )
        try:
            self.check_room(name)
            await self._write(name, functools.partial(self._store.add_version, name, new, cause))
        except Conflict:
            self._left = True
            self._on_change()  # so that they are collected
            raise
        return self.adapters[name].newest, True

    async def prove(self, content_id: str) -> None:
        """An engine answered with these contents."""
        await self._judge(content_id, VersionState.READY, "")

    async def condemn(self, content_id: str, reason: str) -> None:
        """Engines refuse these contents or die of them: they are not tried again until they are sent again."""
        _log.warning("adapter contents %s failed: %s", content_id, reason)
        await self._judge(content_id, VersionState.FAILED, reason)

    async def aim(self, version: Version, cause: Cause, seen: Adapter | None = None) -> None:
        """Have the name point to this version as soon as replicas have it. seen: see `promote`."""
        adapter = self.adapters.get(version.name)
        if adapter is None:
            return  # deleted meanwhile
        if adapter.current != version.version or adapter.coming is not None:
            await self._write(version.name, functools.partial(self._store.set_coming, version, cause, seen))

    async def promote(
        self,
        version: Version,
        cause: Cause,
        figures: Mapping[str, Any] | None = None,
        seen: Adapter | None = None,
    ) -> None:
        """Point the name to this version, which ends its canary. figures: what decided.

        seen: what the decision rests on; raises Conflict where it changed meanwhile.
        """
        await self._write(version.name, functools.partial(self._store.set_current, version, cause, figures, seen))

    async def set_canary(self, seen: Adapter, canary: Canary | None, event: Event | None = None) -> None:
        """Start, change or end a canary, and record it. Raises Conflict where `seen` was routed otherwise meanwhile."""
        await self._write(seen.name, functools.partial(self._store.set_canary, seen.name, canary, event, seen))

    async def set_alias(self, alias: str, name: str, number: int | None) -> None:
        """Make another name for an adapter, or for one of its versions. Raises NotFound, Conflict."""
        await asyncio.shield(self._write_all(functools.partial(self._store.set_alias, alias, name, number)))

    async def delete_alias(self, alias: str) -> None:
        """Forget an alias."""
        name = self.aliases[alias]
        await self._write(name, functools.partial(self._store.delete_alias, alias, name))

    async def history(self, name: str, limit: int) -> list[Event]:
        """What happened to a name's pointer and canaries, newest first."""
        return await asyncio.to_thread(self._store.history, name, limit)

    async def delete(self, name: str) -> None:
        """Forget an adapter with all its versions."""
        await self._write(name, functools.partial(self._store.delete, name))

    async def withdraw(self, version: Version) -> None:
        """Forget one version."""
        await self._write(version.name, functools.partial(self._store.delete_version, version))

    async def collect(self, loaded: Collection[str]) -> None:
        """Delete contents that nothing names and no replica has loaded."""
        if not self._left:
            return
        async with self.contents_lock:
            self._left = False
            for content_id in await asyncio.to_thread(self._storage.stored):
                if self.index.users(content_id):
                    continue
                if content_id in loaded:
                    self._left = True
                else:
                    await asyncio.to_thread(self._storage.remove, content_id)

    async def next_snapshot_version(self) -> int:
        """Higher than any before, over restarts too."""
        number = next(self._snapshot_versions, None)
        if number is None:
            await self._reserve_snapshot_versions()
            number = next(self._snapshot_versions)
        return number

    async def _reserve_snapshot_versions(self) -> None:
        first = await asyncio.to_thread(self._store.reserve_snapshot_versions, _RESERVED)
        self._snapshot_versions = iter(range(first, first + _RESERVED))

    async def _judge(self, content_id: str, state: VersionState, reason: str) -> None:
        for version in self.index.users(content_id):
            if version.state is VersionState.VALIDATED:
                await self._set_state(version, state, reason)

    async def _set_state(self, version: Version, state: VersionState, reason: str) -> None:
        await self._write(version.name, functools.partial(self._store.set_state, version, state, reason))

    async def _write(self, name: str, change: Callable[[], Adapter | None]) -> None:
        """Change the store, then what is seen: `change` returns what the adapter is from now on."""
        # Shielded: a caller that is cancelled must not leave the store ahead of the catalogue.
        await asyncio.shield(self._write_all(lambda: {name: change()}))

    async def _write_all(self, change: Callable[[], Mapping[str, Adapter | None]]) -> None:
        async with self._write_lock:
            for name, adapter in (await asyncio.to_thread(change)).items():
                self._put(name, adapter)
            self._changed()

    def _put(self, name: str, adapter: Adapter | None) -> None:
        """Show an adapter as it is from now on; it costs the same whatever else is registered."""
        before = self.adapters.pop(name, None)
        for alias in before.aliases if before is not None else ():
            self.aliases.pop(alias, None)
        if before is not None and (adapter is None or len(adapter.versions) < len(before.versions)):
            self._left = True
        if adapter is not None:
            self.adapters[name] = adapter
            self.aliases.update(dict.fromkeys(adapter.aliases, name))
        self.index.put(name, adapter)
        self._changed_names.add(name)
        self.generation += 1

    def _changed(self) -> None:
        self.desired = () if self.on_demand else catalog.desired(self.adapters, self.capacity)
        self._desired_set = frozenset(self.desired)
        self._on_change()
