"""What the API does with adapters: take in, show, delete."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from backends.spec import AdapterLoading
from gateway.adapters.intake import Accepted, Rules, take_in
from gateway.adapters.names import check_name, parse_reference, pinned
from gateway.adapters.package import Limits, Part
from gateway.adapters.shapes import BaseShapes, UnknownBase, read_base
from gateway.adapters.storage import AdapterStorage
from gateway.control import views
from gateway.control.catalog import NO_CAUSE, Adapter, Cause, Version, VersionState
from gateway.control.core import Core
from gateway.control.versions import Versions
from gateway.errors import Conflict, InvalidRequest, ModelNotFound, NotFound, Unavailable

_HISTORY = 50  # lines of a name's history that are shown


@dataclass(frozen=True, slots=True)
class Policy:
    """What the configuration allows of adapters."""

    base: str  # the base model's public name
    base_path: Path | None  # its checkpoint; None when only the attached engine knows it
    slots: int  # adapters in one batch; 0: serving without adapters
    max_rank: int
    max_upload_bytes: int


class Service:
    """Adapters of one gateway, for the routes."""

    def __init__(self, core: Core, storage: AdapterStorage, policy: Policy, created: int) -> None:
        """created: when the base model came to be, seconds since the epoch."""
        self.core = core
        self.storage = storage
        self.policy = policy
        self.versions = Versions(core, policy.base)
        self._created = created
        self._base_shapes: BaseShapes | None = None
        self._models_json: tuple[object, bytes] = (None, b"")

    def check_upload(self, name: str, base: str | None) -> None:
        """Refuse what would be refused whatever the files hold. Raises GatewayErrors."""
        check_name(name, frozenset({self.policy.base}))
        self.versions.check_new_name(name)
        if base not in (None, "", self.policy.base):
            raise InvalidRequest(
                f"base {base!r} is not served here; serve it, or leave base out for {self.policy.base!r}", param="base"
            )
        self.check_engines()

    async def take_in(
        self, name: str, parts: Sequence[Part], work: Path, cause: Cause | None = NO_CAUSE
    ) -> tuple[Version, bool]:
        """Validate, store and register; the version and whether it is new. It is loaded from now on.

        work: the upload's staging directory, not needed afterwards. cause: of the pointer's move to it; None leaves the
        pointer where it is. Raises GatewayErrors, OSError.
        """
        rules = Rules(Limits(self.policy.max_upload_bytes), self.policy.max_rank, await self._shapes())
        async with self.core.registry.contents_lock:
            accepted: Accepted = await asyncio.to_thread(take_in, parts, work, rules, self.storage)
            return await self.core.registry.admit(name, self.policy.base, accepted, cause)

    async def settle(self, version: Version, new: bool, wait_s: float) -> dict[str, Any]:
        """Wait until a version can be called everywhere, at most `wait_s`; the adapter object.

        One that engines refuse stays to be seen beside its name's other versions; where it is the only one, the name is
        forgotten again. Raises InvalidRequest then, Conflict when it was deleted.
        """
        await self.core.wait_for(functools.partial(self._settled, version), wait_s)
        shown = self._show(version)
        if new and shown["state"] == views.FAILED:
            if len(shown["versions"]) == 1:
                await self.core.registry.withdraw(version)
            raise InvalidRequest(
                f"the engine refused the adapter: {shown['reason']}", param="file", code="adapter_refused"
            )
        if shown["state"] == views.READY:
            await self.core.published()
        return self._show(version)

    def list_adapters(self) -> list[dict[str, Any]]:
        """One object a name: of the version that the name is on its way to, else of the one that it stands for."""
        listed = [self.core.registry.heading(name, None) for name in self.core.registry.adapters]
        return [self._show(version) for version in listed if version is not None]

    def adapter(self, reference: str) -> dict[str, Any]:
        """The object of `name@vN`, or of the version that `name` is on its way to, else stands for. Raises NotFound."""
        return self._found(reference, self.core.registry.heading(*parse_reference(reference)))

    def answering(self, reference: str) -> dict[str, Any]:
        """The object of the version that a name answers with now, or is to as its first one. Raises NotFound."""
        return self._found(reference, self.core.registry.find(*parse_reference(reference)))

    async def show(self, reference: str) -> dict[str, Any]:
        """As `adapter`, with its history and its canary's figures as of now. Raises NotFound.

        Where it says `ready`, relays route by it already: whoever polls for that and then asks gets this version.
        """
        shown = self.adapter(reference)
        adapter = self.core.registry.adapters[shown["name"]]
        if shown["state"] == views.READY:
            with contextlib.suppress(TimeoutError):  # what cannot be published must not keep it from being shown
                async with asyncio.timeout(self.core.setup.timings.relays_s):
                    await self.core.published()
        if adapter.canary is not None:
            verdict = await self.core.rollouts.verdict(adapter, adapter.canary)
            shown["canary"] |= {"now": verdict.reason, "figures": verdict.figures}
        shown["history"] = [views.event(line) for line in await self.core.registry.history(adapter.name, _HISTORY)]
        return shown

    async def delete(self, name: str) -> None:
        """Take `name` or `name@vN` out of the relays' routing, then forget it; replicas unload what nothing else names.

        Requests in flight finish. An adapter's versions and aliases go with it. Raises NotFound, InvalidRequest,
        Conflict.
        """
        if name == self.policy.base:
            raise InvalidRequest(f"{name!r} is the base model, which cannot be deleted; adapters can")
        if name not in self.core.registry.adapters:
            version = self.core.registry.find(*parse_reference(name))
            if version is None:
                raise ModelNotFound(f"no adapter {name!r}; GET /v1/adapters lists them")
            if name in self.core.registry.aliases:
                route = f"DELETE /v1/adapters/{version.name}/aliases/{name}"
                raise InvalidRequest(f"{name!r} is an alias of {version.name!r}; {route} forgets it")
            await self.versions.delete(version)
            return
        aliases = self.core.registry.adapters[name].aliases
        await self.core.registry.delete(name)
        for pin in [pin for pin in self.core.pins.all if pin in aliases or parse_reference(pin)[0] == name]:
            await self.core.pins.drop(pin)
        await self.core.published()

    def models(self) -> list[dict[str, Any]]:
        """The base model, and every adapter by its name and its aliases."""
        base = views.base_model(self.policy.base, self._created, self.core.replicas)
        registry = self.core.registry
        named = [(adapter.name, adapter.shown) for adapter in registry.adapters.values()]
        named += [(alias, version) for alias in registry.aliases if (version := registry.find(alias, None))]
        return [base, *(views.adapter_model(name, version, base) for name, version in named)]

    def models_json(self) -> bytes:
        """The list of models, encoded once for each state of the registry."""
        base = views.base_model(self.policy.base, self._created, self.core.replicas)
        state = (self.core.registry.generation, base)
        if self._models_json[0] != state:
            self._models_json = state, msgspec.json.encode({"object": "list", "data": self.models()})
        return self._models_json[1]

    def model(self, reference: str) -> dict[str, Any]:
        """One model, by any name that can be called. Raises ModelNotFound."""
        base = views.base_model(self.policy.base, self._created, self.core.replicas)
        if reference == self.policy.base:
            return base
        version = self.core.registry.find(*parse_reference(reference))
        if version is None:
            raise ModelNotFound(f"The model `{reference[:200]}` does not exist; GET /v1/models lists the names")
        return views.adapter_model(reference, version, base)

    def _found(self, reference: str, version: Version | None) -> dict[str, Any]:
        if version is None:
            raise NotFound(f"no adapter {reference!r}; GET /v1/adapters lists them", param="name")
        return self._show(version)

    def _show(self, version: Version) -> dict[str, Any]:
        registry = self.core.registry
        adapter = registry.adapters.get(version.name)
        latest = adapter.versions.get(version.version) if adapter else None
        if adapter is None or latest is None:
            raise Conflict(f"{pinned(version.name, version.version)} was deleted meanwhile")
        return views.adapter(adapter, latest, self.core.replicas, registry.everywhere)

    def _settled(self, version: Version) -> bool:
        """Whether nothing more is to be awaited for a version: it is ready and current, failed, or gone."""
        adapter: Adapter | None = self.core.registry.adapters.get(version.name)
        if adapter is None or version.version not in adapter.versions:
            return True
        registry = self.core.registry
        if registry.on_demand and adapter.versions[version.version].state is VersionState.READY:
            return not adapter.awaits(version.version)  # it may have given way to others since it answered
        return self._show(version)["state"] in (views.FAILED, views.READY)

    def check_engines(self) -> None:
        """Refuse where no engine would serve an adapter. Raises InvalidRequest, Unavailable."""
        own = self.core.backend
        backends = {replica.backend for replica in self.core.replicas if replica.backend} | ({own} if own else set())
        if not backends:
            raise Unavailable("no engine has answered yet, so it is not known which adapters can be served")
        if not self.policy.slots or any(b.capabilities.adapter_loading is AdapterLoading.NONE for b in backends):
            raise InvalidRequest(
                "this gateway serves without adapters; restart it with --adapter-slots 1 or more",
                code="adapters_off",
            )

    async def _shapes(self) -> BaseShapes:
        if self._base_shapes is None:
            if self.policy.base_path is None:
                raise InvalidRequest(
                    "the base's shapes are not known, and engines die of adapters that do not fit: restart with "
                    "--model DIR, the checkpoint that the attached engine serves",
                    code="unknown_base",
                )
            try:
                self._base_shapes = await asyncio.to_thread(read_base, self.policy.base_path, self.policy.base)
            except UnknownBase as error:
                raise InvalidRequest(str(error), code="unknown_base") from error
        return self._base_shapes
