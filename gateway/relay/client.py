"""The client's side: HTTP/1.1 over asyncio and httptools, a handler a request, no task a request.

uvicorn with ASGI would do the same work for 15 us more CPU a request (a task, an event, three dictionaries), which
is as much as all the rest of the relay. What a general server offers and a relay has no use for is left out:
WebSockets, HTTP/2, lifespan.

    bytes ─> parser ─> Request ─> App.handle ─> Handler   is told: body*, body_end, client_gone, tick, …
                                                   └────> answers by ClientConnection.answer | start, write*, end
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import httptools

from gateway.errors import GatewayError, InvalidRequest
from gateway.relay.http import CONTINUE, JSON, NO_BODY_STATUSES, Request, header_lines, status_line

if TYPE_CHECKING:
    from gateway.relay.server import Server

IDLE_LIMIT_S = 75  # a connection without a request, or whose request makes no progress, is closed after this
_LINGER_S = 30  # how long the rest of a refused body is read, so that the client sees the refusal
_HEAD_LIMIT_BYTES = 65_536
_TAIL_LIMIT_BYTES = 65_536  # received within a body without a piece of it: trailers, or a chunk's extensions
_UNREAD_LIMIT_BYTES = 65_536  # of a body that is read for nothing, to keep the connection
_PIPELINED_LIMIT_BYTES = 1_000_000  # of their bodies
_PIPELINED_LIMIT = 16  # requests a client may send ahead of their answers


class Handler(Protocol):
    """What answers one request. All calls come from the event loop; none may block."""

    def body(self, data: bytes) -> None:
        """The next piece of the request's body."""

    def body_end(self) -> None:
        """The body is complete."""

    def client_gone(self) -> None:
        """The client closed its connection before the answer's end. Nothing may be written any more."""

    def client_paused(self) -> None:
        """The client reads slower than we write: stop reading what is to be sent to it."""

    def client_resumed(self) -> None:
        """The client caught up."""

    def tick(self) -> None:
        """A second has passed."""

    def stop(self) -> None:
        """The relay ends: answer what is there and finish."""


Handle = Callable[["ClientConnection", Request], Handler | None]  # None: answered at once


