"""The engines' side: pooled HTTP/1.1 connections on asyncio and httptools, over TCP or a Unix socket.

Origin.take    an idle connection, or None
Origin.connect a new one, later: Sink.upstream_connected or Sink.upstream_unreachable
Connection.send(sink, ...)  then, in this order and never after `leave` or `abort`:
    upstream_head, upstream_data*, upstream_end        or, at any point, upstream_lost
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import httptools

_CONNECT_TIMEOUT_S = 5
_IDLE_LIMIT_S = 4  # engines close idle connections after 5 s: be first
_LEAVE_LIMIT_S = 4  # how long an answer nobody waits for may take to end before its connection is closed

Address = tuple[str, int] | str  # host and port, or the path of a Unix socket


class Sink(Protocol):
    """Who waits for an upstream answer."""

    def upstream_connected(self, connection: Connection) -> None:
        """The connection asked for."""

    def upstream_unreachable(self, reason: str) -> None:
        """There is no connection; nothing was sent."""

    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        """The answer's status and headers (names in lower case)."""

    def upstream_data(self, data: bytes) -> None:
        """The next piece of the answer's body."""

    def upstream_end(self) -> None:
        """The answer is complete."""

    def upstream_lost(self, reason: str) -> None:
        """The connection broke, or what came is not HTTP."""

    def upstream_paused(self) -> None:
        """Upstream reads slower than we write."""

    def upstream_resumed(self) -> None:
        """Upstream caught up."""


class Connection(asyncio.Protocol):
    """One upstream connection; one request at a time."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._transport: Any = None
        self._sink: Sink | None = None
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self._no_body = False  # the request was a HEAD
        self._head_done = False
        self._head_due = False  # done, and not yet handed on
        self._complete = False
        self._keep_alive = False
        self._at_chunk = False  # of a chunked body: the parser stands between two chunks
        self.on_body = self._pieces.append  # looked up by the parser, called for each piece
        self._parser: Any = httptools.HttpResponseParser(self)
        self.reused = False
        self.received = False  # any byte of the answer to the current request
        self.idle_s = 0

    # Transport

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._origin.forget(self)
        self._parser = None
        sink, self._sink = self._sink, None
        if sink is None:
            return
        framed = b"content-length" in self._headers or b"transfer-encoding" in self._headers
        if self._head_done and not framed and error is None:
            sink.upstream_end()  # such an answer ends where its connection does
        else:
            sink.upstream_lost(str(error) if error else "it closed the connection")

    def data_received(self, data: bytes) -> None:
        self.received = True
        if self._sink is None and self not in self._origin.left:
            self._transport.abort()  # nothing was asked
            return
        if self._at_chunk and self._sink is not None:
            # Most reads of a stream are one chunk with one event. The parser takes twice as long for it; it is not
            # shown such a chunk, and stands before the next as before this one.
            size, _, chunk = data.partition(b"\r\n")
            if chunk[-4:] == b"\n\n\r\n" and b"%x" % (len(chunk) - 2) == size:
                self._sink.upstream_data(chunk[:-2])
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a defect of ours: the loop reports it and closes the connection
        except httptools.HttpParserError as error:
            sink, self._sink = self._sink, None
            self._transport.abort()
            if sink is not None:
                sink.upstream_lost(f"it answered what is not HTTP: {error}")
            return
        if self._head_due:
            self._head_due = False
            if self._sink is not None:
                self._sink.upstream_head(self._parser.get_status_code(), self._headers)
        pieces = self._pieces
        # Such a line end behind such a piece is a chunk's: of the body, it would be the piece's own end, and a chunk's
        # size does not begin with a line end.
        self._at_chunk = bool(pieces) and data.endswith(b"\n\n\r\n") and pieces[-1].endswith(b"\n\n")
        if pieces:
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            if self._sink is not None:
                self._sink.upstream_data(data)
        if self._complete:
            self._finish()

    def pause_writing(self) -> None:
        if self._sink is not None:
            self._sink.upstream_paused()

    def resume_writing(self) -> None:
        if self._sink is not None:
            self._sink.upstream_resumed()

    # Parser

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._parser.get_status_code() < 200:
            self._headers = {}  # an interim answer, `100 Continue`
            return
        self._head_done = self._head_due = True
        if self._no_body:
            self._complete = True

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive() and not self._no_body

    # What sinks call

    def send(self, sink: Sink, parts: Sequence[bytes | memoryview], no_body: bool = False) -> None:
        """Write a request's head and as much of its body as there is. no_body: the answer will have none (HEAD)."""
        self._sink = sink
        self._headers = {}
        self._no_body = no_body
        self._head_done = self._complete = self._keep_alive = self.received = self._at_chunk = False
        if len(parts) == 1:
            self._transport.write(parts[0])
        else:
            self._transport.writelines(parts)

    def write(self, data: bytes) -> None:
        """More of the request's body."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def pause(self) -> None:
        """Read no more until `resume`."""
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def leave(self) -> None:
        """The sink has all it needs; the connection is kept if the answer ends soon."""
        self._sink = None
        self.idle_s = 0
        self._origin.left.add(self)

    def abort(self) -> None:
        """Close at once, so that the engine stops working on the request."""
        self._sink = None
        self._transport.abort()

    @property
    def is_open(self) -> bool:
        """False once either side closed it."""
        return not self._transport.is_closing()

    def _finish(self) -> None:
        sink, self._sink = self._sink, None
        self._complete = False
        self._origin.left.discard(self)
        if self._keep_alive and self.is_open:
            self.reused, self.idle_s = True, 0
            self._origin.idle[self] = None
        else:
            self._transport.close()
        if sink is not None:
            sink.upstream_end()


class Origin:
    """One upstream address and the connections kept to it."""

    def __init__(self, address: Address, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self._loop = loop
        self.idle: dict[Connection, None] = {}  # in the order of their last use
        self.left: set[Connection] = set()

    def __repr__(self) -> str:
        return f"<Origin {self.address}: {len(self.idle)} idle, {len(self.left)} ending>"

    def take(self) -> Connection | None:
        """An open idle connection, the one used last."""
        while self.idle:
            connection, _ = self.idle.popitem()
            if connection.is_open:
                return connection
        return None

    def connect(self, sink: Sink) -> asyncio.Task[None]:
        """Open a connection for `sink`; cancel the task when it is no longer wanted."""
        return self._loop.create_task(self._connect(sink))

    def tick(self) -> None:
        """A second has passed: close what has been idle too long."""
        for connection in [*self.idle, *self.left]:
            connection.idle_s += 1
            if connection.idle_s >= (_LEAVE_LIMIT_S if connection in self.left else _IDLE_LIMIT_S):
                connection.abort()

    def close(self) -> None:
        """The address is no longer used; requests in flight go on."""
        for connection in [*self.idle, *self.left]:
            connection.abort()

    def forget(self, connection: Connection) -> None:
        """It is closed."""
        self.left.discard(connection)
        self.idle.pop(connection, None)

    async def _connect(self, sink: Sink) -> None:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                if isinstance(self.address, str):
                    _, connection = await self._loop.create_unix_connection(lambda: Connection(self), self.address)
                else:
                    _, connection = await self._loop.create_connection(lambda: Connection(self), *self.address)
        except TimeoutError:
            sink.upstream_unreachable(f"no connection within {_CONNECT_TIMEOUT_S} s")
        except OSError as error:
            sink.upstream_unreachable(error.strerror or str(error))
        else:
            if connection.is_open:
                sink.upstream_connected(connection)
            else:
                sink.upstream_unreachable("it closed the connection at once")
