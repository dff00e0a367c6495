"""Where a request goes: the snapshot compiled for look-ups, and the choice among replicas as a pure function.

A name is compiled when it is first asked for, so that neither a snapshot's arrival nor a request depends on how many
adapters are registered.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gateway.errors import ModelNotFound, Unavailable
from gateway.relay.upstream import Origin
from gateway.snapshot import Model, Replica, Snapshot

_NAMES_COMPARED = 200  # for "did you mean"; a bound on what a wrong name can cost
_NAMES_LISTED = 3


@dataclass(slots=True, eq=False)
class Engine:
    """A replica as the token path sees it."""

    id: str
    row: int  # of the in-flight cells
    backend: str
    origin: Origin
    head: bytes  # the request headers that are the same every time
    avoid_until_s: float = 0.0  # monotonic; it refused a connection a moment ago


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One replica that can answer for one public name."""

    engine: Engine
    model: str  # what this engine calls it
    override: bytes  # `,"model":"..."` to append, empty where the engine knows the public name
    engine_name: re.Pattern[bytes] | None  # `"model":"..."` in its answers, None where nothing is to rewrite


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """A public name, resolved."""

    label: str  # of metrics and logs
    public: bytes  # `"model":"..."`, as answers should have it; escaped for re.sub
    adapter: str | None
    candidates: tuple[Candidate, ...]  # accepting, not empty


class Table:
    """One snapshot, compiled."""

    def __init__(self, snapshot: Snapshot, engines: dict[str, Engine]) -> None:
        """engines: replica id -> what the relay keeps for it, of accepting replicas only."""
        self.version = snapshot.version
        self.key_digests = snapshot.key_digests
        self.task = snapshot.task
        self._models = snapshot.models
        self._engines = engines
        self._routes: dict[str, Route] = {}
        self.next_turn = itertools.count().__next__

    def __repr__(self) -> str:
        return f"<Table v{self.version}: {len(self._models)} names on {', '.join(self._engines) or 'no replica'}>"

    def resolve(self, name: str) -> Route:
        """The route of a public name. Raises ModelNotFound, or Unavailable with the reason."""
        route = self._routes.get(name)
        if route is None:
            route = self._routes[name] = self._compile(name)
        return route

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
            raise _not_found(name, self._models)
        candidates = tuple(
            _candidate(name, self._engines[replica], engine_model)
            for replica, engine_model in model.engine_models.items()
            if replica in self._engines
        )
        if not candidates:
            raise Unavailable(_why(name, model))
        public = b'"model":' + json.dumps(name).encode()
        return Route(model.id, public.replace(b"\\", rb"\\"), model.adapter, candidates)


def pick(candidates: Sequence[Candidate], in_flight: Callable[[int], int], now_s: float, turn: int) -> Candidate:
    """The candidate with the least in flight; equals take turns. One that just refused a connection comes last.

    in_flight: row -> requests over all relays. turn: a number that grows from call to call.
    """
    if len(candidates) == 1:
        return candidates[0]
    best: Candidate | None = None
    least = (True, 0)
    for i in range(len(candidates)):
        candidate = candidates[(turn + i) % len(candidates)]
        load = (candidate.engine.avoid_until_s > now_s, in_flight(candidate.engine.row))
        if best is None or load < least:
            best, least = candidate, load
    assert best is not None
    return best


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


def _candidate(name: str, engine: Engine, engine_model: str) -> Candidate:
    if engine_model == name:
        return Candidate(engine, engine_model, b"", None)
    quoted = json.dumps(engine_model).encode()
    return Candidate(engine, engine_model, b',"model":' + quoted, re.compile(rb'"model":\s*' + re.escape(quoted)))


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
