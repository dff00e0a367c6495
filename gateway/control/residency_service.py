"""What the API does with residency: keep an adapter loaded, let it go, show who holds what."""

from __future__ import annotations

from typing import Any

from gateway.adapters.names import parse_reference
from gateway.control.catalog import Version, VersionState
from gateway.control.core import Core
from gateway.control.registry import SPARE
from gateway.errors import Conflict, InvalidRequest, ModelNotFound


async def load(core: Core, name: str, replicas: int | None, wait_s: float) -> None:
    """Pin a name and wait until it is loaded, at most `wait_s`. replicas: on how many; None: on all.

    Raises ModelNotFound, InvalidRequest, Conflict.
    """
    version = _find(core, name)
    if version.state is VersionState.FAILED:
        raise InvalidRequest(f"{name} failed: {version.reason}", code="adapter_refused")
    if replicas is not None and not 1 <= replicas <= len(core.replicas):
        raise InvalidRequest(f"replicas is {replicas}; there are {len(core.replicas)}", param="replicas")
    room = core.registry.capacity - SPARE
    pinned = {own.content_id for other in core.pins.all if (own := core.registry.find(*parse_reference(other)))}
    if version.content_id not in pinned and len(pinned) >= room - 1 and room > 1:
        raise Conflict(
            f"{len(pinned)} adapters are kept loaded, and one place of the {room} (--max-adapters) is left to the "
            "others; unload one first",
            code="too_many_pins",
        )
    await core.pins.put(name, replicas)
    core.residents.look()
    wanted = len(core.replicas) if replicas is None else replicas

    def loaded() -> bool:
        answering = [replica for replica in core.replicas if replica.answers]
        ready = sum(replica.adapter_ready(version.content_id) for replica in answering)
        return ready >= min(wanted, len(answering)) > 0

    if await core.wait_for(loaded, wait_s):
        await core.published()


async def unload(core: Core, name: str) -> None:
    """Unpin a name, and let replicas unload it once nothing uses it. Raises ModelNotFound."""
    version = _find(core, name)
    await core.pins.drop(name)
    core.residents.evict(version.content_id)


def show(core: Core) -> dict[str, Any]:
    """Who holds what, for the operator."""
    residents, room = core.residents, core.registry.capacity - SPARE
    replicas = [
        {
            "id": replica.id,
            "room": room,
            "resident": sorted(replica.adapters),
            "loads": residents.counts[replica.id].loads,
            "evictions": residents.counts[replica.id].evictions,
            "load_seconds": round(residents.counts[replica.id].load_s, 3),
        }
        for replica in core.replicas
    ]
    return {
        "object": "residency",
        "on_demand": core.registry.on_demand,
        "registered": len(core.registry.adapters),
        "adapters_waiting": residents.waiting,
        "pins": dict(core.pins.all),
        "replicas": replicas,
        "summary": repr(residents),
    }


def _find(core: Core, name: str) -> Version:
    version = core.registry.find(*parse_reference(name))
    if version is None:
        raise ModelNotFound(f"no adapter {name[:200]!r}; GET /v1/adapters lists them")
    return version
