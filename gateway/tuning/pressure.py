"""Whether serving needs the device that a job trains on. `after` is a pure function over looks at what waits.

A look counts the requests that wait for room: at the relays, and in the engines' own queues. Those of batches do not
count, they have time. Where some waited at every look for as long as the rule allows, training yields; it goes on when
none has waited for many times as long, so that it does not come and go with every burst.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from gateway.control.core import Core
from gateway.control.gauging import ask
from gateway.observe.cells import InFlight

_CALM = 15  # times the wait: a trainer that goes on loads its model first


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


def after(before: Pressure, waiting: int, now_s: float, rule: Rule) -> Pressure:
    """What one more look makes of it. waiting: requests. now_s: monotonic."""
    if before.held == (waiting > 0):
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

    async def waiting(self, engines: bool) -> int:
        """Requests that wait. engines: ask them too, which takes a page of metrics from each. Raises OSError."""
        count = await asyncio.to_thread(self._cells.pressing)
        if engines:
            said = await asyncio.gather(*(ask(replica) for replica in self._core.replicas if replica.answers))
            inside = sum(load.waiting for load in said if load is not None)
            count += max(0, inside - self._batches_in_flight())
        return count
