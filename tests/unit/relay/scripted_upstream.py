"""An HTTP server that does what a script says, byte by byte: a list of steps for each request it gets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.connections import Connections


@dataclass
class Seen:
    """A request as it arrived, and what became of its connection."""

    head: str
    body: bytes
    connection: int  # counts connections, to see which were reused
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # the peer closed its side

    @property
    def line(self) -> str:
        return self.head.split("\r\n", 1)[0]

    @property
    def headers(self) -> dict[str, str]:
        pairs = (line.split(": ", 1) for line in self.head.split("\r\n")[1:] if line)
        return {name.lower(): value for name, value in pairs}

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Close:
    """Close the connection, or with `reset` break it."""

    reset: bool = False


class Hang:
    """Do nothing until the peer goes away."""


Step = bytes | Close | Hang | asyncio.Event  # an event: wait until it is set
Script = Sequence[Step]


class ScriptedUpstream:
    """`scripts` are used in turn, the last one again and again."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.seen: list[Seen] = []
        self.connections = 0
        self.port = 0  # none yet, or a Unix socket
        self._open: Connections | None = None
        self.arrived = asyncio.Condition()

    async def start(self, path: str | None = None, port: int = 0) -> None:
        """On a port chosen by the system (or given), or at a Unix socket's path."""
        if path is not None:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen()
        else:
            listener = socket.create_server(("127.0.0.1", port))
            self.port = listener.getsockname()[1]
        self._open = Connections(listener, self._accept)

    async def close(self) -> None:
        """Stop listening and break every connection."""
        if self._open is not None:
            self._open.abort()
            await self._open.closed()

    async def request(self, number: int = 0) -> Seen:
        """The request of that number, once it has come."""
        async with asyncio.timeout(20), self.arrived:
            await self.arrived.wait_for(lambda: len(self.seen) > number)
        return self.seen[number]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        while await self._serve(reader, writer, number):
            pass

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        seen = Seen(head, b"", number)
        if "content-length" in seen.headers:
            seen.body = await reader.readexactly(int(seen.headers["content-length"]))
        elif "transfer-encoding" in seen.headers:
            seen.body = await _read_chunks(reader)
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        async with self.arrived:
            self.seen.append(seen)
            self.arrived.notify_all()
        for step in script:
            if isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
            elif isinstance(step, asyncio.Event):
                if not await _unless_gone(step.wait, reader, seen):
                    return False
            elif isinstance(step, Hang):
                await reader.read()
                seen.gone.set()
                return False
            else:
                if step.reset:
                    writer.transport.abort()
                return False
        return True


async def _unless_gone(wait: Callable[[], Awaitable[Any]], reader: asyncio.StreamReader, seen: Seen) -> bool:
    waiting = asyncio.ensure_future(wait())
    reading = asyncio.ensure_future(reader.read(1))
    await asyncio.wait({waiting, reading}, return_when=asyncio.FIRST_COMPLETED)
    if reading.done():
        waiting.cancel()
        seen.gone.set()
        return False
    reading.cancel()
    await asyncio.wait({reading})  # one at a time may read
    return True


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while True:
        size = int(await reader.readline(), 16)
        body += await reader.readexactly(size)
        await reader.readexactly(2)
        if size == 0:
            return body


def answer(body: bytes, status: str = "200 OK", content_type: str = "application/json", extra: str = "") -> bytes:
    """A whole response."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\n{extra}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """A piece of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**members: Any) -> bytes:
    """One event as engines write it."""
    return b"data: " + json.dumps(members, separators=(",", ":")).encode() + b"\n\n"


def token(text: str, model: str = "demo") -> bytes:
    """A chunk of chat."""
    return event(
        id="chatcmpl-1",
        object="chat.completion.chunk",
        created=1,
        model=model,
        choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    )


def usage(prompt: int, completion: int, model: str = "demo") -> bytes:
    """The last chunk of a stream with `include_usage`."""
    counts = {"prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion}
    return event(id="chatcmpl-1", object="chat.completion.chunk", created=1, model=model, choices=[], usage=counts)


DONE = b"data: [DONE]\n\n"


def completion(text: str = "hello", model: str = "demo", prompt: int = 3, generated: int = 2) -> bytes:
    """A whole chat completion."""
    counts = {"prompt_tokens": prompt, "total_tokens": prompt + generated, "completion_tokens": generated}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": model,
            "choices": [choice],
            "usage": counts,
        },
        separators=(",", ":"),
    ).encode()
