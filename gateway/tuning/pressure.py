"""Whether serving needs the device that a job trains on. `after` is a pure function over looks at what waits.

A look counts the requests that wait for room: at the relays, and in the engines' own queues. Those of batches do not
count, they have time. Where some waited at every look for as long as the rule allows, training yields; it goes on when
none has waited for many times as long, so that it does not come and go with every burst. An engine that does not say
what it has queued counts as one with a queue: that is how an engine looks which is too busy to answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from backends.load import Load
from gateway.control.core import Core
from gateway.control.gauging import Silent, ask
from gateway.control.replica import Replica
from gateway.observe.cells import InFlight

_log = logging.getLogger(__name__)
_CALM = 15  # times the wait: a trainer that goes on loads its model first
_SILENT_LIMIT_S = 300.0  # an engine that is only busy says something in that time, or fails its health checks
_GAP_S = 30.0  # without a look, because no job was there to hold: nobody knows who was silent in between


@dataclass(frozen=True, slots=True)
class Rule:
    """When training yields, and when it goes on."""

    wait_s: float  # requests have waited for so long, without a look that found none

    @property
    def calm_s(self) -> float:
        """None has waited for so long."""
        return _CALM * self.wait_s


@dataclass(frozen=True, slots=True)
class Pressure:
    """What the looks so far came to."""

    held: bool = False  # training stands still
    since_s: float | None = None  # since when every look has spoken for a change of that; None: the last one did not


@dataclass(frozen=True, slots=True)
class Look:
    """What waits at one moment."""

    waiting: int = 0  # requests, for all that is said
    silent: Mapping[str, str] = field(default_factory=dict)  # replica id -> why it is not known what waits there

    @property
    def busy(self) -> bool:
        """Whether there is, or may be, something that waits."""
        return self.waiting > 0 or bool(self.silent)

    def why(self, wait_s: float) -> str:
        """In words, of looks that were busy for so long."""
        if self.waiting or not self.silent:
            return f"requests have queued for {wait_s:g} s"
        said = ", ".join(f"{id} ({reason})" for id, reason in sorted(self.silent.items()))
        return f"for {wait_s:g} s it has not been known whether requests queue at {said}"


def after(before: Pressure, busy: bool, now_s: float, rule: Rule) -> Pressure:
    """What one more look makes of it. now_s: monotonic."""
    if before.held == busy:
        return Pressure(before.held)
    since_s = now_s if before.since_s is None else before.since_s
    if now_s - since_s >= (rule.calm_s if before.held else rule.wait_s):
        return Pressure(not before.held)
    return Pressure(before.held, since_s)


class Queues:
    """Counts what waits, over all relays and engines."""

    def __init__(self, core: Core, batches_in_flight: Callable[[], int]) -> None:
        """batches_in_flight: requests of batches that engines have; they may be what waits there."""
        self._core = core
        self._cells = InFlight(core.setup.run_dir)
        self._batches_in_flight = batches_in_flight
        self._asked_s = 0.0  # monotonic
        self._silent_since_s: dict[str, float] = {}  # replica id -> monotonic
        self._given_up: set[str] = set()  # silent for too long

    async def look(self, engines: bool) -> Look:
        """What waits now. engines: ask them too, which takes a page of metrics from each. Raises OSError."""
        count = await asyncio.to_thread(self._cells.pressing)
        if not engines:
            return Look(count)
        asked = [replica for replica in self._core.replicas if replica.answers]
        said = await asyncio.gather(*map(_said, asked))
        inside = sum(load.waiting for load in said if isinstance(load, Load))
        silent = {replica.id: load for replica, load in zip(asked, said, strict=True) if isinstance(load, str)}
        return Look(count + max(0, inside - self._batches_in_flight()), self._in_time(silent, time.monotonic()))

    def _in_time(self, silent: dict[str, str], now_s: float) -> dict[str, str]:
        """Without those that have said nothing for so long that they never will."""
        before = self._silent_since_s if now_s - self._asked_s < _GAP_S else {}
        self._asked_s = now_s
        self._silent_since_s = {id: before.get(id, now_s) for id in silent}
        self._given_up &= silent.keys()
        for id, reason in silent.items():
            if now_s - self._silent_since_s[id] >= _SILENT_LIMIT_S and id not in self._given_up:
                self._given_up.add(id)
                _log.warning("%s: %s, for %g s; jobs no longer yield to its queue", id, reason, _SILENT_LIMIT_S)
        return {id: reason for id, reason in silent.items() if id not in self._given_up}


async def _said(replica: Replica) -> Load | str | None:
    """What its engine says of its queue; None: nothing ever; or in words why it does not."""
    try:
        return await ask(replica)
    except Silent as error:
        return str(error)
