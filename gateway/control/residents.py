"""Keeps the plan of which replica holds which adapters: gathers demand, asks `residency.decide`, tells the reconciler.

While everything registered fits on every replica there is nothing to decide: all hold all.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from backends.spec import AdapterLoading
from gateway.adapters.names import parse_reference, pinned
from gateway.control import residency
from gateway.control.catalog import Adapter, Version, VersionState
from gateway.control.demand import Demand
from gateway.control.registry import SPARE, Registry
from gateway.control.replica import Replica
from gateway.control.residency import Held, Rules, Seat, Want
from gateway.control.rows import Rows
from gateway.observe.cells import InFlight
from gateway.snapshot import NotLoaded, Wanted

_IDLE_EVERY_S = 1.0  # between looks at the cells
_BUSY_EVERY_S = 0.05  # the same while requests wait
_ASK_LIFE_S = 3.0  # relays ask again every second while requests wait
_AVOID_S = 30.0  # a replica that refused an adapter is not tried with it again for so long
_FIRST_LOAD_S = 0.5  # what a load is taken to cost before one was measured


@dataclass(slots=True)
class _Waiting:
    since_s: float
    asked_s: float
    names: set[str]


@dataclass(slots=True)
class Counts:
    """Of one replica, since control began."""

    loads: int = 0
    evictions: int = 0
    load_s: float = 0.0  # of all loads together, verification included


@dataclass(frozen=True, slots=True)
class Ties:
    """What the residents ask of others."""

    changed: Callable[[], None]  # the plan is another
    answer: Callable[[NotLoaded], Awaitable[None]]  # waiting for a name is of no use
    pins: Callable[[], Mapping[str, int | None]]  # name -> on how many replicas; None: on all


class Residents:
    """Which replica is to hold which contents."""

    def __init__(
        self, registry: Registry, replicas: Sequence[Replica], in_flight: InFlight, ties: Ties, rules: Rules
    ) -> None:
        self.rows = Rows(in_flight.adapter)
        self.demand = Demand(self.rows, in_flight.adapters)
        self.counts: dict[str, Counts] = defaultdict(Counts)
        self._registry = registry
        self._replicas = replicas
        self._in_flight = in_flight
        self._ties = ties
        self._rules = rules
        self._plan: dict[str, tuple[str, ...]] = {}
        self._lives: dict[str, int] = {}  # replica id -> which of its engines the plan is for
        self._since: dict[tuple[str, str], float] = {}  # when it became ready there
        self._waiting: dict[str, _Waiting] = {}  # content id -> what relays asked
        self._avoid: dict[tuple[str, str], float] = {}  # content id and replica that refused it -> until when
        self._load_s: dict[str, float] = {}  # of what was loaded lately
        self._mean_load_s = _FIRST_LOAD_S
        self._refused: deque[NotLoaded] = deque()
        self._wake = asyncio.Event()

    def __repr__(self) -> str:
        """`<Residency r0 3/8: a@v2 active=4, b@v1 idle>`"""
        return f"<Residency {'; '.join(self._show(replica) for replica in self._replicas)}>"

    @property
    def waiting(self) -> int:
        """Adapters that requests wait for."""
        return len(self._waiting)

    def want(self, said: Wanted) -> NotLoaded | None:
        """A relay's requests wait for a name; the answer where that is of no use."""
        name, number = parse_reference(said.name)
        version = self._registry.find(name, number)
        if version is None:
            return NotLoaded(said.name, "it was deleted, or there is no such version", exists=False)
        if version.state is VersionState.FAILED:
            return NotLoaded(said.name, f"it failed: {version.reason}")
        if not self._registry.on_demand and version.content_id not in self._registry.desired:
            return NotLoaded(said.name, "newer adapters fill --max-adapters")
        if not self._ready(version.content_id):
            now_s = time.monotonic()
            waiting = self._waiting.setdefault(version.content_id, _Waiting(now_s, now_s, set()))
            waiting.asked_s = now_s
            waiting.names.add(said.name)
            self._wake.set()
        return None

    def look(self) -> None:
        """Decide anew: something changed."""
        self._wake.set()

    def desired(self, replica: Replica, observed: Collection[str]) -> Sequence[str]:
        """What a replica should hold. observed: what its engine lists; of an engine that is new to us it stays."""
        if not self._registry.on_demand:
            return self._registry.desired
        if self._lives.get(replica.id) != replica.restarts:
            self._lives[replica.id] = replica.restarts
            known = [name for name in sorted(observed) if self._registry.index.alive(name)]
            self._plan[replica.id] = tuple(known[: self._registry.capacity - SPARE])
            self._decide(time.monotonic())
        return self._plan.get(replica.id, ())

    def evict(self, content_id: str) -> None:
        """Replicas need not hold it any more, as if nobody had asked for it."""
        self.demand.clear(content_id)
        self._plan = {id: tuple(name for name in plan if name != content_id) for id, plan in self._plan.items()}
        self._ties.changed()

    def holders(self, content_id: str) -> list[Replica]:
        """The replicas that should hold it, of those that take part."""
        taking_part = [replica for replica in self._replicas if replica.takes_part]
        if not self._registry.on_demand:
            return taking_part
        return [replica for replica in taking_part if content_id in self._plan.get(replica.id, ())]

    def quiet(self, replica: Replica, content_id: str) -> bool:
        """Whether no request for it is in flight there, for all that the cells tell."""
        if self._in_flight.adapter(self.rows.cell(replica.id, content_id)):
            return False
        places = [cell for place, cell in self.rows.places.items() if place[0] == replica.id]
        known = sum(self._in_flight.adapter(cell) for cell in places)
        # More than the rows account for: requests from before this control process, which may be for anything.
        return self._in_flight.replica(replica.index) <= known

    def loaded(self, replica: Replica, content_id: str, took_s: float) -> None:
        """It was loaded and has answered."""
        counts = self.counts[replica.id]
        counts.loads += 1
        counts.load_s += took_s
        self._load_s[content_id] = took_s
        self._mean_load_s += 0.1 * (took_s - self._mean_load_s)

    def unloaded(self, replica: Replica, content_id: str) -> None:
        """It is not there any more."""
        self.counts[replica.id].evictions += 1

    def refused(self, replica: Replica, content_id: str, reason: str) -> None:
        """The replica did not take it."""
        now_s = time.monotonic()
        self._avoid[content_id, replica.id] = now_s + _AVOID_S
        self._plan[replica.id] = tuple(name for name in self._plan.get(replica.id, ()) if name != content_id)
        seats = [other for other in self._replicas if _serves(other)]
        if all((content_id, other.id) in self._avoid for other in seats):
            waiting = self._waiting.pop(content_id, None)
            for name in waiting.names if waiting is not None else ():
                self._refused.append(NotLoaded(name, reason))
        self._wake.set()

    async def run(self) -> None:
        """Look and decide, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_BUSY_EVERY_S if self._waiting else _IDLE_EVERY_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            while self._refused:
                await self._ties.answer(self._refused.popleft())
            if not self._registry.on_demand:
                self._plan.clear()
                self._lives.clear()
                self._waiting.clear()
                self.demand.look(time.monotonic())
                self._take_back_rows()
                continue
            before = {id: frozenset(names) for id, names in self._plan.items()}
            self._decide(time.monotonic())
            if before != {id: frozenset(names) for id, names in self._plan.items()}:
                self._ties.changed()

    def _decide(self, now_s: float) -> None:
        self.demand.look(now_s)  # first: what is forgotten has been counted
        self._forget(now_s)
        seats = {replica.id: self._seat(replica, now_s) for replica in self._replicas if _serves(replica)}
        seats = {id: seat for id, seat in seats.items() if id in self._lives}
        room = self._registry.capacity - SPARE
        self._plan |= residency.decide(seats, self._wants(seats), room, SPARE, now_s, self._rules)

    def _forget(self, now_s: float) -> None:
        """Drop what is over."""
        for content_id, waiting in list(self._waiting.items()):
            if now_s - waiting.asked_s > _ASK_LIFE_S or self._ready(content_id):
                del self._waiting[content_id]
        self._avoid = {key: until_s for key, until_s in self._avoid.items() if until_s > now_s}
        known = {replica.id: replica for replica in self._replicas}
        for id in [id for id in self._plan if id not in known]:
            del self._plan[id]
        self._take_back_rows()
        held = {name for names in self._plan.values() for name in names}
        if len(self._load_s) > 4 * len(held) + 1000:
            self._load_s = {name: took_s for name, took_s in self._load_s.items() if name in held}

    def _take_back_rows(self) -> None:
        self.rows.release({replica.id: replica.adapters for replica in self._replicas})

    def _seat(self, replica: Replica, now_s: float) -> Seat:
        held = {}
        for content_id in self._plan.get(replica.id, ()):
            if not self._registry.index.alive(content_id):
                continue
            key = (replica.id, content_id)
            if replica.adapter_ready(content_id):
                use = self.demand.use(*key, now_s)
                since_s = self._since.setdefault(key, now_s)
                held[content_id] = Held(since_s, use.used_s, use.in_flight, self._worth(content_id), use.asked)
            else:
                self._since.pop(key, None)
                held[content_id] = Held(None, now_s, 0, self._worth(content_id))
        for key in [key for key in self._since if key[0] == replica.id and key[1] not in held]:
            del self._since[key]
        return Seat(held, self._in_flight.replica(replica.index))

    def _wants(self, seats: Mapping[str, Seat]) -> list[Want]:
        wants: dict[str, Want] = {}
        for name, count in self._ties.pins().items():
            version = self._registry.find(*parse_reference(name))
            if version is not None and version.state is not VersionState.FAILED:
                spread = len(seats) if count is None else min(count, len(seats))
                wants[version.content_id] = self._want(version.content_id, spread=spread, pinned=True)
        for name in self._registry.index.moving:
            for version in _coming(self._registry.adapters[name]):
                copies = sum(self._current(name) in seat.held for seat in seats.values())
                wants.setdefault(version.content_id, self._want(version.content_id, spread=max(1, copies), rising=True))
        for content_id, waiting in self._waiting.items():
            wants.setdefault(content_id, self._want(content_id, waiting_since_s=waiting.since_s))
        total = sum(seat.load for seat in seats.values())
        for content_id in self.demand.hot(sum(len(seat.held) for seat in seats.values()) + 1, wants):
            if self._registry.index.alive(content_id):
                spread = residency.spread(self.demand.in_flight(content_id), total, len(seats))
                wants[content_id] = self._want(content_id, spread=spread)
        return list(wants.values())

    def _want(
        self,
        content_id: str,
        spread: int = 1,
        waiting_since_s: float | None = None,
        pinned: bool = False,
        rising: bool = False,
    ) -> Want:
        avoid = frozenset(replica for name, replica in self._avoid if name == content_id)
        return Want(content_id, spread, waiting_since_s, pinned, rising, self._worth(content_id), avoid)

    def _worth(self, content_id: str) -> float:
        """What it costs, in seconds of loading a second, not to have it: requests a second times its load."""
        return self.demand.rate(content_id) * self._load_s.get(content_id, self._mean_load_s)

    def _current(self, name: str) -> str | None:
        adapter = self._registry.adapters[name]
        return None if adapter.current is None else adapter.versions[adapter.current].content_id

    def _ready(self, content_id: str) -> bool:
        return any(replica.accepting and replica.adapter_ready(content_id) for replica in self._replicas)

    def _show(self, replica: Replica) -> str:
        names = []
        for content_id in replica.adapters:
            users = self._registry.index.users(content_id)
            name = pinned(users[0].name, users[0].version) if users else content_id
            active = self.demand.use(replica.id, content_id, 0.0).in_flight
            names.append(f"{name} {f'active={active}' if active else 'idle'}")
        room = self._registry.capacity - SPARE
        return f"{replica.id} {len(names)}/{room}{': ' if names else ''}{', '.join(names)}"


def _serves(replica: Replica) -> bool:
    """Whether adapters come and go there, now."""
    backend = replica.backend
    return replica.accepting and backend is not None and backend.capabilities.adapter_loading is AdapterLoading.RUNTIME


def _coming(adapter: Adapter) -> list[Version]:
    """The versions that a name needs loaded beside its current one."""
    versions = [adapter.target[0]] if adapter.target is not None else []
    if adapter.canary is not None and adapter.canary.version in adapter.versions:
        versions.append(adapter.versions[adapter.canary.version])
    return [version for version in versions if version.state is not VersionState.FAILED]
