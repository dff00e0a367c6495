"""What the requests of one relay have in common: which routes there are, what the operator allows, and the state that
they share."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Literal

from gateway.observe.loads import Loads
from gateway.relay.account import Meter
from gateway.relay.admit import Admission, Room
from gateway.relay.health import RetryBudget
from gateway.relay.policy import chooser
from gateway.relay.route import Table


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An inference route: its path here and on the engines, and how it streams."""

    path: bytes
    task: str | None = None  # what an engine must have been started for; None: either
    stream: Literal["chunks", "responses"] | None = None
    absent_from: frozenset[str] = frozenset()  # backends whose engine has no such route
    names_checkpoint: frozenset[str] = frozenset()  # backends that answer with the checkpoint's path as `model`
    takes_prompt: bool = False
    has_effects: bool = False  # the engine keeps something of it: not to be run twice


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator allows."""

    max_body_bytes: int
    request_timeout_s: int  # longest silence of an engine, or of a client that does not read
    adapter_wait_s: float = 60.0  # longest wait for an adapter to be loaded
    max_in_flight: int = 1024  # requests at a replica, over all relays
    max_waiting: int = 1024  # requests of a relay that wait for room
    max_wait_s: float = 60.0  # longest such wait
    routing: str = "least-load"  # one of policy.ROUTINGS


class Traffic:
    """One relay's."""

    __slots__ = ("admission", "budget", "choose", "limits", "loop", "meter", "table")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, meter: Meter, limits: Limits, loads: Loads | None = None
    ) -> None:
        """loads: what engines say of themselves, for the routing that asks."""
        self.loop = loop
        self.meter = meter
        self.limits = limits
        self.table: Table | None = None  # None until control has said who may ask for what
        self.admission = Admission(meter, Room(limits.max_in_flight, limits.max_waiting, limits.max_wait_s), loop)
        self.budget = RetryBudget(time.monotonic())
        self.choose = chooser(limits.routing, loads)