class ClientConnection(asyncio.Protocol):
    """One client connection; it answers one request at a time, in order."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: Any = None
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0  # received since the last complete message, at most
        self._tail_bytes = 0  # received since the last piece of its body, at most
        self._incoming: Request | None = None  # the message being parsed
        self._serving: Request | None = None  # the one being answered
        self._handler: Handler | None = None
        self._waiting: deque[Request] = deque()
        self._waiting_bytes = 0  # of their bodies, held since the last turn
        self._chunked = False
        self._still_s = 0  # seconds without progress while no handler watches the time
        self._closing = False  # close once the current message is read to its end

    # Transport

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.forget(self)
        handler, self._handler, self._serving = self._handler, None, None
        self._waiting.clear()
        self._parser = None
        if handler is not None:
            handler.client_gone()

    def data_received(self, data: bytes) -> None:
        if self._incoming is None:
            self._head_bytes += len(data)
        else:
            self._tail_bytes += len(data)
            if not self._closing:  # a refused body has its time to end, however it trickles
                self._still_s = 0
        while True:
            try:
                self._parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = self._stay_with_http_1_1(data[upgrade.args[0] :])
                if not data:
                    return
            except httptools.HttpParserCallbackError:
                raise  # a defect of ours, not the client's: the loop reports it and closes the connection
            except httptools.HttpParserError as error:
                self._refuse(f"Not an HTTP/1.1 request: {error}.")
                return
        if self._incoming is None and self._head_bytes > _HEAD_LIMIT_BYTES:
            self._refuse(f"The request's head is larger than {_HEAD_LIMIT_BYTES} bytes.")
            return
        if self._incoming is not None and self._tail_bytes > _TAIL_LIMIT_BYTES:
            self._transport.close()
            return
        serving = self._serving
        if serving is not None and serving.pieces and self._handler is not None:
            self._hand_on(serving, self._handler)

    def pause_writing(self) -> None:
        if self._handler is not None:
            self._handler.client_paused()

    def resume_writing(self) -> None:
        if self._handler is not None:
            self._handler.client_resumed()

    # Parser

    def on_url(self, piece: bytes) -> None:
        self._target += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._incoming is None:  # else a trailer, which means nothing to us
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        parser = self._parser
        if parser.should_upgrade():
            return  # the parser stops here; see _stay_with_http_1_1
        keep_alive = parser.should_keep_alive() and parser.get_http_version() == "1.1"
        request = Request(parser.get_method(), self._target, self._headers, keep_alive and not self._server.draining)
        self._target, self._headers, self._head_bytes = b"", {}, 0
        self._incoming = request
        self._tail_bytes = 0
        if self._serving is None and not self._waiting:  # those come first, though none is served until `_next`
            self._begin(request)
        else:
            self._waiting.append(request)
            if len(self._waiting) > _PIPELINED_LIMIT:
                self._transport.pause_reading()

    def on_body(self, piece: bytes) -> None:
        self._tail_bytes = 0
        request = self._incoming
        if request is self._serving or request in self._waiting:
            assert request is not None
            request.pieces.append(piece)
            if request is not self._serving:
                self._waiting_bytes += len(piece)
                if self._waiting_bytes > _PIPELINED_LIMIT_BYTES:
                    self._transport.pause_reading()  # until its turn comes, in `_next`

    def on_message_complete(self) -> None:
        request, self._incoming = self._incoming, None
        if request is None:
            return
        self._still_s = 0
        request.complete = True
        if request is self._serving and self._handler is not None:
            self._hand_on(request, self._handler)
        elif self._closing and request is not self._serving:
            self._transport.close()

    # What handlers call

    def want_body(self) -> None:
        """Ask for a body that the client holds back (`Expect: 100-continue`)."""
        request = self._serving
        if request is not None and request.headers.get(b"expect", b"").lower() == b"100-continue" and self._speaks_1_1:
            self._send(CONTINUE)

    def pause_body(self) -> None:
        """Read no more from the client until `resume_body`."""
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_body(self) -> None:
        """Read on."""
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """The whole answer in one write. headers: complete lines."""
        request = self._serving
        assert request is not None
        if request is self._incoming and (_is_long(request) or b"expect" in request.headers):
            request.keep_alive = False  # the rest is not worth reading, or may never be sent
        self._send(
            b"%b%bcontent-length: %d\r\nx-request-id: %b\r\n%b%b\r\n%b"
            % (
                status_line(status),
                headers,
                len(body),
                request.id,
                request.limit_headers,
                b"" if request.keep_alive else b"connection: close\r\n",
                body if request.method != b"HEAD" else b"",
            )
        )
        self._finish(request)

    def answer_error(self, error: GatewayError, headers: bytes = b"") -> None:
        """An error in OpenAI's shape."""
        self.answer(error.status, JSON + header_lines(error.headers()) + headers, error.body())

    def start(self, status: int, headers: bytes, length: int | None = None) -> None:
        """Begin an answer whose body comes in pieces. length: of the body in bytes, if known."""
        request = self._serving
        assert request is not None
        framing = b""
        self._chunked = False
        if length is not None:
            framing = b"content-length: %d\r\n" % length
        elif status not in NO_BODY_STATUSES and request.method != b"HEAD":
            if self._speaks_1_1:
                self._chunked = True
                framing = b"transfer-encoding: chunked\r\n"
            else:
                request.keep_alive = False  # the end of the connection is the end of the body
        self._send(
            b"%b%b%bx-request-id: %b\r\n%b%b\r\n"
            % (
                status_line(status),
                headers,
                framing,
                request.id,
                request.limit_headers,
                b"" if request.keep_alive else b"connection: close\r\n",
            )
        )

    def write(self, data: bytes) -> None:
        """The next piece of the body. Not empty."""
        if not self._transport.is_closing():
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        """The body is complete."""
        if self._chunked:
            self._send(b"0\r\n\r\n")
        assert self._serving is not None
        self._finish(self._serving)

    def abort(self) -> None:
        """Break off: what was begun cannot be finished, and the client must see that."""
        self._handler = None
        self._transport.abort()

    # Time

    def tick(self) -> None:
        """A second has passed."""
        handler = self._handler
        if handler is not None:
            handler.tick()
            if self._incoming is None:
                return  # the handler watches the time from here on
        self._still_s += 1
        if self._still_s >= (_LINGER_S if self._closing else IDLE_LIMIT_S):
            self._transport.abort()

    def end_after_answer(self) -> None:
        """Close once what is being answered is answered; go on where nothing is."""
        if self._serving is not None:
            self._serving.keep_alive = False

    def drain(self) -> None:
        """Finish what is being answered, then close."""
        if self._serving is None and self._incoming is None:
            self._transport.close()
        elif self._serving is not None:
            self._serving.keep_alive = False

    def stop(self) -> None:
        """The time to drain is over."""
        if self._handler is not None:
            self._handler.stop()
        self._transport.close()

    # Inside

    def _send(self, data: bytes) -> None:
        """Write, unless the client went away and that is still to be told."""
        if not self._transport.is_closing():
            self._transport.write(data)

    @property
    def _speaks_1_1(self) -> bool:
        return bool(self._parser.get_http_version() == "1.1")

    def _begin(self, request: Request) -> None:
        if self._transport.is_closing():
            return
        self._serving = request
        handler = self._server.handle(self, request)
        if handler is None:
            return
        self._handler = handler
        if request.pieces or request.complete:  # pipelined: it has been waiting
            self._hand_on(request, handler)

    def _hand_on(self, request: Request, handler: Handler) -> None:
        pieces = request.pieces
        if pieces:
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            handler.body(data)
        if request.complete and self._handler is handler:
            handler.body_end()

    def _finish(self, request: Request) -> None:
        """The answer is written: close, or wait for the next request."""
        self._serving = self._handler = None
        self._still_s = 0
        if not request.keep_alive:
            if request.complete or request is not self._incoming:
                self._transport.close()
            else:
                self._closing = True  # closing with bytes unread would reset the connection, and the answer with it
        elif self._waiting:
            self._server.loop.call_soon(self._next)

    def _next(self) -> None:
        if self._waiting and self._serving is None:
            self._waiting_bytes = 0
            if not self._transport.is_closing():
                self._transport.resume_reading()  # before it begins: a handler may not want its body yet
            self._begin(self._waiting.popleft())

    def _stay_with_http_1_1(self, rest: bytes) -> bytes:
        """What to read instead of a request that offers another protocol, as Java's client does by default, and `rest`.

        The parser takes what follows such a head for the other protocol, so the head is given to a new one. Empty where
        it was refused.
        """
        method, headers = self._parser.get_method(), self._headers
        if method == b"CONNECT":
            self._refuse("CONNECT is not served.")
            return b""
        for name in (b"connection", b"upgrade", b"http2-settings"):
            headers.pop(name, None)
        head = b"%b %b HTTP/1.1\r\n%b\r\n" % (method, self._target, header_lines(list(headers.items())))
        self._target, self._headers, self._head_bytes = b"", {}, len(head) + len(rest)
        self._parser = httptools.HttpRequestParser(self)
        return head + rest

    def _refuse(self, message: str) -> None:
        """Answer what is not HTTP. After it nothing on the connection can be understood."""
        if self._serving is None and not self._waiting and not self._transport.is_closing():
            self._serving = Request(b"", b"", {}, keep_alive=False)
            self._serving.complete = True
            self.answer_error(InvalidRequest(message))
        else:
            self._transport.close()


def _is_long(request: Request) -> bool:
    """Whether the body may be longer than what is read for nothing."""
    return b"transfer-encoding" in request.headers or (request.declared_bytes or 0) > _UNREAD_LIMIT_BYTES
