"""Run an emulator under uvicorn, with the connection's transport in reach of the application."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from backends.emulator import failures
from backends.emulator.adapters import AdapterFault
from backends.emulator.app import App
from backends.emulator.channel import TRANSPORT
from backends.emulator.engines import ENGINES
from backends.emulator.recordings import Book
from backends.emulator.script import from_environment
from backends.emulator.settings import parse

_STOP_S = 1  # for open streams when it is told to stop


class _Protocol(HttpToolsProtocol):
    """uvicorn's own, telling the application its transport."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]  # we add a key to ASGI's
        scope[TRANSPORT] = self.transport


class _Gate:
    """The listening port, which a test can have closed for a while."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.server: uvicorn.Server | None = None

    async def refuse(self, duration_s: float) -> None:
        server = self.server
        assert server is not None
        await asyncio.sleep(0.02)  # the answer to who asked for it goes out first
        for listener in server.servers:
            listener.close()
        for connection in list(server.server_state.connections):
            transport: Any = connection.transport
            transport.abort()
        await asyncio.sleep(duration_s)
        protocol = functools.partial(
            _Protocol, config=server.config, server_state=server.server_state, app_state=server.lifespan.state
        )
        server.servers = [await asyncio.get_running_loop().create_server(protocol, self.host, self.port)]


def serve(name: str, argv: Sequence[str]) -> None:
    """Be the engine `name`, started with its own command line `argv`; returns when told to stop."""
    book = Book.load(name)
    script = from_environment()
    settings = parse(name, book, argv)
    if script.start_failure is not None:
        failures.fail(book, script.start_failure)
    if settings.model_path.startswith("/") and not failures.is_directory(settings.model_path):
        failures.fail(book, "no_model", {"/no/such/model": settings.model_path})
    failures.check_adapter_flags(name, settings, argv)
    time.sleep(script.startup_s)
    engine = ENGINES[name](settings, book, script)
    for adapter, path in settings.static_adapters.items():
        try:
            engine.load_static(adapter, path)
        except AdapterFault as fault:
            failures.fail_on_adapter(book, adapter, path, fault.kind)
    if failures.port_is_taken(settings.host, settings.port):
        failures.fail(book, "port_taken", {"{port}": settings.port})
    gate = _Gate(settings.host, settings.port)
    config = uvicorn.Config(
        App(engine, gate.refuse),
        host=settings.host,
        port=settings.port,
        http=_Protocol,
        ws="none",
        loop="uvloop",
        access_log=False,
        timeout_graceful_shutdown=_STOP_S,
    )
    gate.server = uvicorn.Server(config)
    gate.server.run()
