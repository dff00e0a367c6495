"""Which adapters each replica should hold when more are registered than fit: a pure function of demand.

Placement is bounded-load rendezvous hashing: each adapter ranks the replicas in an order of its own, so it comes back
to where it was and is loaded on few, and one that is loaded above the bound is passed over. What gives way is what is
worth least: the rate of its requests times what it costs to load it again, and among equals the least recently used.
Nothing gives way before it has stayed a while, nothing in use to what nobody waits for. Where all is in use and others
wait, the one that stayed longest is drained for the one that waits longest: adapters then take turns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

BOUND = 1.25  # of a replica's load over the mean


@dataclass(frozen=True, slots=True)
class Rules:
    """Hysteresis, in seconds."""

    stay_s: float = 0.1  # nothing gives way earlier
    unasked_s: float = 0.3  # nor what had no request yet: those that waited for it are on their way
    patience_s: float = 0.5  # a wait that outweighs what a resident is worth
    turn_s: float = 5.0  # one in use may be drained for one that waits after that


@dataclass(frozen=True, slots=True)
class Held:
    """An adapter that a replica holds, or is to hold."""

    since_s: float | None  # when it became ready there; None: not yet
    used_s: float  # its last request there
    in_flight: int
    worth: float = 0.0  # requests a second there times the seconds that a load takes
    asked: bool = True  # it had a request since it became ready


@dataclass(frozen=True, slots=True)
class Want:
    """An adapter that should be held on some replicas."""

    content_id: str
    spread: int = 1  # on how many
    waiting_since_s: float | None = None  # of the oldest request that waits for it; None: none does
    pinned: bool = False
    rising: bool = False  # a version on its way up: it may use the spare room
    worth: float = 0.0
    avoid: frozenset[str] = frozenset()  # replicas that refused it


@dataclass(frozen=True, slots=True)
class Seat:
    """A replica that loads and unloads while it serves."""

    held: Mapping[str, Held]
    load: float  # requests in flight on it, or any other measure


def decide(
    seats: Mapping[str, Seat], wants: Iterable[Want], room: int, spare: int, now_s: float, rules: Rules
) -> dict[str, tuple[str, ...]]:
    """Replica -> content ids that it should hold from now on, most wanted first.

    room: contents a replica holds; spare: more for versions on their way up. What is not wanted stays while there is
    room. An adapter that finds no place keeps waiting: ask again when something changed.
    """
    plan = {replica: dict(seat.held) for replica, seat in seats.items()}
    wanted = sorted(wants, key=_urgency)
    kept = {want.content_id for want in wanted if want.pinned or want.rising or want.waiting_since_s is not None}
    mean = sum(seat.load for seat in seats.values()) / max(1, len(seats))
    for want in wanted:
        have = sum(want.content_id in held for held in plan.values())
        order = ranked(want.content_id, [r for r in plan if r not in want.avoid and want.content_id not in plan[r]])
        order = [r for r in order if seats[r].load <= BOUND * mean + 1] + [
            r for r in order if seats[r].load > BOUND * mean + 1
        ]
        limit = room + (spare if want.rising else 0)
        for replica in sorted(order, key=lambda replica: len(plan[replica]) >= limit):  # stable: free room first
            if have >= want.spread:
                break
            held = plan[replica]
            if len(held) >= limit:
                if any(one.since_s is None for one in held.values()):
                    continue  # loads are serial: nothing goes before its place is needed
                victim = _victim(held, want, kept, now_s, rules)
                if victim is None:
                    continue
                del held[victim]
            held[want.content_id] = Held(None, now_s, 0, want.worth)
            have += 1
    rising = {want.content_id for want in wanted if want.rising}
    for held in plan.values():
        if len(held) > room and not rising & held.keys():  # the spare room is free again
            idle = _idle(_settled(held, kept, now_s, rules))
            for name in idle[: len(held) - room]:
                del held[name]
    rank = {want.content_id: number for number, want in enumerate(wanted)}
    return {replica: tuple(sorted(held, key=lambda name: rank.get(name, len(rank)))) for replica, held in plan.items()}


def ranked(content_id: str, replicas: Sequence[str]) -> list[str]:
    """The replicas in the adapter's own order (rendezvous hashing)."""
    return sorted(replicas, key=lambda replica: hashlib.blake2b(f"{content_id}@{replica}".encode()).digest())


def spread(in_flight: float, all_in_flight: float, replicas: int) -> int:
    """On how many replicas an adapter must be so that none exceeds the load bound by it alone.

    in_flight: its own requests, of late; all_in_flight: everybody's.
    """
    bound = max(_FEW, BOUND * all_in_flight / max(1, replicas))
    return max(1, min(replicas, math.ceil(in_flight / bound)))


_LONG = 10  # times the patience: a wait that pushes out whatever may go
_FEW = 4.0  # requests in flight that never ask for another replica


def _urgency(want: Want) -> tuple[bool, bool, float, float, str]:
    waiting = want.waiting_since_s if want.waiting_since_s is not None else math.inf
    return not want.pinned, not want.rising, waiting, -want.worth, want.content_id


def _settled(held: Mapping[str, Held], kept: set[str], now_s: float, rules: Rules) -> dict[str, Held]:
    """What may give way: it is wanted by nothing that counts more, and has stayed."""
    return {
        name: one
        for name, one in held.items()
        if name not in kept and one.since_s is not None and now_s - one.since_s >= _stay_s(one, rules)
    }


def _stay_s(one: Held, rules: Rules) -> float:
    return rules.stay_s if one.asked else max(rules.stay_s, rules.unasked_s)


def _idle(held: Mapping[str, Held]) -> list[str]:
    """What has nothing in flight, worth least first."""
    idle = [(one.worth, one.used_s, name) for name, one in held.items() if not one.in_flight]
    return [name for _, _, name in sorted(idle)]


def _victim(held: Mapping[str, Held], want: Want, kept: set[str], now_s: float, rules: Rules) -> str | None:
    """What gives way to `want`; None: nothing yet."""
    settled = _settled(held, kept, now_s, rules)
    pressing = want.pinned or want.rising
    if want.waiting_since_s is not None:
        pressing = pressing or now_s - want.waiting_since_s >= rules.patience_s
    long_s = _LONG * rules.patience_s
    if want.waiting_since_s is None or now_s - want.waiting_since_s < long_s:
        # Rather wait until what is worth little has stayed than push out what is worth more.
        ready = {name: one for name, one in held.items() if name not in kept and one.since_s is not None}
        least = _idle(ready)[:1]
        if least and least[0] not in settled:
            return None
    for name in _idle(settled)[:1]:
        # A wait counts as much as a request a second; without one it takes twice the worth.
        gained = want.worth + 1.0 if want.waiting_since_s is not None else want.worth / 2
        if pressing or gained > settled[name].worth:
            return name
    if not pressing:
        return None
    stayed = {name: since for name, one in settled.items() if now_s - (since := one.since_s or 0.0) >= rules.turn_s}
    return min(stayed, key=lambda name: (stayed[name], name)) if stayed else None
