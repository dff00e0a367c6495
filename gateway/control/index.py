"""What is asked of the catalogue for every load, kept so that no answer walks it."""

from __future__ import annotations

from collections import Counter

from gateway.control.catalog import Adapter, Version, VersionState, urgent


class Index:
    """Follows the catalogue adapter by adapter."""

    def __init__(self) -> None:
        self._adapters: dict[str, Adapter] = {}
        self._users: dict[str, tuple[Version, ...]] = {}  # content id -> the versions that name it
        self._needed: Counter[str] = Counter()  # content id -> names that must be answered by it
        self._moving: dict[str, None] = {}  # names whose pointer may move, the longest first

    def __repr__(self) -> str:
        return f"<Index {len(self._adapters)} adapters, {len(self._users)} contents, {len(self._moving)} moving>"

    def put(self, name: str, adapter: Adapter | None) -> None:
        """An adapter is so from now on; None: it is gone."""
        before = self._adapters.pop(name, None)
        if before is not None:
            for version in before.versions.values():
                self._drop(version)
            for content_id in urgent(before):
                self._needed[content_id] -= 1
                if not self._needed[content_id]:
                    del self._needed[content_id]
        if adapter is None:
            self._moving.pop(name, None)
            return
        self._adapters[name] = adapter
        for version in adapter.versions.values():
            self._users[version.content_id] = (*self._users.get(version.content_id, ()), version)
        self._needed.update(urgent(adapter))
        if adapter.target is not None or adapter.canary is not None:
            self._moving.setdefault(name)
        else:
            self._moving.pop(name, None)

    @property
    def needed(self) -> int:
        """How many contents must be loaded so that every name answers."""
        return len(self._needed)

    @property
    def moving(self) -> tuple[str, ...]:
        """Names whose pointer is to move, or that try a canary."""
        return tuple(self._moving)

    def users(self, content_id: str) -> tuple[Version, ...]:
        """The versions that name these contents; none: nobody needs them."""
        return self._users.get(content_id, ())

    def alive(self, content_id: str) -> bool:
        """Whether a version that did not fail names these contents."""
        return any(version.state is not VersionState.FAILED for version in self.users(content_id))

    def unproven(self, content_id: str) -> bool:
        """Whether no engine has ever answered with these contents."""
        return not any(version.state is VersionState.READY for version in self.users(content_id))

    def _drop(self, version: Version) -> None:
        left = tuple(
            other
            for other in self._users[version.content_id]
            if (other.name, other.version) != (version.name, version.version)
        )
        if left:
            self._users[version.content_id] = left
        else:
            del self._users[version.content_id]
