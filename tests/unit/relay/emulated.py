"""Emulated engines in the test's own process: the emulator's application on a socket of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from backends.emulator.app import App
from backends.emulator.engines import ENGINES
from backends.emulator.recordings import Book
from backends.emulator.script import Fault, Script
from backends.emulator.seen import Sight
from backends.emulator.server import _Protocol
from backends.emulator.settings import parse
from gateway.snapshot import Replica
from tests.support.emulator import arguments


class Emulated:
    """One engine that answers for `demo`."""

    def __init__(self, kind: str, id: str = "r0", index: int = 0) -> None:
        self.kind, self.id, self.index = kind, id, index
        book = Book.load(kind)
        argv = arguments(kind, 0, "some/model", "demo", f"key-of-{id}")[{"vllm": 1, "sglang": 0, "lmdeploy": 2}[kind] :]
        self.engine = ENGINES[kind](parse(kind, book, argv), book, Script())
        self.app = App(self.engine, self._refuse)
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        config = uvicorn.Config(self.app, http=_Protocol, ws="none", access_log=False, log_config=None)
        config.load()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Protocol(config=config, server_state=self._state, app_state={}), "127.0.0.1", 0
        )

    async def close(self) -> None:
        """Gone at once, as a killed process."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._state.connections):
            transport: Any = connection.transport
            transport.abort()
        for task in list(self._state.tasks):
            task.cancel()
        await asyncio.gather(*self._state.tasks, return_exceptions=True)

    @property
    def replica(self) -> Replica:
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return Replica(self.id, self.index, self.kind, "127.0.0.1", port, f"key-of-{self.id}", True)

    def script(self, *faults: Fault, **fields: Any) -> None:
        """Behave so from now on."""
        self.engine.script = Script(faults=list(faults), **fields)

    def fault(self, kind: Any, **fields: Any) -> None:
        """Let this go wrong each time."""
        self.script(Fault(kind, **({"times": None} | fields)))

    @property
    def sights(self) -> list[Sight]:
        return list(self.app.seen._sights)

    @property
    def working(self) -> int:
        """Requests that it works on, or that wait in it."""
        return sum(1 for sight in self.sights if sight.finished_at_s is None and sight.aborted_at_s is None)

    async def _refuse(self, duration_s: float) -> None:
        raise NotImplementedError
