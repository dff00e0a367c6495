"""What control tells the relays: one immutable picture of who serves what.

Control sends it whole on every change over a Unix stream socket, one JSON line each; a relay answers each with
an `Applied` line. A relay keeps its last snapshot while control is away.
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


class Snapshot(msgspec.Struct, frozen=True):
    """The whole picture. `models` also holds every alias and pinned name that can be called."""

    version: int  # grows by one with each change, over restarts of control too
    replicas: tuple[Replica, ...]
    models: dict[str, Model]
    key_digests: dict[str, str]  # SHA-256 hex of an API key -> key id shown in logs; empty: open access
    task: str = "generate"  # what the engines were started for: generate | embed


class Applied(msgspec.Struct, frozen=True):
    """A relay's answer: this relay routes by this version from now on."""

    relay: int
    version: int
