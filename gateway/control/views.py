"""What the API shows: registry and replicas as JSON-ready dictionaries. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from gateway.adapters.names import pinned
from gateway.control.catalog import Adapter, Canary, Event, Version, VersionState
from gateway.control.replica import AdapterState, AdapterStatus, Replica

UNLOADED, FAILED, READY, VALIDATED = "unloaded", "failed", "ready", "validated"
STATES = (VALIDATED, *AdapterState, UNLOADED)
Wanted = Collection[str] | None  # the contents that every replica should hold; None: loaded on demand
_IN_PROGRESS = (AdapterState.LOADING, AdapterState.VERIFYING, AdapterState.DRAINING)


def adapter(adapter: Adapter, version: Version, replicas: Sequence[Replica], desired: Wanted) -> dict[str, Any]:
    """The adapter object of one version. One that its name is to point to is not ready before the name does."""
    state, reason = everywhere(version, replicas, desired)
    if state == READY and adapter.awaits(version.version):
        state, reason = AdapterState.VERIFYING, f"{adapter.name} does not point to it yet"
    return {
        "id": pinned(version.name, version.version),
        "object": "adapter",
        "name": version.name,
        "version": version.version,
        "current": version.version == adapter.current,
        "versions": list(adapter.versions),
        "base": version.base,
        "rank": version.rank,
        "target_modules": list(version.target_modules),
        "bytes": version.size_bytes,
        "created_at": version.created_at,
        "state": state,
        "reason": reason or None,
        "replicas": [_one_replica(version, replica, desired) for replica in replicas],
        "sha256": version.sha256,
        "metadata": dict(version.metadata),
        "current_version": adapter.current,
        "previous": adapter.previous,
        "coming": adapter.coming.version if adapter.coming else None,
        "canary": canary(adapter.canary) if adapter.canary else None,
        "aliases": dict(adapter.aliases),
    }


def canary(canary: Canary) -> dict[str, Any]:
    """A canary as it was when its counts were last looked at."""
    return {
        "version": canary.version,
        "weight": canary.weight,
        "policy": asdict(canary.policy),
        "started_at": canary.started_at,
        "started_by": canary.who or None,
        "looks": canary.looks,
        "reason": canary.reason or None,
        "figures": dict(canary.last) or None,
    }


def event(event: Event) -> dict[str, Any]:
    """One line of a name's history."""
    return {
        "at": event.at,
        "event": event.kind,
        "from": event.from_version,
        "to": event.to_version,
        "who": event.cause.who or None,
        "why": event.cause.why or None,
        "figures": event.figures,
    }


def on_replica(version: Version, replica: Replica, desired: Wanted) -> tuple[str, str]:
    """State and reason of a version on one replica."""
    status: AdapterStatus | None = replica.status(version.content_id)
    if status is not None:
        return status.state, status.reason
    if version.state is VersionState.FAILED:
        return FAILED, version.reason
    if not replica.answers:
        why = replica.reason if replica.takes_part else f"{replica.id} is {replica.state}"
        return (AdapterState.LOADING if replica.takes_part else UNLOADED), why
    if desired is None:
        return UNLOADED, "it is loaded when a request asks for it"
    if version.content_id not in desired:
        return UNLOADED, "newer adapters fill --max-adapters"
    return AdapterState.LOADING, ""


def everywhere(version: Version, replicas: Sequence[Replica], desired: Wanted) -> tuple[str, str]:
    """State and reason over the replicas that take part: ready means on all of them, or on one where on demand."""
    if version.state is VersionState.FAILED:
        return FAILED, version.reason
    statuses = {replica.id: on_replica(version, replica, desired) for replica in replicas if replica.takes_part}
    if not statuses:
        return VALIDATED, "no replica is ready yet"
    states = [state for state, _ in statuses.values()]
    if desired is None and READY in states:
        return READY, ""
    state = next(state for state in (*_IN_PROGRESS, FAILED, UNLOADED, READY) if state in states)
    reasons = [f"{id}: {reason}" for id, (own, reason) in statuses.items() if own == state and reason]
    return state, "; ".join(reasons)


def _one_replica(version: Version, replica: Replica, desired: Wanted) -> dict[str, Any]:
    state, reason = on_replica(version, replica, desired)
    return {"id": replica.id, "state": state, "reason": reason or None}


def replica(replica: Replica) -> dict[str, Any]:
    """One replica, for the operator."""
    endpoint = replica.endpoint
    return {
        "id": replica.id,
        "object": "replica",
        "backend": replica.backend.name if replica.backend else None,
        "state": replica.state,
        "reason": replica.reason or None,
        "restarts": replica.restarts,
        "url": endpoint.url if endpoint else None,
        "adapters": [
            {"id": name, "state": status.state, "reason": status.reason or None}
            for name, status in sorted(replica.adapters.items())
        ],
    }


def base_model(name: str, created: int, replicas: Sequence[Replica]) -> dict[str, Any]:
    """The model object of the base."""
    card: dict[str, Any] = {"id": name, "object": "model", "created": created, "owned_by": "tunegate"}
    card |= {"root": name, "parent": None}
    lengths = [replica.max_model_len for replica in replicas if replica.max_model_len]
    return card | ({"max_model_len": min(lengths)} if lengths else {})


def adapter_model(name: str, version: Version, base: dict[str, Any]) -> dict[str, Any]:
    """The model object of an adapter's name; what holds for the base holds for it."""
    return base | {
        "id": name,
        "created": version.created_at,
        "root": pinned(version.name, version.version),
        "parent": base["id"],
    }
