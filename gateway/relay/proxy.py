"""Whatever is not inference goes to control over its Unix socket, bodies streamed both ways.

Each request has a connection of its own: none of this is on the token path, and a fresh connection is never stale.
"""

from __future__ import annotations

import asyncio

from gateway.errors import EngineTimeout, GatewayError, InternalError, Unavailable
from gateway.relay.account import Meter
from gateway.relay.client import ClientConnection
from gateway.relay.http import Request
from gateway.relay.upstream import Connection, Origin

_HOP_BY_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"content-length",
    }
)  # fmt: skip
_NOT_FORWARDED = _HOP_BY_HOP | {b"authorization", b"x-request-id", b"x-tunegate-key-id"}
_NOT_RETURNED = _HOP_BY_HOP | {b"x-request-id", b"date", b"server"}


class ControlProxy:
    """Handles one request and waits for control's answer (client.Handler and upstream.Sink)."""

    def __init__(
        self, client: ClientConnection, request: Request, origin: Origin, meter: Meter, timeout_s: int
    ) -> None:
        self._client = client
        self._request = request
        self._meter = meter
        self._timeout_s = timeout_s
        self._upstream: Connection | None = None
        self._early: list[bytes] = []  # of the body, from before there was a connection
        self._sent_all = False
        self._status = 0  # of control's answer, 0 until its head came
        self._silent_s = 0
        self._over = False
        client.pause_body()
        self._connecting: asyncio.Task[None] | None = origin.connect(self)

    # The client's side

    def body(self, data: bytes) -> None:
        framed = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
        if self._upstream is None:
            self._early.append(framed)
        else:
            self._upstream.write(framed)

    def body_end(self) -> None:
        self._sent_all = True
        if self._chunked:
            self._early.append(b"0\r\n\r\n")
            if self._upstream is not None:
                self._upstream.write(self._early.pop())

    def client_gone(self) -> None:
        self._finish(499, "client_gone")

    def client_paused(self) -> None:
        if self._upstream is not None:
            self._upstream.pause()

    def client_resumed(self) -> None:
        if self._upstream is not None:
            self._upstream.resume()

    def tick(self) -> None:
        if self._sent_all:
            self._silent_s += 1
            if self._silent_s >= self._timeout_s:
                self._fail(EngineTimeout(f"The control process was silent for {self._timeout_s} s."))

    def stop(self) -> None:
        self._fail(Unavailable("The gateway is stopping."))

    # Control's side

    def upstream_connected(self, connection: Connection) -> None:
        self._connecting = None
        if self._over:
            connection.abort()
            return
        self._upstream = connection
        connection.send(self, [self._head(), *self._early], no_body=self._request.method == b"HEAD")
        self._early.clear()
        self._client.want_body()
        self._client.resume_body()

    def upstream_unreachable(self, reason: str) -> None:
        self._connecting = None
        self._fail(Unavailable(f"The control process is not there ({reason}); it is being started again."))

    def upstream_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status
        self._silent_s = 0
        length = headers.get(b"content-length")
        lines = b"".join(b"%b: %b\r\n" % item for item in headers.items() if item[0] not in _NOT_RETURNED)
        self._client.start(status, lines, int(length) if length is not None else None)

    def upstream_data(self, data: bytes) -> None:
        self._silent_s = 0
        self._client.write(data)

    def upstream_end(self) -> None:
        # We close, not control: it may answer before it has read all, and what is sent to a closed socket would break
        # the connection with the answer still in it.
        connection, self._upstream = self._upstream, None
        if connection is not None:
            connection.abort()
        self._client.resume_body()  # control may answer without having read it all; the next request comes behind it
        self._client.end()
        self._finish(self._status, "ok")

    def upstream_lost(self, reason: str) -> None:
        self._upstream = None
        self._fail(InternalError(f"The control process broke off ({reason})."))

    def upstream_paused(self) -> None:
        self._client.pause_body()

    def upstream_resumed(self) -> None:
        self._client.resume_body()

    # Inside

    @property
    def _chunked(self) -> bool:
        return b"transfer-encoding" in self._request.headers

    def _head(self) -> bytes:
        request = self._request
        lines = [b"%b %b HTTP/1.1\r\n" % (request.method, request.target)]
        lines += [b"%b: %b\r\n" % item for item in request.headers.items() if item[0] not in _NOT_FORWARDED]
        lines.append(b"x-request-id: %b\r\n" % request.id)
        if request.key_id is not None:
            lines.append(b"x-tunegate-key-id: %b\r\n" % request.key_id.encode())
        if self._chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        elif request.declared_bytes is not None:
            lines.append(b"content-length: %d\r\n" % request.declared_bytes)
        return b"".join(lines) + b"\r\n"

    def _fail(self, error: GatewayError) -> None:
        if self._status:
            self._client.abort()  # half an answer is out: only a broken connection says that it is not whole
        else:
            self._client.resume_body()
            self._client.answer_error(error)
        self._finish(error.status, "control_error")

    def _finish(self, status: int, outcome: str) -> None:
        """Let go of control and count; called once."""
        self._over = True
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None
        path = self._request.path[:200].decode("latin-1")
        self._meter.plain(self._request, "control", status, outcome, path)
