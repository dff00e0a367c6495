"""A scripted engine for control's tests: real HTTP on the loopback, vLLM's or LMDeploy's adapter surface, faults on
demand. Its host starts it in the test's event loop, where a real one would be a process.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from backends.base import Backend, Endpoint
from backends.process import EngineStartError
from tests.support.connections import Connections


@dataclass
class Script:
    """How the engines of one host behave; tests change it while they run."""

    start_error: str | None = None  # the process cannot be started
    dies_starting: str | None = None  # it ends before it answers, with this log
    never_ready: bool = False
    unhealthy: bool = False
    forgets: bool = False  # says 200 to a load, and does not have it
    rejects: str | None = None  # refuses a load with this message
    dies_loading: bool = False
    dies_answering: bool = False  # at a request that names an adapter, as SGLang does with one of another base
    fails_answering: bool = False
    busy: bool = False  # has no time for a request
    hangs_loading: bool = False
    hangs_unloading: bool = False
    keeps_unloaded: bool = False  # says 200 to an unload, and still lists it
    starts_only_with: set[str] | None = None  # ends while starting when given other adapters


class FakeEngine:
    """One life of an engine. `calls` holds what it was asked, as "verb id"."""

    def __init__(self, script: Script, static: Mapping[str, Path], calls: list[str]) -> None:
        self.script = script
        self.adapters: dict[str, str] = {name: str(path) for name, path in static.items()}
        self.calls = calls
        self.endpoint = Endpoint("127.0.0.1", 0, "key")
        self.health_checks = 0
        self._status: int | None = None
        self._connections: Connections | None = None
        self._log = ""
        self._loop = asyncio.get_running_loop()

    async def listen(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = Endpoint("127.0.0.1", listener.getsockname()[1], "key")
        self._connections = Connections(listener, self._serve)

    def alive(self) -> bool:
        return self._status is None

    def exit_status(self) -> int | None:
        return self._status

    def log_tail(self) -> str:
        return self._log

    def stop(self, grace_s: float) -> None:
        self._loop.call_soon_threadsafe(self.die, 0)

    def die(self, status: int = -9, log: str = "") -> None:
        """End at once, as by a signal."""
        if self._status is None:
            self._status = status
            self._log = log
        if self._connections is not None:
            self._connections.abort()

    async def gone(self) -> None:
        """Return once its connections are closed."""
        if self._connections is not None:
            await self._connections.closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        length = next(
            (int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length")), 0
        )
        body = json.loads(await reader.readexactly(length)) if length else {}
        status, answer = await self._answer(method, path, body)
        text = answer if isinstance(answer, str) else json.dumps(answer)
        writer.write(f"HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()

    async def _answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        script = self.script
        if path == "/health":
            self.health_checks += 1
            return (503, "") if script.never_ready or script.unhealthy else (200, {"status": "healthy"})
        if path == "/v1/models":
            return 200, {"data": [_card("base", None), *(_card(name, "base") for name in self.adapters)]}
        name = body.get("lora_name") or body.get("model", "").removeprefix("base:")  # SGLang says base:adapter
        if path.endswith("/load_lora_adapter"):
            self.calls.append(f"load {name}")
            return await self._load(name, body["lora_path"])
        if path.endswith("/unload_lora_adapter"):
            self.calls.append(f"unload {name}")
            if script.hangs_unloading:
                await asyncio.Event().wait()
            if not script.keeps_unloaded:
                self.adapters.pop(name, None)
            return 200, "Success"
        self.calls.append(f"ask {name}")
        return self._complete(name)

    async def _load(self, name: str, path: str) -> tuple[int, Any]:
        if self.script.hangs_loading:
            await asyncio.Event().wait()
        if self.script.dies_loading:
            self.die()
        if self.script.rejects is not None:
            return 500, {"error": {"message": self.script.rejects}}
        if not self.script.forgets:
            assert (Path(path) / "adapter_config.json").is_file()
            self.adapters[name] = path
        return 200, "Success"

    def _complete(self, name: str) -> tuple[int, Any]:
        if self.script.dies_answering and name != "base":
            self.die()
        if self.script.busy:
            return 503, {"error": {"message": "queue is full"}}
        if self.script.fails_answering:
            return 500, {"error": {"message": "size mismatch"}}
        if name != "base" and name not in self.adapters:
            return 404, {"error": {"message": "no such model"}}
        return 200, {"model": name, "choices": [{"text": "x"}]}


def _card(name: str, parent: str | None) -> dict[str, Any]:
    return {"id": name, "parent": parent, "owned_by": "vllm", "max_model_len": 2048 if parent is None else None}


class FakeHost:
    """Gives a supervisor its engines, one after the other."""

    def __init__(
        self, backend: Backend, script: Script | None = None, loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        """loop: where its engines run; the running one."""
        self.backend = backend
        self.script = script or Script()
        self.engines: list[FakeEngine] = []
        self.started_with: list[frozenset[str]] = []
        self.calls: list[str] = []
        self.adoptable: FakeEngine | None = None
        self.closed = False
        self._loop = loop or asyncio.get_running_loop()

    @property
    def engine(self) -> FakeEngine:
        """The newest engine."""
        return self.engines[-1]

    def adopt(self) -> FakeEngine | None:
        return self.adoptable

    def start(self, adapters: Mapping[str, Path]) -> FakeEngine:
        return asyncio.run_coroutine_threadsafe(self.launch(adapters), self._loop).result()

    async def launch(self, adapters: Mapping[str, Path]) -> FakeEngine:
        self.started_with.append(frozenset(adapters))
        if self.closed:
            raise EngineStartError("closed")
        if self.script.start_error is not None:
            raise EngineStartError(self.script.start_error)
        engine = FakeEngine(self.script, adapters, self.calls)
        self.engines.append(engine)
        await engine.listen()
        if self.script.dies_starting is not None:
            engine.die(1, self.script.dies_starting)
        elif self.script.starts_only_with is not None and set(adapters) - self.script.starts_only_with:
            engine.die(1, "ValueError: shape mismatch")
        return engine

    async def ready(self, client: httpx2.AsyncClient) -> Backend | None:
        return self.backend if await self.backend.is_ready(client) else None

    def cause(self, log_tail: str) -> str | None:
        return "the model is too big" if "out of memory" in log_tail else None

    def close(self, grace_s: float) -> None:
        self.closed = True
        for engine in self.engines:
            engine.stop(grace_s)
