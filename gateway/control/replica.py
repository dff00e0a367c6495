"""What is known of one engine replica right now: its state and that of each adapter on it. Observed, never stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import httpx2

from backends.base import Backend, Endpoint

OPERATOR = "operator"  # who drains a replica by hand


class State(StrEnum):
    """Where a replica is in its life."""

    STARTING = "starting"  # its process is being started
    LOADING = "loading"  # the process runs and does not answer yet
    READY = "ready"
    DRAINING = "draining"  # ready, and given no new request
    UNHEALTHY = "unhealthy"  # it ended or hangs; it is started again
    FAILED = "failed"  # its last starts failed; it is tried again, seldom


class AdapterState(StrEnum):
    """Where an adapter is on one replica."""

    LOADING = "loading"
    VERIFYING = "verifying"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """An adapter's state on one replica, and why."""

    state: AdapterState
    reason: str = ""


class Replica:
    """One replica. Its supervisor writes `state`, its adapter keeper writes `adapters`; everyone reads."""

    def __init__(self, id: str, index: int, on_change: Callable[[], None]) -> None:
        """index: its row in the relays' in-flight cells. on_change: called after each change."""
        self.id = id
        self.index = index
        self.reason = ""
        self.restarts = 0
        self.max_model_len: int | None = None  # tokens, as the engine says
        self.backend: Backend | None = None  # of an attached engine known once it answered
        self.endpoint: Endpoint | None = None
        self.client: httpx2.AsyncClient | None = None
        self._adapters: dict[str, AdapterStatus] = {}
        self._state = State.STARTING
        self._drains: set[str] = set()
        self._changed: set[str] = set()  # contents whose routing may be different since `take_changed`
        self._on_change = on_change
        self.passed: dict[str, str] = {}  # contents that passed the golden gate on this engine -> what was seen
        self.restart_wanted: tuple[str, bool] | None = None  # why, and whether it was planned
        self.planned = False  # it is away because of a planned restart
        self.settled = False  # whether it is known what an earlier control process left here: an engine, its adapters

    def __repr__(self) -> str:
        """`<Replica r0 vllm ready: a-0123456789ab ready, a-ba9876543210 failed>`"""
        adapters = ", ".join(f"{name} {status.state}" for name, status in sorted(self._adapters.items()))
        backend = self.backend.name if self.backend else "unknown"
        return f"<Replica {self.id} {backend} {self.state}{': ' + adapters if adapters else ''}>"

    @property
    def state(self) -> State:
        return State.DRAINING if self._state is State.READY and self._drains else self._state

    @property
    def answers(self) -> bool:
        """Whether it can answer requests, draining or not."""
        return self._state is State.READY

    @property
    def accepting(self) -> bool:
        """Whether new requests may be sent to it."""
        return self.state is State.READY

    @property
    def takes_part(self) -> bool:
        """Whether an adapter must be ready here to be ready everywhere: it answers, or will in a moment."""
        return self.answers or (self.planned and self._state in (State.LOADING, State.STARTING))

    def become(self, state: State, reason: str = "") -> None:
        """Enter a state. Leaving READY forgets the adapters: what comes back is another process."""
        if (self._state, self.reason) == (state, reason):
            return
        self._state, self.reason = state, reason
        self.planned = self.planned and state in (State.LOADING, State.STARTING)
        self._changed.update(self._adapters)
        if state is not State.READY:
            self._adapters.clear()
            self.passed.clear()
        self._on_change()

    def settle(self) -> None:
        """What was left here is known now, or there was nothing."""
        if not self.settled:
            self.settled = True
            self._on_change()

    def take_changed(self) -> set[str]:
        """The contents that changed here since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def status(self, content_id: str) -> AdapterStatus | None:
        """An adapter's status here; None: it is not here."""
        return self._adapters.get(content_id)

    @property
    def adapters(self) -> dict[str, AdapterStatus]:
        """Content id -> status on this replica; a copy."""
        return dict(self._adapters)

    def adapter_ready(self, content_id: str) -> bool:
        """Whether this replica has answered a request with these contents and still has them."""
        status = self._adapters.get(content_id)
        return status is not None and status.state is AdapterState.READY

    def set_adapter(self, content_id: str, state: AdapterState, reason: str = "") -> None:
        """Record an adapter's state."""
        status = AdapterStatus(state, reason)
        if self._adapters.get(content_id) != status:
            self._adapters[content_id] = status
            self._changed.add(content_id)
            self._on_change()

    def forget_adapter(self, content_id: str) -> None:
        """The adapter is not on this replica any more."""
        if self._adapters.pop(content_id, None):
            self._changed.add(content_id)
            self._on_change()

    def is_drained(self, by: str) -> bool:
        """Whether it is out of traffic for this purpose."""
        return by in self._drains

    def drain(self, by: str) -> None:
        """Take it out of traffic for one purpose; it returns when no purpose is left."""
        self._drains.add(by)
        self._changed.update(self._adapters)
        self._on_change()

    def resume(self, by: str) -> None:
        """End one purpose of draining."""
        self._drains.discard(by)
        self._changed.update(self._adapters)
        self._on_change()

    def connect(self, endpoint: Endpoint, client: httpx2.AsyncClient) -> None:
        """Another engine process stands for this replica from now on."""
        self.endpoint, self.client, self.restart_wanted = endpoint, client, None

    def disconnect(self) -> None:
        """No engine process stands for this replica."""
        self.client = None

    def request_restart(self, reason: str, planned: bool = False) -> None:
        """Ask its supervisor to start it again. planned: nothing is wrong with it, so without delay."""
        self.restart_wanted = self.restart_wanted or (reason, planned)
        self.planned = self.restart_wanted[1]
