"""The ASGI application: the engine's routes, and beside them `/emulator/...` for tests.

GET  /emulator           {"pid", "engine", "version"}
GET  /emulator/script    the script as it stands, faults counted down
POST /emulator/script    put another in its place
GET  /emulator/seen?since=N   requests after number N (see seen.py)
POST /emulator/refuse?ms=N    close the port and every connection for N milliseconds
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import msgspec

from backends.emulator import script as scripts
from backends.emulator.channel import Channel, ClientGone, Message, note_abort
from backends.emulator.engines.base import Answer, Death, Engine, Generation, Handler, Refusal, Request
from backends.emulator.playing import play
from backends.emulator.recordings import Reply, json_reply
from backends.emulator.script import Fault, Where
from backends.emulator.seen import Seen

_CONTROL = "/emulator"
_WHERE: dict[str, Where] = {
    "/v1/chat/completions": "inference",
    "/v1/completions": "inference",
    "/v1/responses": "inference",
    "/invocations": "inference",
    "/v1/embeddings": "embeddings",
    "/v1/load_lora_adapter": "load",
    "/load_lora_adapter": "load",
    "/v1/unload_lora_adapter": "unload",
    "/unload_lora_adapter": "unload",
    "/v1/models": "models",
    "/health": "health",
    "/metrics": "metrics",
    "/tokenize": "tokenize",
    "/v1/encode": "tokenize",
}


class App:
    """One emulated engine as an ASGI application. `refuse`: closes the port for so many seconds."""

    def __init__(self, engine: Engine, refuse: Callable[[float], Awaitable[None]]) -> None:
        self.engine = engine
        self.seen = Seen()
        self._refuse = refuse
        self._routes = engine.all_routes()
        self._paths = {path for _, path in self._routes}
        self._background: set[asyncio.Future[None]] = set()

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        control = scope["path"].startswith(_CONTROL)
        sight = Seen().add(scope) if control else self.seen.add(scope)
        channel = Channel(scope, receive, send, sight)
        task = asyncio.current_task()
        assert task is not None
        watcher: asyncio.Task[None] | None = None
        try:
            sight.body = await channel.body()
            if control:
                await channel.reply(self._control(scope, sight.body))
                return
            watcher = asyncio.create_task(channel.watch(task))
            await self._answer(scope, channel)
        except ClientGone:
            note_abort(sight)
        except asyncio.CancelledError:
            if not channel.gone:
                raise
            note_abort(sight)
        else:
            sight.finished_at_s = time.time()
        finally:
            if watcher is not None:
                watcher.cancel()

    async def _answer(self, scope: Message, channel: Channel) -> None:
        sight = channel.sight
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request = Request(sight.method, sight.path, headers, sight.body)
        where = _WHERE.get(sight.path)
        fault = None
        if where is not None and self.engine.script.faults:
            fault = scripts.hit(self.engine.script, where, _model(request.body))
        if fault is not None:
            sight.fault = fault.kind
            request.lied_to, request.ignored = fault.kind == "lie", fault.kind == "ignore"
            if await self._break(fault, channel):
                return
        answer = await self._routed(request)
        if isinstance(answer, Generation):
            await play(self.engine, answer, channel, fault)
        elif isinstance(answer, Death):
            await asyncio.sleep(answer.after_s)
            channel.die()
        else:
            await channel.reply(answer)

    async def _routed(self, request: Request) -> Answer:
        engine = self.engine
        if keyless := engine.without_key(request):
            return keyless
        handler = self._handler(request)
        if handler is None:
            return self._no_route(request)
        try:
            return await handler(request)
        except Refusal as refusal:
            return refusal.reply

    def _handler(self, request: Request) -> Handler | None:
        found = self._routes.get((request.method, request.path))
        if found is not None:
            return found
        parent = request.path.rpartition("/")[0]
        return self._routes.get((request.method, f"{parent}/{{name}}"))

    def _no_route(self, request: Request) -> Reply:
        if request.path not in self._paths:
            return self.engine.book.reply("models/absent_route")
        allowed = ", ".join(method for method, path in self._routes if path == request.path)
        reply = self.engine.book.reply("models/wrong_method")
        headers = tuple((name, allowed.encode() if name == b"allow" else value) for name, value in reply.headers)
        return Reply(reply.status, reply.body, headers)

    async def _break(self, fault: Fault, channel: Channel) -> bool:
        """A fault before the head. True: it has taken the answer's place."""
        match fault.kind:
            case "status":
                await channel.reply(self.engine.fault_reply(fault.status))
            case "delay":
                await asyncio.sleep(fault.delay_ms / 1000)
                return False
            case "hang":
                await channel.hang()
            case "reset":
                await channel.reset()
            case "close":
                await channel.close()
            case "garbage":
                await channel.garbage()
            case "die":
                channel.die()
            case _:  # within the stream, or a lie: later
                return False
        return True

    # ---- for tests

    def _control(self, scope: Message, body: bytes) -> Reply:
        query = {key: values[-1] for key, values in parse_qs(scope["query_string"].decode()).items()}
        match scope["method"], scope["path"].removeprefix(_CONTROL):
            case "GET", "":
                book = self.engine.book
                return json_reply(200, {"pid": os.getpid(), "engine": book.engine, "version": book.version})
            case "GET", "/script":
                return json_reply(200, msgspec.to_builtins(self.engine.script))
            case "POST", "/script":
                return self._put_script(body)
            case "GET", "/seen":
                return json_reply(200, self.seen.since(int(query.get("since", 0))))
            case "POST", "/refuse":
                closing = asyncio.ensure_future(self._refuse(float(query["ms"]) / 1000))
                self._background.add(closing)
                closing.add_done_callback(self._background.discard)
                return json_reply(200, {})
        return json_reply(404, {"error": "no such control"})

    def _put_script(self, body: bytes) -> Reply:
        try:
            self.engine.script = scripts.decode(body)
        except scripts.ScriptError as error:
            return json_reply(400, {"error": str(error)})
        return json_reply(200, {})


def _model(body: bytes) -> str | None:
    """The model or adapter that a request is about."""
    try:
        named = msgspec.json.decode(body, type=_Named)
    except msgspec.DecodeError:
        return None
    return named.lora_name or named.model


class _Named(msgspec.Struct):
    model: str | None = None
    lora_name: str | None = None


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
