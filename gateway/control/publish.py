"""What relays are to know of who serves what, from what is registered and what is observed. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from backends.spec import Task
from gateway import snapshot
from gateway.adapters.names import pinned
from gateway.control.catalog import Adapter, Catalog, Version, VersionState
from gateway.control.replica import Replica
from gateway.observe.cells import ADAPTER_ROW
from gateway.snapshot import Key, Model, Snapshot

Cell = Callable[[Replica, str | None], int]  # the first cell of a content id's row on a replica; None: the base's


@dataclass(frozen=True, slots=True)
class Public:
    """What the configuration says to clients."""

    base: str  # the base model's name, to clients and engines alike
    keys: dict[str, Key]  # SHA-256 hex of an API key -> what it opens; empty: open access
    task: Task = "generate"
    limits: snapshot.Limits | None = None  # None: those that relays were started with
    reloads: int = 0


def shared_row(replica: Replica, content_id: str | None) -> int:
    """A `Cell` where nobody looks at adapters one by one."""
    return ADAPTER_ROW


def build(
    version: int,
    public: Public,
    replicas: Sequence[Replica],
    catalog: Catalog,
    cell: Cell = shared_row,
    on_demand: bool = False,
) -> Snapshot:
    """The whole picture."""
    models = {public.base: base_model(public.base, replicas, cell)}
    for adapter in catalog.values():
        models |= names_of(adapter, public.base, replicas, cell, on_demand)
    return rest_of(version, public, replicas, models)


def rest_of(version: int, public: Public, replicas: Sequence[Replica], models: dict[str, Model]) -> Snapshot:
    """The picture with these models."""
    answering = tuple(_replica(replica) for replica in replicas if replica.answers)
    return Snapshot(version, answering, models, public.keys, public.task, public.limits, public.reloads)


def names_of(
    adapter: Adapter, base: str, replicas: Sequence[Replica], cell: Cell = shared_row, on_demand: bool = False
) -> dict[str, Model]:
    """Every name by which an adapter and its versions are called.

    on_demand: what is loaded nowhere is loaded when it is asked for. Versions are then listed only where they are
    loaded; relays ask for the others, knowing the name.
    """
    models = {}
    for number, version in adapter.versions.items():
        name = pinned(adapter.name, number)
        models[name] = _model(name, base, version, replicas, cell, on_demand)
    own = _model(adapter.name, base, adapter.shown, replicas, cell, on_demand)
    if adapter.canary is not None and adapter.current is not None:
        tried = models[pinned(adapter.name, adapter.canary.version)]
        stay = pinned(adapter.name, adapter.current)
        own = msgspec.structs.replace(own, canary=snapshot.Canary(tried, stay, adapter.canary.weight / 100))
    models[adapter.name] = own
    for alias, pinned_to in adapter.aliases.items():
        models[alias] = own if pinned_to is None else models[pinned(adapter.name, pinned_to)]
    for number in adapter.versions:
        model = models[pinned(adapter.name, number)]
        if model.on_demand and not model.engine_models:
            del models[model.id]
    return models


def _replica(replica: Replica) -> snapshot.Replica:
    endpoint, backend = replica.endpoint, replica.backend
    assert endpoint is not None and backend is not None, "a replica that answers is connected"
    return snapshot.Replica(
        replica.id, replica.index, backend.name, endpoint.host, endpoint.port, endpoint.api_key, replica.accepting
    )


def base_model(name: str, replicas: Sequence[Replica], cell: Cell = shared_row) -> Model:
    """The base model's name."""
    serving = [replica for replica in replicas if replica.accepting and replica.backend is not None]
    ready = {replica.id: replica.backend.engine_model(name, None) for replica in serving if replica.backend}
    states = ", ".join(f"{replica.id} is {replica.state}" for replica in replicas)
    rows = {replica.id: cell(replica, None) for replica in serving}
    return Model(name, None, None, ready, "" if ready else states, rows)


def _model(name: str, base: str, version: Version, replicas: Sequence[Replica], cell: Cell, on_demand: bool) -> Model:
    content_id = version.content_id
    serving = [replica for replica in replicas if replica.accepting and replica.adapter_ready(content_id)]
    ready = {replica.id: replica.backend.engine_model(base, content_id) for replica in serving if replica.backend}
    waits = on_demand and version.state is not VersionState.FAILED
    reason = "" if ready or waits else why_unready(version, replicas)
    rows = {replica.id: cell(replica, content_id) for replica in serving} if ready else {}
    return Model(name, base, content_id, ready, reason, rows, on_demand=waits)


def why_unready(version: Version, replicas: Sequence[Replica]) -> str:
    """Why no replica answers with a version, in words for a client."""
    if version.state is VersionState.FAILED:
        return f"it failed: {version.reason}"
    reasons = []
    for replica in replicas:
        status = replica.status(version.content_id)
        if not replica.answers:
            reasons.append(f"{replica.id} is {replica.state}")
        elif status is None:
            reasons.append(f"it is not loaded on {replica.id}")
        else:
            reasons.append(f"it is {status.state} on {replica.id}{': ' if status.reason else ''}{status.reason}")
    return ", ".join(reasons)
