"""The registry for async code: the catalogue in memory, every change written to the store first."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from gateway.adapters.intake import Accepted
from gateway.adapters.storage import AdapterStorage
from gateway.control import catalog
from gateway.control.catalog import Adapter, Version, VersionState
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
        self.desired: tuple[str, ...] = ()  # content ids that every replica should hold, most wanted first
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
        self.adapters = await asyncio.to_thread(self._store.adapters)
        orphans = await asyncio.to_thread(self._storage.sweep, self.contents)
        if orphans:
            _log.warning("removed adapter contents that no version names: %s", ", ".join(orphans))
        await self._reserve_snapshot_versions()
        self._changed()

    @property
    def contents(self) -> frozenset[str]:
        """Every content id that some version names."""
        return catalog.contents(self.adapters)

    def path_of(self, content_id: str) -> Path:
        """Where the contents lie."""
        return self._storage.path_of(content_id)

    def unproven(self, content_id: str) -> bool:
        """Whether no engine has ever answered with these contents."""
        return catalog.unproven(self.adapters, content_id)

    def find(self, name: str, number: int | None) -> Version | None:
        """The version that a name, or `name@vN`, stands for."""
        adapter = self.adapters.get(name)
        if adapter is None:
            return None
        return adapter.shown if number is None else adapter.versions.get(number)

    def check_room(self, name: str) -> None:
        """Refuse what would not fit on a replica beside the rest. Raises Conflict."""
        taken = catalog.needed(self.adapters)
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

    async def admit(self, name: str, base: str, accepted: Accepted) -> tuple[Version, bool]:
        """Register stored contents under a name; the version and whether it is new, or tried anew after it failed.

        Raises Conflict.
        """
        stored = accepted.stored
        known = self.adapters.get(name)
        for version in known.versions.values() if known else ():
            if version.sha256 == stored.sha256:
                again = version.state is VersionState.FAILED
                if again:
                    await self._set_state(version, VersionState.VALIDATED, "")
                return self.adapters[name].versions[version.version], again
        self.check_room(name)
        new = NewVersion(
            content_id=stored.content_id,
            sha256=stored.sha256,
            base=base,
            rank=accepted.rank,
            target_modules=accepted.target_modules,
            size_bytes=stored.size_bytes,
            metadata=accepted.metadata,
        )
        await self._write(name, functools.partial(self._store.add_version, name, new))
        return self.adapters[name].newest, True

    async def prove(self, content_id: str) -> None:
        """An engine answered with these contents."""
        await self._judge(content_id, VersionState.READY, "")

    async def condemn(self, content_id: str, reason: str) -> None:
        """Engines refuse these contents or die of them: they are not tried again until they are sent again."""
        _log.warning("adapter contents %s failed: %s", content_id, reason)
        await self._judge(content_id, VersionState.FAILED, reason)

    async def promote(self, version: Version) -> None:
        """Point the name to this version."""
        await self._write(version.name, functools.partial(self._store.set_current, version))

    async def delete(self, name: str) -> None:
        """Forget an adapter with all its versions."""
        await self._write(name, functools.partial(self._store.delete, name))

    async def withdraw(self, version: Version) -> None:
        """Forget one version."""
        await self._write(version.name, functools.partial(self._store.delete_version, version))

    async def collect(self, loaded: Collection[str]) -> None:
        """Delete contents that nothing names and no replica has loaded."""
        async with self.contents_lock:
            for content_id in await asyncio.to_thread(self._storage.stored):
                if content_id not in self.contents and content_id not in loaded:
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
        for version in list(catalog.versions(self.adapters)):
            if version.content_id == content_id and version.state is VersionState.VALIDATED:
                await self._set_state(version, state, reason)

    async def _set_state(self, version: Version, state: VersionState, reason: str) -> None:
        await self._write(version.name, functools.partial(self._store.set_state, version, state, reason))

    async def _write(self, name: str, change: Callable[[], Adapter | None]) -> None:
        """Change the store, then what is seen: `change` returns what the adapter is from now on."""
        # Shielded: a caller that is cancelled must not leave the store ahead of the catalogue.
        await asyncio.shield(self._write_one(name, change))

    async def _write_one(self, name: str, change: Callable[[], Adapter | None]) -> None:
        async with self._write_lock:
            adapter = await asyncio.to_thread(change)
            if adapter is None:
                self.adapters.pop(name, None)
            else:
                self.adapters[name] = adapter
            self._changed()

    def _changed(self) -> None:
        self.desired = catalog.desired(self.adapters, self.capacity)
        self._on_change()
