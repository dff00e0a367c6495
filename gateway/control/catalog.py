"""What is registered: adapters and their versions, as immutable values, and what should be loaded of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class VersionState(StrEnum):
    """What is known of a version for good; where it is served at the moment is observed, not stored."""

    VALIDATED = "validated"  # it lies in the storage and fits the base; no engine has answered with it yet
    READY = "ready"  # an engine has answered with it
    FAILED = "failed"  # engines refused it or died of it: not tried again


@dataclass(frozen=True, slots=True)
class Version:
    """One immutable version of an adapter."""

    name: str
    version: int
    content_id: str
    sha256: str
    base: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    created_at: int  # seconds since the epoch
    state: VersionState
    reason: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A public name: a pointer to one of its versions."""

    name: str
    current: int | None  # None until a version has become ready
    versions: Mapping[int, Version]  # oldest first

    @property
    def newest(self) -> Version:
        return self.versions[max(self.versions)]

    @property
    def shown(self) -> Version:
        """The version that the bare name stands for: the current one, or the newest while there is none."""
        return self.newest if self.current is None else self.versions[self.current]


Catalog = Mapping[str, Adapter]


def desired(catalog: Catalog, capacity: int) -> tuple[str, ...]:
    """The content ids that every replica should hold, at most `capacity`, most wanted first.

    First what names point to, then versions on their way up, then older ones that are still called by `name@vN`.
    """
    ranked: list[tuple[int, int, int, str]] = []
    for adapter in catalog.values():
        for version in adapter.versions.values():
            if version.state is not VersionState.FAILED:
                age = (-version.created_at, -version.version)
                ranked.append((_urgency(adapter, version), *age, version.content_id))
    return tuple(dict.fromkeys(content_id for *_, content_id in sorted(ranked)))[:capacity]


def _urgency(adapter: Adapter, version: Version) -> int:
    if version.version == adapter.current:
        return 0
    return 1 if adapter.current is None or version.version > adapter.current else 2


def needed(catalog: Catalog) -> int:
    """How many contents must be loaded so that every name answers, by its current and its coming version."""
    return len(
        {
            version.content_id
            for adapter in catalog.values()
            for version in adapter.versions.values()
            if version.state is not VersionState.FAILED and _urgency(adapter, version) < 2
        }
    )


def contents(catalog: Catalog) -> frozenset[str]:
    """Every content id that some version names."""
    return frozenset(version.content_id for version in versions(catalog))


def versions(catalog: Catalog) -> Iterable[Version]:
    """All versions of all adapters."""
    return (version for adapter in catalog.values() for version in adapter.versions.values())


def unproven(catalog: Catalog, content_id: str) -> bool:
    """Whether no engine has ever answered with these contents."""
    return not any(v.state is VersionState.READY for v in versions(catalog) if v.content_id == content_id)
