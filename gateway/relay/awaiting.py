"""Requests whose adapter is registered and loaded nowhere: they wait while control has it loaded.

Control is asked once for each adapter, and again every second while requests wait, so nothing hangs on a lost message.
The wait is bounded in number, in bytes and in time, and no key may have more than half of the places.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from gateway.errors import GatewayError, ModelNotFound, Unavailable
from gateway.relay.waiters import Breakable, tell

if TYPE_CHECKING:
    from gateway.relay.route import Table

_PARKED_BYTES = 64_000_000  # of request bodies, a relay
_RETRY_AFTER_S = 5  # told to a client that waited in vain


class NotResident(Exception):
    """A name can be called once its adapter is loaded."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Waiter(Breakable, Protocol):
    """A request that waits."""

    @property
    def parked_key(self) -> str | None:
        """Whose it is; None where access is open."""

    @property
    def parked_bytes(self) -> int:
        """What it holds while it waits; the same all the time."""

    def adapter_loaded(self, table: Table) -> None:
        """It may be tried again."""

    def adapter_not_loaded(self, error: GatewayError) -> None:
        """It waited in vain."""


class Awaiting:
    """One relay's waiting requests, by name."""

    def __init__(self, ask: Callable[[str], None], limit_s: float, limit: int) -> None:
        """ask: tells control a name that is wanted. limit_s: longest wait. limit: most requests that wait."""
        self._ask = ask
        self._limit_s = limit_s
        self._limit = limit
        self._waiting: dict[str, dict[Waiter, float]] = {}  # name -> request -> until when (monotonic s)
        self._wanted: set[str] = set()  # asked for since the last tick
        self._by_key: Counter[str | None] = Counter()
        self._bytes = 0
        self.count = 0
        self.misses = 0  # requests that had to wait, ever

    def __repr__(self) -> str:
        return f"<Awaiting {self.count} requests for {len(self._waiting)} adapters>"

    def park(self, name: str, waiter: Waiter, since_s: float) -> None:
        """Let a request wait for a name. since_s: when it first did. Raises Unavailable when too many wait."""
        if self.count >= self._limit or self._bytes + waiter.parked_bytes > _PARKED_BYTES:
            raise _unavailable(
                f"`{name}` is not loaded, and {self.count} requests wait for adapters already, the most that may"
            )
        key = waiter.parked_key
        if key is not None and self._by_key[key] >= max(1, self._limit // 2):
            raise _unavailable(
                f"`{name}` is not loaded, and {self._by_key[key]} of your requests wait for adapters already"
            )
        waiters = self._waiting.get(name)
        if waiters is None:
            waiters = self._waiting[name] = {}
            self._ask(name)
        waiters[waiter] = since_s + self._limit_s
        self.count += 1
        self._by_key[key] += 1
        self._bytes += waiter.parked_bytes
        self.misses += 1

    def want(self, name: str) -> None:
        """Have it loaded for somebody who does not wait here, and says so again every second."""
        if name not in self._waiting and name not in self._wanted:
            self._wanted.add(name)
            self._ask(name)

    def leave(self, name: str, waiter: Waiter) -> None:
        """A request waits no more; fine if it did not."""
        waiters = self._waiting.get(name)
        if waiters is not None and waiters.pop(waiter, None) is not None:
            self._gone(waiter)
            if not waiters:
                del self._waiting[name]

    def changed(self, names: Iterable[str], table: Table) -> None:
        """Those who wait for these names try again: they are loaded, or were deleted."""
        if self._waiting:
            for name in self._waiting.keys() & set(names):
                for waiter in self._release(name):
                    tell(waiter, waiter.adapter_loaded, table)

    def replaced(self, table: Table) -> None:
        """Everything may be different: all try again."""
        self.changed(list(self._waiting), table)

    def refused(self, name: str, reason: str, exists: bool) -> None:
        """Control says that waiting is of no use."""
        for waiter in self._release(name):
            error: GatewayError  # one each: a waiter may add to its own
            if exists:
                error = _unavailable(f"The model `{name}` cannot be loaded: {reason}")
            else:
                error = ModelNotFound(f"The model `{name}` does not exist: {reason}.", param="model")
            tell(waiter, waiter.adapter_not_loaded, error)

    def tick(self) -> None:
        """A second has passed."""
        self._wanted.clear()
        now_s = time.monotonic()
        for name, waiters in list(self._waiting.items()):
            late = [waiter for waiter, until_s in waiters.items() if until_s <= now_s]
            for waiter in late:
                self.leave(name, waiter)
                late_by = f"The model `{name}` was not loaded within {self._limit_s:g} s: others are in use"
                tell(waiter, waiter.adapter_not_loaded, _unavailable(late_by))
            if name in self._waiting:
                self._ask(name)

    def _release(self, name: str) -> list[Waiter]:
        waiters = list(self._waiting.pop(name, ()))
        for waiter in waiters:
            self._gone(waiter)
        return waiters

    def _gone(self, waiter: Waiter) -> None:
        self.count -= 1
        self._bytes -= waiter.parked_bytes
        self._by_key[waiter.parked_key] -= 1
        if not self._by_key[waiter.parked_key]:
            del self._by_key[waiter.parked_key]


def _unavailable(what: str) -> Unavailable:
    error = Unavailable(f"{what}. Try again in {_RETRY_AFTER_S} s.", code="adapter_not_loaded")
    error.retry_after_s = _RETRY_AFTER_S
    return error
