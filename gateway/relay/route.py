"""Where a request can go: the snapshot compiled for look-ups. Who of several gets it is policy.py's.

A name is compiled when it is first asked for, so that neither a snapshot's arrival nor a request depends on how many
adapters are registered.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from gateway.errors import ModelNotFound, Unavailable
from gateway.observe.cells import ADAPTER_ROW
from gateway.relay.awaiting import Awaiting, NotResident
from gateway.relay.health import Health
from gateway.relay.split import Split
from gateway.relay.upstream import Origin
from gateway.snapshot import Delta, Model, Replica, Snapshot

_NAMES_COMPARED = 200  # for "did you mean"; a bound on what a wrong name can cost
_NAMES_LISTED = 3
_VERSION = re.compile(r"[0-9]{1,9}").fullmatch  # of which control can be asked: names are to stay short


@dataclass(slots=True, eq=False)
class Engine:
    """A replica as the token path sees it."""

    id: str
    row: int  # of the in-flight cells
    backend: str
    origin: Origin
    head: bytes  # the request headers that are the same every time
    health: Health = field(default_factory=Health)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One replica that can answer for one public name."""

    engine: Engine
    model: str  # what this engine calls it
    override: bytes  # `,"model":"..."` to append, empty where the engine knows the public name
    engine_name: re.Pattern[bytes] | None  # `"model":"..."` in its answers, None where nothing is to rewrite
    cell: int = ADAPTER_ROW  # first of its row there (observe.cells)


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """A public name, resolved."""

    label: str  # of metrics and logs
    public: bytes  # `"model":"..."`, as answers should have it; escaped for re.sub
    adapter: str | None
    candidates: tuple[Candidate, ...]  # accepting; not empty where `Table.resolve` answers with it
    split: Split | None = None  # a canary takes some of its requests


class Table:
    """The picture of control, compiled. Names change in it as control says; whoever holds a route keeps it as it is."""

    def __init__(self, snapshot: Snapshot, engines: dict[str, Engine], awaiting: Awaiting | None = None) -> None:
        """engines: replica id -> what the relay keeps for it, of accepting replicas only.

        awaiting: where requests wait for an adapter that is not loaded; None: they do not.
        """
        self.awaiting = awaiting or Awaiting(lambda _: None, 0.0, 0)
        self.version = snapshot.version
        self.task = snapshot.task
        self._models = snapshot.models
        self._engines = engines
        self._routes: dict[str, Route] = {}
        self.next_turn = itertools.count().__next__

    def __repr__(self) -> str:
        return f"<Table v{self.version}: {len(self._models)} names on {', '.join(self._engines) or 'no replica'}>"

    def change(self, delta: Delta) -> None:
        """Take over changed names: it costs what changed."""
        self.version = delta.version
        for name in delta.removed:
            self._models.pop(name, None)
            self._routes.pop(name, None)
        for name in delta.changed:
            self._routes.pop(name, None)
        self._models.update(delta.changed)

    def take_rest(self, rest: Snapshot, engines: dict[str, Engine]) -> None:
        """Take over everything but the names: here too, because requests whose body still comes hold this table."""
        self.task = rest.task
        self._engines = engines
        self._routes.clear()

    def resolve(self, name: str) -> Route:
        """The route of a public name. Raises ModelNotFound, Unavailable with the reason, or NotResident."""
        route = self._routes.get(name)
        if route is None:
            route = self._routes[name] = self._compile(name)
        return route

    def loads(self, name: str) -> bool:
        """Whether its adapter is loaded when a request waits for it."""
        model = self._models.get(name)
        return model.on_demand if model is not None else _versioned(name) in self._models

    def unready(self) -> str | None:
        """Why no base model can be served; None when one can."""
        reasons = []
        for model in self._models.values():
            if model.adapter is None:
                if any(replica in self._engines for replica in model.engine_models):
                    return None
                reasons.append(model.unready_reason)
        return next(filter(None, reasons), "no engine replica is ready yet")

    def _compile(self, name: str) -> Route:
        model = self._models.get(name)
        if model is None:
            if _versioned(name) in self._models:
                raise NotResident(name)  # versions are listed only where they are loaded: control knows them
            raise _not_found(name, self._models)
        route = self._route(name, model)
        if not route.candidates:
            if model.on_demand:
                raise NotResident(name)
            raise Unavailable(_why(name, model))
        if model.canary is not None:
            other = self._route(name, model.canary.model)
            if other.candidates:
                return replace(route, label=model.canary.stay, split=Split(other, model.canary.share))
        return route

    def _route(self, name: str, model: Model) -> Route:
        """How a model is reached under a name; its candidates may be none."""
        candidates = tuple(
            _candidate(name, self._engines[replica], engine_model, model.rows.get(replica, ADAPTER_ROW))
            for replica, engine_model in model.engine_models.items()
            if replica in self._engines
        )
        public = b'"model":' + json.dumps(name).encode()
        return Route(model.id, public.replace(b"\\", rb"\\"), model.adapter, candidates)


def engine_head(replica: Replica) -> bytes:
    """The headers each request to a replica starts with: its own key, never the client's."""
    host = f"[{replica.host}]" if ":" in replica.host else replica.host
    lines = f"host: {host}:{replica.port}\r\ncontent-type: application/json\r\n"
    if replica.api_key:
        lines += f"authorization: Bearer {replica.api_key}\r\n"
    return lines.encode()


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Known names that `name` may be a misspelling of."""
    start = name[:1].lower()
    alike = itertools.islice((other for other in known if other[:1].lower() == start), _NAMES_COMPARED)
    return difflib.get_close_matches(name[:200], list(alike), _NAMES_LISTED)


def _candidate(name: str, engine: Engine, engine_model: str, cell: int) -> Candidate:
    if engine_model == name:
        return Candidate(engine, engine_model, b"", None, cell)
    quoted = json.dumps(engine_model).encode()
    pattern = re.compile(rb'"model":\s*' + re.escape(quoted))
    return Candidate(engine, engine_model, b',"model":' + quoted, pattern, cell)


def _versioned(name: str) -> str | None:
    """The bare name of `name@vN`."""
    bare, found, version = name.rpartition("@v")
    return bare if found and _VERSION(version) else None


def _not_found(name: str, known: dict[str, Model]) -> ModelNotFound:
    shown = name if len(name) <= 100 else name[:100] + "…"
    close = nearest(name, known)
    hint = (
        f"Did you mean {' or '.join(f'`{other}`' for other in close)}?" if close else "GET /v1/models lists the names."
    )
    return ModelNotFound(f"The model `{shown}` does not exist. {hint}", param="model")


def _why(name: str, model: Model) -> str:
    if model.unready_reason:
        return f"The model `{name}` cannot be called yet: {model.unready_reason}."
    return f"The model `{name}` has no replica that accepts requests now. Try again in a moment."
