"""What control and relays tell each other over a Unix stream socket, one JSON line each.

Control sends the whole picture of who serves what when a relay connects, and from then on what changed; a relay answers
each with `Applied`, and asks with `Wanted` for an adapter that is registered and loaded nowhere. A relay keeps its last
picture while control is away.
"""

from __future__ import annotations

import msgspec


class Replica(msgspec.Struct, frozen=True):
    """One engine process (or attached URL) that can be sent requests."""

    id: str  # "r0"
    index: int  # its row in the relays' in-flight cells; stable while the gateway lives
    backend: str  # vllm | sglang | lmdeploy
    host: str
    port: int
    api_key: str  # the engine's own key, "" for none; never the client's
    accepting: bool  # ready and not draining


class Model(msgspec.Struct, frozen=True):
    """A public name and where it can be answered."""

    id: str
    parent: str | None  # the base model's public name, for adapters
    adapter: str | None  # content-addressed id "a-<sha12>", None for the base
    engine_models: dict[str, str]  # replica id -> the `model` value that replica expects; only ready replicas
    unready_reason: str  # why `engine_models` is empty, in words for the client; "" otherwise
    # replica id -> first of its cells there (observe.cells): requests in flight, requests ever
    rows: dict[str, int] = msgspec.field(default_factory=dict)
    on_demand: bool = False  # where it is loaded nowhere, it is loaded when a request asks for it
    canary: Canary | None = None  # another version that gets some of its requests


class Canary(msgspec.Struct, frozen=True):
    """A version that is tried on a share of a name's requests. Whole, so that no name depends on another."""

    model: Model  # its id is the label of what it gets
    stay: str  # the label of what it does not get
    share: float  # 0 to 1


class Key(msgspec.Struct, frozen=True):
    """What an API key opens, and how much of it. None: no limit."""

    id: str  # shown in logs and lists; says nothing about the key
    scopes: frozenset[str]  # of gateway.scopes.SCOPES
    row: int | None = None  # its cells in the relays' usage files; None: neither limited nor counted
    expires_at: int | None = None  # seconds since the epoch; it is refused from then on
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_until: int | None = None  # its token count over all relays at which its budget is spent
    max_in_flight: int | None = None  # over all relays
    priority: int = 0  # higher goes first where requests wait


class Limits(msgspec.Struct, frozen=True):
    """What the operator may change while relays run."""

    max_body_bytes: int
    request_timeout_s: int


class Snapshot(msgspec.Struct, frozen=True, tag="whole"):
    """The whole picture. `models` also holds every alias and pinned name that can be called."""

    version: int  # grows by one with each change, over restarts of control too
    replicas: tuple[Replica, ...]
    models: dict[str, Model]
    keys: dict[str, Key]  # SHA-256 hex of an API key -> what it opens; empty: open access
    task: str = "generate"  # what the engines were started for: generate | embed
    limits: Limits | None = None  # None: those that the relay was started with
    reloads: int = 0  # grows when relays are to read their certificate again


class Delta(msgspec.Struct, frozen=True, tag="change"):
    """What is different from the picture before; it costs what changed, whatever is registered."""

    version: int
    changed: dict[str, Model]  # by the names they are called by
    removed: tuple[str, ...]
    rest: Snapshot | None = None  # everything but the models, which it leaves empty; None: as before


class NotLoaded(msgspec.Struct, frozen=True, tag="not-loaded"):
    """Control's answer to `Wanted` where waiting is of no use."""

    name: str
    reason: str
    exists: bool = True


class Applied(msgspec.Struct, frozen=True, tag="applied"):
    """A relay's answer: this relay routes by this version from now on."""

    relay: int
    version: int


class Wanted(msgspec.Struct, frozen=True, tag="wanted"):
    """A relay has requests that wait for a name to be loaded. Said again every second while that holds."""

    relay: int
    name: str


ToRelay = Snapshot | Delta | NotLoaded
FromRelay = Applied | Wanted
