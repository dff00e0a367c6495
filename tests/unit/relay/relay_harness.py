"""A relay in the test's own process, on real sockets; time is the test's: `relay.seconds(n)` lets n ticks pass."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripted_upstream import ScriptedUpstream

from gateway.observe.cells import IN_FLIGHT_ROW, MAX_REPLICAS, Cells, Peers
from gateway.observe.exposition import sum_relays
from gateway.observe.log import Access
from gateway.observe.usage import Usage
from gateway.relay.account import Meter
from gateway.relay.app import App
from gateway.relay.server import Server
from gateway.relay.traffic import Limits
from gateway.snapshot import Key, Model, Replica, Snapshot

CHAT = "/v1/chat/completions"
_PATIENCE_S = 20  # for what comes at once, on a machine that has no time


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return dict(error)

    @property
    def events(self) -> list[Any]:
        """The events of a stream, decoded; `[DONE]` as it is."""
        data = [part.removeprefix(b"data: ") for part in self.body.replace(b": ka\n", b"").split(b"\n\n")[:-1]]
        return [part.decode() if part == b"[DONE]" else json.loads(part) for part in data]


class Client:
    """One connection to the relay, read and written by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> None:
        """A request; names of headers with `_` for `-`."""
        lines = [f"{method} {path} HTTP/1.1", "host: relay"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body is not None:
            lines.append(f"content-length: {len(body)}")
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))

    def chat(self, path: str = CHAT, headers: dict[str, str] | None = None, **members: Any) -> None:
        members = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]} | members
        self.send("POST", path, json.dumps(members).encode(), **(headers or {}))

    async def head(self) -> tuple[int, dict[str, str]]:
        text = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), _PATIENCE_S)).decode()
        line, *rest = text.strip().split("\r\n")
        return int(line.split()[1]), {name.lower(): value for name, value in (pair.split(": ", 1) for pair in rest)}

    async def piece(self) -> bytes:
        """The next chunk of a chunked body; b"" for the last one."""
        size = int(await asyncio.wait_for(self.reader.readline(), _PATIENCE_S), 16)
        data = await asyncio.wait_for(self.reader.readexactly(size), _PATIENCE_S)
        await self.reader.readexactly(2)
        return data

    async def answer(self, no_body: bool = False) -> Answer:
        status, headers = await self.head()
        body = b""
        if no_body:
            pass
        elif "content-length" in headers:
            body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), _PATIENCE_S)
        elif "transfer-encoding" in headers:
            while data := await self.piece():
                body += data
        else:
            body = await asyncio.wait_for(self.reader.read(), _PATIENCE_S)
        return Answer(status, headers, body)

    async def closed(self) -> bool:
        """The relay closes the connection, having sent nothing more."""
        try:
            return await asyncio.wait_for(self.reader.read(), _PATIENCE_S) == b""
        except ConnectionError:
            return True

    def go(self) -> None:
        """Leave."""
        self.writer.transport.abort()


class Relay:
    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self.folder = folder
        self.limits = limits or Limits(max_body_bytes=100_000, request_timeout_s=30)
        self.entries: list[Access] = []
        self.notes: list[str] = []
        self.version = 0
        self.clients: list[Client] = []
        self.upstreams: list[ScriptedUpstream] = []

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.cells = Cells(self.folder / "relay-0.cells")
        self.meter = Meter(self.cells, Peers({}), 0, self.entries.append)
        self.usage = Usage(self.folder / "relay-0.usage")
        self.app = App(loop, self.meter, self.usage, self.limits, self.folder, self.notes.append)
        self.server = Server(self.app.handle, loop)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        await self.server.start(listener)

    async def close(self) -> None:
        for client in self.clients:
            client.go()
        await self.server.drain(0)
        for upstream in self.upstreams:
            await upstream.close()
        self.cells.close()

    def serve(
        self,
        *replicas: Replica,
        models: dict[str, Model] | None = None,
        keys: dict[str, Key] | None = None,
        task: str = "generate",
    ) -> None:
        """Apply a snapshot: by default base `demo`, on every replica."""
        self.version += 1
        names = {replica.id: "demo" for replica in replicas}
        models = models or {"demo": Model("demo", None, None, names, "")}
        self.app.apply(Snapshot(self.version, replicas, models, keys or {}, task))

    async def engine(self, *scripts: Any, serve: bool = True, backend: str = "vllm") -> ScriptedUpstream:
        """A scripted engine, the only replica unless `serve` is off."""
        upstream = ScriptedUpstream(*scripts)
        await upstream.start()
        self.upstreams.append(upstream)
        if serve:
            self.serve(replica(upstream, backend=backend))
        return upstream

    async def control(self, *scripts: Any) -> ScriptedUpstream:
        upstream = ScriptedUpstream(*scripts)
        await upstream.start(path=str(self.folder / "control.sock"))
        self.upstreams.append(upstream)
        return upstream

    async def client(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self.clients.append(client)
        return client

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Client]:
        client = await self.client()
        yield client
        client.go()

    async def ask(self, **members: Any) -> Answer:
        """One chat request on a connection of its own."""
        async with self.connected() as client:
            client.chat(**members)
            return await client.answer()

    def seconds(self, count: int) -> None:
        """Let that many seconds pass, for the relay."""
        for _ in range(count):
            self.app.tick()
            self.server.tick()

    # What must hold

    def in_flight(self) -> int:
        return sum(self.cells.values[IN_FLIGHT_ROW : IN_FLIGHT_ROW + MAX_REPLICAS])

    async def settled(self) -> Access:
        """The one request that was made is over: counted and logged once, its slot free."""
        await until(lambda: self.entries)
        assert len(self.entries) == 1, self.entries
        assert self.in_flight() == 0
        requests = self.counted("tunegate_requests")
        assert sum(requests.values()) == 1, requests
        return self.entries[0]

    def counted(self, metric: str) -> dict[tuple[str, ...], int]:
        """labels -> the first cell of each series; without the one for requests that find no room, while it is 0."""
        found = sum_relays(self.folder).get(metric, {})
        return {
            labels: cells[0] for labels, cells in found.items() if cells[0] or labels != ("(other)", "(other)", "0")
        }


async def until(condition: Any, timeout_s: float = 20.0) -> None:
    """Let the loop run until `condition()` holds."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {timeout_s} s"
        await asyncio.sleep(0.005)


def replica(
    upstream: ScriptedUpstream | int, id: str = "r0", index: int = 0, backend: str = "vllm", accepting: bool = True
) -> Replica:
    port = upstream if isinstance(upstream, int) else upstream.port
    return Replica(id, index, backend, "127.0.0.1", port, f"key-of-{id}", accepting)
