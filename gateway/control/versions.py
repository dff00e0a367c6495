"""What the API does with versions: move a name's pointer, try one on a share of its requests, name it otherwise."""

from __future__ import annotations

import time
from dataclasses import replace

from gateway.adapters.names import check_name, pinned
from gateway.control.canary import Policy
from gateway.control.catalog import Adapter, Canary, Cause, Event, Version, VersionState
from gateway.control.core import Core
from gateway.errors import Conflict, InvalidRequest, NotFound

LOWEST_WEIGHT, HIGHEST_WEIGHT = 0.1, 99.0  # percent of a name's requests


class Versions:
    """Pointers, canaries and aliases of one gateway, for the routes."""

    def __init__(self, core: Core, base: str) -> None:
        """base: the base model's public name, which nothing may be called by."""
        self._core = core
        self._registry = core.registry
        self._base = base

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name, not an alias. Raises NotFound, InvalidRequest."""
        adapter = self._registry.adapters.get(name)
        if adapter is not None:
            return adapter
        if name in self._registry.aliases:
            own = self._registry.aliases[name]
            raise InvalidRequest(f"{name!r} is an alias; name the adapter it belongs to, {own!r}", param="name")
        raise NotFound(f"no adapter {name!r}; GET /v1/adapters lists them", param="name")

    async def promote(
        self, name: str, number: int | None, who: str, wait_s: float, expected: int | None = None
    ) -> None:
        """Point a name to one of its versions, and end its canary.

        number: None stands for the canary, or the newest where none runs. At once where every replica has it; else
        when they have, which is awaited for `wait_s` at most. expected: see `_check_expected`. Raises NotFound,
        Conflict.
        """
        adapter = self.adapter(name)
        if number is None:
            number = adapter.canary.version if adapter.canary is not None else adapter.newest.version
        _check_expected(adapter, expected, number)
        seen = adapter if expected is not None else None
        await self._move(adapter, _version(adapter, number), Cause(who, "promoted"), wait_s, seen)

    async def roll_back(self, name: str, who: str, wait_s: float, expected: int | None = None) -> None:
        """End a name's canary; where none runs, point it to where it pointed before. Raises NotFound, Conflict.

        expected: see `_check_expected`; without it, two rollbacks one after the other end where they began.
        """
        adapter = self.adapter(name)
        _check_expected(adapter, expected, None)
        if adapter.canary is not None:
            await self._end_canary(adapter, adapter.canary, Cause(who, "rolled back"))
            return
        if adapter.previous is None:
            kept = ", ".join(f"v{number}" for number in adapter.versions)
            raise Conflict(
                f"{name!r} pointed nowhere else before, or to a version that was deleted; promote one of {kept}",
                code="nothing_to_roll_back",
            )
        await self._move(adapter, _version(adapter, adapter.previous), Cause(who, "rolled back"), wait_s, adapter)

    async def start_canary(
        self, name: str, number: int, weight: float, policy: Policy, who: str, expected: int | None = None
    ) -> None:
        """Give a version `weight` percent of a name's requests, counted from now on. Raises NotFound, Conflict.

        expected: see `_check_expected`.
        """
        adapter = self.adapter(name)
        _check_expected(adapter, expected, number)
        version = _version(adapter, number)
        if not LOWEST_WEIGHT <= weight <= HIGHEST_WEIGHT:
            raise InvalidRequest(
                f"weight is {weight:g}; give {LOWEST_WEIGHT:g} to {HIGHEST_WEIGHT:g} percent, or promote the version "
                "for all requests",
                param="weight",
            )
        if adapter.current is None:
            raise Conflict(f"{name!r} has no version that serves yet; a canary needs one to be compared with")
        if number == adapter.current:
            raise Conflict(f"{pinned(name, number)} is what {name!r} points to; a canary is another version")
        if version.state is VersionState.FAILED:
            raise Conflict(f"{pinned(name, number)} failed: {version.reason}")
        start = await self._core.rollouts.counts(name, (adapter.current, number))
        canary = Canary(number, weight, policy, who, int(time.time()), start=start)
        again = adapter.canary is not None and adapter.canary.version == number
        kind = "canary changed" if again else "canary started"
        event = Event(kind, adapter.current, number, Cause(who, f"{weight:g} % of the requests"))
        await self._registry.set_canary(adapter, canary, event)
        await self._core.published()

    async def delete(self, version: Version) -> None:
        """Forget one version that nothing points to. Raises Conflict."""
        adapter, own = self.adapter(version.name), pinned(version.name, version.version)
        if len(adapter.versions) == 1:
            raise Conflict(f"{own} is the only version; delete {version.name!r} itself")
        if version.version == adapter.current:
            raise Conflict(f"{version.name!r} points to {own}; promote another version first")
        if adapter.canary is not None and version.version == adapter.canary.version:
            raise Conflict(f"{own} is a canary; roll it back first")
        aliases = [alias for alias, number in adapter.aliases.items() if number == version.version]
        if aliases:
            raise Conflict(f"{own} is also called {', '.join(aliases)}; delete or move that alias first")
        await self._registry.withdraw(version)
        await self._core.published()

    async def set_alias(self, alias: str, name: str, number: int | None) -> None:
        """Make `alias` another name of an adapter (None: of whatever it points to) or of one of its versions.

        Raises NotFound, InvalidRequest, Conflict.
        """
        check_name(alias, frozenset({self._base}))
        if alias in self._registry.adapters:
            raise Conflict(
                f"{alias!r} is an adapter, which an alias must not hide; choose another name", code="name_taken"
            )
        adapter = self.adapter(name)
        if number is not None:
            _version(adapter, number)
        await self._registry.set_alias(alias, name, number)
        await self._core.published()

    async def delete_alias(self, alias: str, name: str) -> None:
        """Forget an alias of an adapter. Raises NotFound."""
        if alias not in self.adapter(name).aliases:
            raise NotFound(f"{name!r} has no alias {alias!r}; GET /v1/adapters/{name} lists them", param="alias")
        await self._registry.delete_alias(alias)
        await self._core.published()

    def check_new_name(self, name: str) -> None:
        """Refuse to name an adapter like an alias. Raises Conflict."""
        if name in self._registry.aliases:
            own = self._registry.aliases[name]
            raise Conflict(
                f"{name!r} is an alias of {own!r}; delete the alias first, or upload to {own!r}", code="name_taken"
            )

    async def _move(
        self, adapter: Adapter, version: Version, cause: Cause, wait_s: float, seen: Adapter | None
    ) -> None:
        """seen: raises Conflict where somebody else moved it while this was under way."""
        own = pinned(version.name, version.version)
        if version.state is VersionState.FAILED:
            raise Conflict(f"{own} failed: {version.reason}")
        if self._core.can_take_over(version):
            await self._registry.promote(version, cause, seen=seen)
        else:
            await self._registry.aim(version, cause, seen)
            await self._core.wait_for(lambda: self._arrived(version), wait_s)
        await self._core.published()

    def _arrived(self, version: Version) -> bool:
        adapter = self._registry.adapters.get(version.name)
        return adapter is None or adapter.current == version.version or adapter.target is None

    async def _end_canary(self, adapter: Adapter, canary: Canary, cause: Cause) -> None:
        assert adapter.current is not None, "a canary has a baseline"
        verdict = await self._core.rollouts.verdict(adapter, replace(canary, looks=0))
        ended = Event("canary ended", canary.version, adapter.current, cause, 0, verdict.figures)
        await self._registry.set_canary(adapter, None, ended)
        await self._core.published()


def _check_expected(adapter: Adapter, expected: int | None, number: int | None) -> None:
    """Refuse a change that rests on what is no longer so: another operator was there first. Raises Conflict.

    expected: the version that the name points to, as far as the caller knows; None: whatever it is. number: the one
    that is to be promoted or tried; None: to be rolled back. A move or a trial of another one under way refuses it too.
    """
    if expected is None:
        return
    name, found = adapter.name, None
    if adapter.current != expected:
        now = pinned(name, adapter.current) if adapter.current is not None else "no version yet"
        found = f"{name!r} points to {now}"
    elif number is not None and adapter.coming is not None and adapter.coming.version != number:
        found = f"{name!r} is on its way to {pinned(name, adapter.coming.version)}"
    elif number is not None and adapter.canary is not None and adapter.canary.version != number:
        found = f"{pinned(name, adapter.canary.version)} is tried as a canary"
    if found is not None:
        raise Conflict(
            f"{found}, which is not what you expect (expected_version {expected}); nothing was changed. Look at "
            f"GET /v1/adapters/{name} and decide again",
            param="expected_version",
            code="version_moved",
        )


def _version(adapter: Adapter, number: int) -> Version:
    version = adapter.versions.get(number)
    if version is None:
        kept = ", ".join(f"v{known}" for known in adapter.versions)
        raise NotFound(f"{adapter.name!r} has no version {number}; it has {kept}", param="version")
    return version
