"""Tells the relays who serves what: builds the snapshot, and sends it over `<run>/snapshots.sock` on every change."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from backends.spec import Task
from gateway import snapshot
from gateway.adapters.names import pinned
from gateway.control.catalog import Catalog, Version, VersionState
from gateway.control.replica import Replica
from gateway.snapshot import Applied, Model, Snapshot

_log = logging.getLogger(__name__)
_SEND_LIMIT_S = 10.0  # for a relay to take one snapshot; then its connection is dropped, and it comes back


@dataclass(frozen=True, slots=True)
class Public:
    """What the configuration says to clients."""

    base: str  # the base model's name, to clients and engines alike
    key_digests: dict[str, str]
    task: Task = "generate"


def key_digests(keys: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each API key -> the id by which logs show it."""
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    return {digest: f"key-{digest[:8]}" for digest in digests}


def build(version: int, public: Public, replicas: Sequence[Replica], catalog: Catalog) -> Snapshot:
    """The whole picture, from what is registered and what is observed."""
    models = {public.base: _base(public.base, replicas)}
    for adapter in catalog.values():
        models[adapter.name] = _model(adapter.name, public.base, adapter.shown, replicas)
        for number, own in adapter.versions.items():
            name = pinned(adapter.name, number)
            models[name] = _model(name, public.base, own, replicas)
    return Snapshot(
        version,
        tuple(_replica(replica) for replica in replicas if replica.answers),
        models,
        public.key_digests,
        public.task,
    )


def _replica(replica: Replica) -> snapshot.Replica:
    endpoint, backend = replica.endpoint, replica.backend
    assert endpoint is not None and backend is not None, "a replica that answers is connected"
    return snapshot.Replica(
        replica.id, replica.index, backend.name, endpoint.host, endpoint.port, endpoint.api_key, replica.accepting
    )


def _base(name: str, replicas: Sequence[Replica]) -> Model:
    ready = {
        replica.id: replica.backend.engine_model(name, None)
        for replica in replicas
        if replica.accepting and replica.backend is not None
    }
    states = ", ".join(f"{replica.id} is {replica.state}" for replica in replicas)
    return Model(name, None, None, ready, "" if ready else states)


def _model(name: str, base: str, version: Version, replicas: Sequence[Replica]) -> Model:
    content_id = version.content_id
    ready = {
        replica.id: replica.backend.engine_model(base, content_id)
        for replica in replicas
        if replica.accepting and replica.backend is not None and replica.adapter_ready(content_id)
    }
    return Model(name, base, content_id, ready, "" if ready else why_unready(version, replicas))


def why_unready(version: Version, replicas: Sequence[Replica]) -> str:
    """Why no replica answers with a version, in words for a client."""
    if version.state is VersionState.FAILED:
        return f"it failed: {version.reason}"
    reasons = []
    for replica in replicas:
        status = replica.adapters.get(version.content_id)
        if not replica.answers:
            reasons.append(f"{replica.id} is {replica.state}")
        elif status is None:
            reasons.append(f"it is not loaded on {replica.id}")
        else:
            reasons.append(f"it is {status.state} on {replica.id}{': ' if status.reason else ''}{status.reason}")
    return ", ".join(reasons)


class Publisher:
    """Serves the newest snapshot to every relay that connects; relays keep what they have when it is away."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self._current: Snapshot | None = None
        self._applied: dict[int, int] = {}  # connection -> the version that its relay routes by
        self._relays: dict[int, int] = {}  # connection -> relay index, once it has said so
        self._news = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        relays = ", ".join(f"{self._relays[key]}@{self._applied[key]}" for key in sorted(self._relays))
        return f"<Publisher v{self._current.version if self._current else 0}: {relays or 'no relay'}>"

    @property
    def current(self) -> Snapshot | None:
        return self._current

    async def start(self) -> None:
        """Listen; the socket is for this user alone."""
        self._path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, self._path)
        finally:
            os.umask(mask)

    async def stop(self) -> None:
        """Stop listening and let the relays go."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._path.unlink(missing_ok=True)

    async def publish(self, new: Snapshot) -> None:
        """Make `new` the current one; it is sent as soon as each relay reads."""
        async with self._news:
            self._current = new
            self._news.notify_all()

    async def wait_applied(self, version: int, timeout_s: float) -> bool:
        """Until every connected relay routes by that version or a newer one; False when the time is over."""
        try:
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait_for(lambda: all(applied >= version for applied in self._applied.values()))
                return True
        except TimeoutError:
            _log.warning("relays did not take snapshot %s within %s s: %r", version, timeout_s, self)
            return False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        key = id(task)
        self._applied[key] = 0
        sending = asyncio.create_task(self._send(writer))
        try:
            while line := await reader.readline():
                applied = msgspec.json.decode(line, type=Applied)
                async with self._news:
                    self._relays[key] = applied.relay
                    self._applied[key] = applied.version
                    self._news.notify_all()
        except (ConnectionError, ValueError) as error:
            _log.warning("a relay's connection to control broke: %s", error)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            self._connections.discard(task)
            self._relays.pop(key, None)
            self._applied.pop(key, None)
            writer.close()
            async with self._news:
                self._news.notify_all()

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        """Send each new snapshot; one that is outdated before the relay reads it is skipped."""
        sent = 0
        with contextlib.suppress(ConnectionError, TimeoutError):
            while True:
                current = await self._newer_than(sent)
                writer.write(msgspec.json.encode(current) + b"\n")
                async with asyncio.timeout(_SEND_LIMIT_S):
                    await writer.drain()
                sent = current.version
        writer.close()

    async def _newer_than(self, version: int) -> Snapshot:
        async with self._news:
            while self._current is None or self._current.version <= version:
                await self._news.wait()
            return self._current
