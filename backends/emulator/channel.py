"""One request's connection: reading it, answering on it, and breaking it in every way that a network can."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Any

from backends.emulator.recordings import Reply
from backends.emulator.seen import Sight

TRANSPORT = "emulator.transport"  # where the scope holds it
Message = dict[str, Any]
_GARBAGE = b"\x00\x01\xff\xfe not HTTP at all \r\n\r\n"
_EXIT_CODE = 1


class ClientGone(Exception):
    """The client closed the connection before it had the whole request in."""


class Channel:
    """The connection, as long as one request lasts. What is sent is noted in `sight`."""

    def __init__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
        sight: Sight,
    ) -> None:
        self._receive, self._send = receive, send
        self._transport: asyncio.Transport = scope[TRANSPORT]
        self.sight = sight
        self.gone = False

    async def body(self) -> bytes:
        """The whole request body. Raises ClientGone."""
        parts = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message["body"])
            if not message["more_body"]:
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def watch(self, request: asyncio.Task[None]) -> None:
        """Cancel `request` as soon as the client goes away."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        request.cancel()

    # ---- answering

    async def reply(self, reply: Reply) -> None:
        """A whole answer."""
        await self.begin(reply.status, reply.headers)
        await self._send({"type": "http.response.body", "body": reply.body})

    async def begin(self, status: int, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        """The head."""
        self.sight.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def events(self, data: bytes, count: int) -> None:
        """Some of the body: `count` stream events."""
        self.sight.chunks += count
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def raw_events(self, chunks: list[bytes]) -> None:
        """Stream events that are already in HTTP's chunked framing, at once and past the server's own bookkeeping."""
        self.sight.chunks += len(chunks)
        self._transport.write(b"".join(chunks))
        await self._send({"type": "http.response.body", "body": b"", "more_body": True})  # waits for a slow reader
        await asyncio.sleep(0)

    async def end(self, data: bytes = b"") -> None:
        """The last of the body."""
        await self._send({"type": "http.response.body", "body": data})

    # ---- breaking

    async def hang(self) -> None:
        """Nothing more, until the client gives up (which cancels this)."""
        await asyncio.Event().wait()

    async def reset(self) -> None:
        """A TCP reset."""
        raw: socket.socket = self._transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()
        await self.hang()

    async def close(self) -> None:
        """The connection ends where it is."""
        self._transport.close()
        await self.hang()

    async def garbage(self) -> None:
        """Bytes that no client can read, and the end."""
        self._transport.write(_GARBAGE)
        await self.close()

    def die(self) -> None:
        """The process is gone at once, with every connection."""
        os._exit(_EXIT_CODE)


def note_abort(sight: Sight) -> None:
    """The client went away before the end."""
    sight.aborted_at_s = time.time()
