"""What relays were told last, and what is different now: it costs what changed, whatever is registered."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gateway.control.publish import Cell, Public, base_model, build, names_of, rest_of
from gateway.control.registry import Registry
from gateway.control.replica import Replica
from gateway.snapshot import Delta, Model, Snapshot


class Picture:
    """Compares registry and replicas with the picture that relays have."""

    def __init__(self, registry: Registry, replicas: Sequence[Replica], cell: Cell) -> None:
        self._registry = registry
        self._replicas = replicas
        self._cell = cell
        self._names: dict[str, frozenset[str]] = {}  # adapter -> the names it is called by
        self._scene: object = None  # what every model depends on
        self._on_demand = False

    def whole(self, public: Public) -> Snapshot:
        """Everything, without a version; later changes start from here."""
        self._take_dirty()
        self._scene = self._look()
        self._on_demand = self._registry.on_demand
        for adapter in self._registry.adapters.values():
            own = names_of(adapter, public.base, self._replicas, on_demand=self._on_demand)
            self._names[adapter.name] = frozenset(own)
        return build(0, public, self._replicas, self._registry.adapters, self._cell, self._on_demand)

    def change(self, public: Public, current: Snapshot) -> Delta | None:
        """What is different from `current`, without a version; None: nothing."""
        dirty = self._take_dirty()
        scene, on_demand = self._look(), self._registry.on_demand
        if on_demand != self._on_demand or (scene != self._scene and not on_demand):
            dirty |= self._registry.adapters.keys()  # reasons name every replica
        self._scene, self._on_demand = scene, on_demand
        removed: list[str] = []
        models: dict[str, Model] = {public.base: base_model(public.base, self._replicas, self._cell)}
        for name in dirty:
            adapter = self._registry.adapters.get(name)
            own = names_of(adapter, public.base, self._replicas, self._cell, on_demand) if adapter is not None else {}
            removed += self._names.pop(name, frozenset()) - own.keys()
            if own:
                self._names[name] = frozenset(own)
            models |= own
        changed = {name: model for name, model in models.items() if current.models.get(name) != model}
        removed = [name for name in removed if name not in models and name in current.models]
        rest = rest_of(0, public, self._replicas, {})
        same = rest == msgspec.structs.replace(current, version=0, models={})
        if not changed and not removed and same:
            return None
        return Delta(0, changed, tuple(removed), None if same else rest)

    def _take_dirty(self) -> set[str]:
        """The adapters of which anything changed."""
        dirty = self._registry.take_changed()
        for replica in self._replicas:
            for content_id in replica.take_changed():
                dirty.update(version.name for version in self._registry.index.users(content_id))
        return dirty

    def _look(self) -> object:
        return [(replica.id, replica.state, replica.accepting) for replica in self._replicas]
