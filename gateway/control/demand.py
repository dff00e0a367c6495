"""What adapters are asked for: read from the relays' cells, never counted request by request here."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from gateway.control.rows import Place, Rows
from gateway.observe.cells import ADAPTER_ROW

_HALF_LIFE_S = 30.0
_FORGOTTEN = 1e-3  # requests a second, below which nothing is remembered of an adapter that is loaded nowhere


@dataclass(slots=True)
class Use:
    """An adapter on a replica."""

    cell: int  # the first of its row
    ever: int  # requests, as the row counts
    used_s: float
    in_flight: int = 0
    asked: bool = False  # it had a request since it was given its row


class Demand:
    """Rates and in-flight means, decaying with a half-life of 30 s."""

    def __init__(self, rows: Rows, read: Callable[[int], list[int]]) -> None:
        """read: the cells of all rows before a cell, summed over relays (observe.cells.InFlight)."""
        self._rows = rows
        self._read = read
        self._uses: dict[Place, Use] = {}
        self._rates: dict[str, float] = {}  # content id -> requests a second, of late
        self._busy: dict[str, float] = {}  # content id -> requests in flight, of late
        self._looked_s: float | None = None
        self.served = 0  # requests that went to adapters, since control began

    def look(self, now_s: float) -> None:
        """Bring everything up to date."""
        cells = self._read(self._rows.end)
        elapsed_s = max(1e-3, now_s - self._looked_s) if self._looked_s is not None else 1.0
        self._looked_s = now_s
        kept = math.exp2(-elapsed_s / _HALF_LIFE_S)
        asked: dict[str, int] = {}
        busy: dict[str, int] = {}
        uses: dict[Place, Use] = {}
        for place, cell in self._rows.places.items():
            content_id = place[1]
            if content_id is None:
                continue
            in_flight, ever = cells[cell - ADAPTER_ROW : cell - ADAPTER_ROW + 2]
            use = self._uses.get(place)
            if use is None or use.cell != cell:  # another row: it was there before
                use = Use(cell, self._rows.ever(place), now_s)
            new = max(0, ever - use.ever)  # a relay whose file is new counts from zero
            use.ever, use.in_flight, use.asked = ever, max(0, in_flight), use.asked or new > 0
            if new or use.in_flight:
                use.used_s = now_s
            uses[place] = use
            self.served += new
            asked[content_id] = asked.get(content_id, 0) + new
            busy[content_id] = busy.get(content_id, 0) + use.in_flight
        self._uses = uses
        self._rates = _decayed(self._rates, kept, {name: new / elapsed_s for name, new in asked.items()})
        self._busy = _decayed(self._busy, kept, busy)

    def use(self, replica: str, content_id: str, now_s: float) -> Use:
        """How an adapter is used on a replica, as of the last look."""
        return self._uses.get((replica, content_id)) or Use(0, 0, now_s)

    def rate(self, content_id: str) -> float:
        """Its requests a second over all replicas, of late."""
        return self._rates.get(content_id, 0.0)

    def in_flight(self, content_id: str) -> float:
        """Its requests in flight over all replicas, of late."""
        return self._busy.get(content_id, 0.0)

    def hot(self, limit: int, but: Collection[str]) -> list[str]:
        """The most asked for, at most `limit`, without `but`."""
        return sorted(self._rates.keys() - set(but), key=self._rates.__getitem__, reverse=True)[:limit]

    def clear(self, content_id: str) -> None:
        """As if nobody had asked for it."""
        self._rates.pop(content_id, None)
        self._busy.pop(content_id, None)


def _decayed(before: dict[str, float], kept: float, now: dict[str, float] | dict[str, int]) -> dict[str, float]:
    """The means, with the share `kept` of what was and the rest of what is."""
    means = {name: kept * mean for name, mean in before.items() if name in now or kept * mean > _FORGOTTEN}
    for name, value in now.items():
        means[name] = means.get(name, 0.0) + (1 - kept) * value
    return means
