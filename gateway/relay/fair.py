"""A bounded queue that is fair: between keys, and within a key between adapters. Pure; the shell is admit.py.

Start-time fair queueing, on two levels. Whoever waits has a virtual start time; the least goes first, and is then set
back by what its request costs. Who comes anew starts at the clock, which is the start time last served: so one key's
thousand requests delay another key's single one by the request being served, not by a thousand.

    lane (priority) ─> tenant (key) ─> flow (adapter) ─> tickets, first come, first served
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

_REMEMBERED = 1024  # tenants and flows that wait for nothing and whose debt is kept


class Ticket:
    """A place in the queue. waiter: whose it is, opaque here."""

    __slots__ = ("adapter", "bytes", "cost", "deadline_s", "key", "priority", "since_s", "waiter")

    def __init__(
        self,
        waiter: Any,
        key: str | None,
        adapter: str | None,
        priority: int,
        cost: float,
        bytes: int,
        since_s: float,
        deadline_s: float,
    ) -> None:
        """priority: higher goes first. cost: estimated, in tokens. deadline_s: monotonic; useless from then on."""
        self.waiter = waiter
        self.key = key
        self.adapter = adapter
        self.priority = priority
        self.cost = cost
        self.bytes = bytes
        self.since_s = since_s
        self.deadline_s = deadline_s


class _Flow:
    """Tickets of one adapter of one key."""

    __slots__ = ("start", "tickets")

    def __init__(self, start: float) -> None:
        self.start = start
        self.tickets: deque[Ticket] = deque()


class _Tenant:
    """What one key waits for."""

    __slots__ = ("clock", "cost", "flows", "start", "waiting")

    def __init__(self, start: float) -> None:
        self.start = start
        self.clock = 0.0
        self.flows: dict[str | None, _Flow] = {}
        self.waiting = 0
        self.cost = 0.0  # of all that waits

    def add(self, ticket: Ticket) -> None:
        flow = self.flows.get(ticket.adapter)
        if flow is None:
            if len(self.flows) > _REMEMBERED + self.waiting:
                self.flows = {name: flow for name, flow in self.flows.items() if flow.tickets}
            flow = self.flows[ticket.adapter] = _Flow(self.clock)
        if not flow.tickets:
            flow.start = max(flow.start, self.clock)
        flow.tickets.append(ticket)
        self.waiting += 1
        self.cost += ticket.cost

    def take(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        for flow in sorted((flow for flow in self.flows.values() if flow.tickets), key=_start):
            if fits(flow.tickets[0]):
                ticket = flow.tickets.popleft()
                self.clock = flow.start
                flow.start += ticket.cost
                self._gone(ticket)
                return ticket
        return None

    def remove(self, ticket: Ticket) -> None:
        self.flows[ticket.adapter].tickets.remove(ticket)
        self._gone(ticket)

    def newest(self) -> Ticket:
        """Of the flow that has most."""
        return max(self.flows.values(), key=lambda flow: len(flow.tickets)).tickets[-1]

    def _gone(self, ticket: Ticket) -> None:
        self.waiting -= 1
        self.cost -= ticket.cost


class _Lane:
    """One priority."""

    __slots__ = ("clock", "tenants", "waiting")

    def __init__(self) -> None:
        self.clock = 0.0
        self.tenants: dict[str | None, _Tenant] = {}
        self.waiting = 0

    def add(self, ticket: Ticket) -> None:
        tenant = self.tenants.get(ticket.key)
        if tenant is None:
            if len(self.tenants) > _REMEMBERED + self.waiting:
                self.tenants = {key: tenant for key, tenant in self.tenants.items() if tenant.waiting}
            tenant = self.tenants[ticket.key] = _Tenant(self.clock)
        if not tenant.waiting:
            tenant.start = max(tenant.start, self.clock)
        tenant.add(ticket)
        self.waiting += 1

    def take(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        for tenant in sorted((tenant for tenant in self.tenants.values() if tenant.waiting), key=_start):
            ticket = tenant.take(fits)
            if ticket is not None:
                self.clock = max(self.clock, tenant.start)
                tenant.start += ticket.cost
                self._gone()
                return ticket
        return None

    def remove(self, ticket: Ticket) -> None:
        self.tenants[ticket.key].remove(ticket)
        self._gone()

    def ahead(self, key: str | None) -> float:
        """Tickets that would be served before a new one of `key`, about."""
        own = self.tenants.get(key)
        turn = self.clock if own is None else max(self.clock, own.start) + own.cost
        before = float(own.waiting) if own is not None else 0.0
        for tenant in self.tenants.values():
            if tenant.waiting and tenant is not own:
                before += tenant.waiting * min(1.0, max(0.0, turn - tenant.start) / tenant.cost)
        return before

    def _gone(self) -> None:
        self.waiting -= 1
        if not self.waiting:  # nobody waits: all start anew, and nothing is left to grow
            self.tenants.clear()
            self.clock = 0.0


class FairQueue:
    """Everything that waits at one relay."""

    def __init__(self) -> None:
        self._lanes: dict[int, _Lane] = {}
        self.waiting = 0
        self.bytes = 0

    def __repr__(self) -> str:
        lanes = "; ".join(
            f"{priority}: "
            + ", ".join(f"{key or '-'}={tenant.waiting}" for key, tenant in lane.tenants.items() if tenant.waiting)
            for priority, lane in self._by_priority()
            if lane.waiting
        )
        return f"<FairQueue {self.waiting} waiting{': ' if lanes else ''}{lanes}>"

    def __iter__(self) -> Iterator[Ticket]:
        """All tickets, as they are now."""
        tenants = [tenant for lane in self._lanes.values() for tenant in lane.tenants.values()]
        return iter([ticket for tenant in tenants for flow in tenant.flows.values() for ticket in flow.tickets])

    def add(self, ticket: Ticket) -> None:
        """Take a place."""
        lane = self._lanes.get(ticket.priority)
        if lane is None:
            lane = self._lanes[ticket.priority] = _Lane()
        lane.add(ticket)
        self.waiting += 1
        self.bytes += ticket.bytes

    def take(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        """The one whose turn it is, of those that fit; it leaves the queue."""
        for _, lane in self._by_priority():
            ticket = lane.take(fits) if lane.waiting else None
            if ticket is not None:
                self._gone(ticket)
                return ticket
        return None

    def remove(self, ticket: Ticket) -> None:
        """Give up a place."""
        self._lanes[ticket.priority].remove(ticket)
        self._gone(ticket)

    def ahead(self, key: str | None, priority: int) -> float:
        """Tickets that would be served before a new one, about."""
        lane = self._lanes.get(priority)
        return self.above(priority) + (lane.ahead(key) if lane is not None else 0.0)

    def above(self, priority: int) -> int:
        """Tickets of a higher priority."""
        return sum(lane.waiting for other, lane in self._lanes.items() if other > priority)

    def yielding(self, key: str | None, priority: int) -> Ticket | None:
        """Who gives up its place to a newcomer where there is no room: of a lower priority, else of a key with more.

        None: the newcomer has itself to blame, or nobody has more.
        """
        for other, lane in reversed(self._by_priority()):
            if not lane.waiting or other > priority:
                continue
            most = max(lane.tenants.values(), key=lambda tenant: tenant.waiting)
            own = lane.tenants.get(key)
            if other < priority or most.waiting > (own.waiting if own is not None else 0) + 1:
                return most.newest()
        return None

    def _by_priority(self) -> list[tuple[int, _Lane]]:
        return sorted(self._lanes.items(), reverse=True)

    def _gone(self, ticket: Ticket) -> None:
        self.waiting -= 1
        self.bytes -= ticket.bytes
        if not self.waiting:
            self._lanes.clear()


def _start(item: _Tenant | _Flow) -> float:
    return item.start
