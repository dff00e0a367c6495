"""What is registered: adapters and their versions, as immutable values, and what should be loaded of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from gateway.control.canary import Policy


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
class Cause:
    """Who moved a pointer, and why."""

    who: str  # the id of an API key, "canary", or "" where access is open
    why: str


NO_CAUSE = Cause("", "")


@dataclass(frozen=True, slots=True)
class Coming:
    """Where the pointer goes as soon as every replica has that version."""

    version: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class Canary:
    """A version that is tried on a share of the name's requests."""

    version: int
    weight: float  # percent
    policy: Policy
    who: str
    started_at: int  # seconds since the epoch
    looks: int = 0  # at the counts, made so far
    start: Mapping[str, Any] = field(default_factory=dict)  # the relays' counts at its start
    last: Mapping[str, Any] = field(default_factory=dict)  # what the last look saw, for people
    reason: str = ""  # why it still runs

    @property
    def trial(self) -> tuple[object, ...]:
        """What makes it this trial and no other; looks at it change the rest."""
        return self.version, self.weight, self.policy, self.who, self.started_at


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a name's history: its pointer moved, or a canary began or ended."""

    kind: str  # moved | canary started | canary changed | canary ended
    from_version: int | None
    to_version: int
    cause: Cause
    at: int = 0  # seconds since the epoch; given by the store
    figures: Mapping[str, Any] | None = None  # what a decision rests on


@dataclass(frozen=True, slots=True)
class Adapter:
    """A public name: a pointer to one of its versions."""

    name: str
    current: int | None  # None until a version has become ready
    versions: Mapping[int, Version]  # oldest first
    previous: int | None = None  # where the pointer was before
    coming: Coming | None = None
    canary: Canary | None = None
    aliases: Mapping[str, int | None] = field(default_factory=dict)  # other names -> a version, None: the current one

    @property
    def routing(self) -> tuple[object, ...]:
        """Where the name points and is to point, and the trial that runs."""
        coming = self.coming.version if self.coming is not None else None
        return self.current, coming, self.canary.trial if self.canary is not None else None

    @property
    def newest(self) -> Version:
        return self.versions[max(self.versions)]

    @property
    def shown(self) -> Version:
        """The version that the bare name stands for: the current one, or the newest while there is none."""
        return self.newest if self.current is None else self.versions[self.current]

    @property
    def target(self) -> tuple[Version, Cause] | None:
        """The version that the pointer is to move to, and why; None when it stays."""
        if self.coming is not None:
            version, cause = self.versions.get(self.coming.version), self.coming.cause
        else:
            works = [known for known in self.versions.values() if known.state is not VersionState.FAILED]
            version = works[-1] if works and self.current is None else None
            cause = Cause("", "the only version that works")
        return None if version is None or version.state is VersionState.FAILED else (version, cause)

    def awaits(self, number: int) -> bool:
        """Whether the pointer is to move to that version, and has not yet."""
        return self.current != number and self.target is not None and self.target[0].version == number


Catalog = Mapping[str, Adapter]


def desired(catalog: Catalog, capacity: int) -> tuple[str, ...]:
    """The content ids that every replica should hold, at most `capacity`, most wanted first.

    First what names point to, then versions on their way up, then those a rollback returns to, then older ones.
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
    coming = adapter.coming is not None and version.version == adapter.coming.version
    tried = adapter.canary is not None and version.version == adapter.canary.version
    if adapter.current is None or coming or tried or version.version in adapter.aliases.values():
        return 1
    return 2 if version.version == adapter.previous or version is adapter.newest else 3


def urgent(adapter: Adapter) -> frozenset[str]:
    """The contents that must be loaded so that the name answers, by its current and its coming version or canary."""
    return frozenset(
        version.content_id
        for version in adapter.versions.values()
        if version.state is not VersionState.FAILED and _urgency(adapter, version) < 2
    )


def contents(catalog: Catalog) -> frozenset[str]:
    """Every content id that some version names."""
    return frozenset(version.content_id for version in versions(catalog))


def versions(catalog: Catalog) -> Iterable[Version]:
    """All versions of all adapters."""
    return (version for adapter in catalog.values() for version in adapter.versions.values())
