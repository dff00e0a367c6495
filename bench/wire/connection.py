"""One non-blocking HTTP/1.1 connection that stamps what it reads with the kernel's arrival time.

A busy client reads late. Where the system can say when bytes arrived (Linux, plain TCP), that time is used, so a late
read moves no figure, and how late it was is kept as evidence of whether the client kept up.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import struct
import sys
from typing import cast

import httptools

from bench.wire.http import Endpoint

READ_BYTES = 65536
_SO_TIMESTAMPNS = 35  # the socket module has no name for it; same value on every 64-bit Linux but sparc and parisc
_TIMESPEC = struct.Struct("qq")
_unpack_timespec = _TIMESPEC.unpack
_CONTROL_BYTES = socket.CMSG_SPACE(_TIMESPEC.size)
KERNEL_STAMPS = sys.platform == "linux" and struct.calcsize("l") == 8

_FAILED_MASK = select.POLLERR | select.POLLHUP
_READABLE = select.POLLIN | _FAILED_MASK


class Exchange:
    """What came back for one request, exactly as and when it came. All times are monotonic nanoseconds."""

    __slots__ = (
        "complete",
        "connected_ns",
        "end_ns",
        "fault",
        "first_byte_ns",
        "headers",
        "keep_alive",
        "pieces",
        "read_delay_ns",
        "reused",
        "sent_ns",
        "status",
    )

    def __init__(self, sent_ns: int, reused: bool) -> None:
        self.sent_ns = sent_ns
        self.reused = reused
        self.connected_ns: int | None = None
        self.first_byte_ns: int | None = None
        self.end_ns: int | None = None
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.pieces: list[tuple[int, bytes]] = []
        self.complete = False
        self.keep_alive = False
        self.fault: str | None = None
        self.read_delay_ns = 0


class Connection:
    """A socket that carries one exchange at a time. The owner polls it and calls `advance`."""

    def __init__(self, endpoint: Endpoint, tls: ssl.SSLContext | None) -> None:
        self.endpoint = endpoint
        self.exchange: Exchange | None = None
        self.closed = False
        self._ended = False
        self._tls = tls
        self.writing = True
        self._connecting = True
        self._handshaking = False
        self._unsent = b""
        self._parser: httptools.HttpResponseParser | None = None
        self._stamp_ns = 0
        self._sock: socket.socket = socket.socket(endpoint.family, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._kernel_stamps = KERNEL_STAMPS and tls is None
        if self._kernel_stamps:
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        code = self._sock.connect_ex(cast("tuple[str, int]", endpoint.address))
        self._connect_code = 0 if code == errno.EINPROGRESS else code
        self.used = False

    def fileno(self) -> int:
        """The file descriptor to poll."""
        return self._sock.fileno()

    @property
    def interest(self) -> int:
        """The poll mask this connection waits for; it changes only with `writing`."""
        return select.POLLIN | select.POLLOUT if self.writing else select.POLLIN

    def begin(self, request: bytes, now_ns: int) -> Exchange:
        """Start an exchange; bytes that the socket does not take at once are sent by `advance`."""
        assert self.exchange is None and not self.closed
        self.exchange = Exchange(now_ns, reused=self.used)
        self._keep = self.exchange.pieces.append
        self.used = True
        self._parser = httptools.HttpResponseParser(self)
        self._unsent = request
        if not (self._connecting or self._handshaking):
            self._flush()
        return self.exchange

    def advance(self, mask: int, now_ns: int, realtime_offset_ns: int) -> bool:
        """React to a poll result: True when the exchange or the connection ended or `writing` changed.

        `realtime_offset_ns` is the wall clock minus the monotonic clock, just now.
        """
        was_writing = self.writing
        try:
            if was_writing:
                self._write(mask, now_ns)
            if mask & _READABLE and not (self._connecting or self._handshaking):
                if self._kernel_stamps:
                    self._read_stamped(now_ns, realtime_offset_ns)
                else:
                    self._read(now_ns)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except ConnectionError as error:
            self._fail("connect" if self._connecting else "reset", error, now_ns)
        except OSError as error:
            self._fail("connect" if self._connecting or self._handshaking else "socket", error, now_ns)
        except httptools.HttpParserError as error:
            self._fail("malformed", error, now_ns)
        return self._ended or self.closed or self.writing is not was_writing

    def release(self) -> None:
        """Forget the finished exchange, so that the next can begin."""
        self.exchange = None
        self._parser = None
        self._ended = False

    def abort(self, cause: str, now_ns: int) -> None:
        """End the exchange as failed, and the connection with it."""
        self._end(cause, now_ns)
        self.close()

    def close(self) -> None:
        """Close the socket; polling it afterwards is an error."""
        self.closed = True
        self._sock.close()

    def _write(self, mask: int, now_ns: int) -> None:
        if self._connecting or self._handshaking:
            self._connect(mask, now_ns)
        if self._unsent and not (self._connecting or self._handshaking):
            self._flush()
        self.writing = self._connecting or self._handshaking or bool(self._unsent)

    def _connect(self, mask: int, now_ns: int) -> None:
        if self._connecting:
            if not mask & (select.POLLOUT | _FAILED_MASK):
                return
            code = self._connect_code or self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
            if self._tls is not None:
                self._sock = self._tls.wrap_socket(
                    self._sock, server_hostname=self.endpoint.host, do_handshake_on_connect=False
                )
                self._handshaking = True
            self._connecting = False
        if self._handshaking:
            assert isinstance(self._sock, ssl.SSLSocket)
            self._sock.do_handshake()
            self._handshaking = False
        if self.exchange is not None:
            self.exchange.connected_ns = now_ns

    def _flush(self) -> None:
        try:
            sent_bytes = self._sock.send(self._unsent)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return
        except ConnectionError:
            self._unsent, self.writing = (
                b"",
                False,
            )  # the server may have answered before it hung up: the read will tell
            return
        self._unsent = self._unsent[sent_bytes:]
        self.writing = bool(self._unsent)

    def _read_stamped(self, now_ns: int, realtime_offset_ns: int) -> None:
        data, control, _, _ = self._sock.recvmsg(READ_BYTES, _CONTROL_BYTES)
        stamp_ns = now_ns
        if control:
            seconds, nanoseconds = _unpack_timespec(control[0][2])
            arrived_ns = seconds * 1_000_000_000 + nanoseconds - realtime_offset_ns
            # never later than the read itself: the two clocks may be slewed against each other
            if arrived_ns < now_ns:
                stamp_ns = arrived_ns
        self._take(data, stamp_ns, now_ns)

    def _read(self, now_ns: int) -> None:
        while not self.closed:
            try:
                data = self._sock.recv(READ_BYTES)
            except BlockingIOError:
                return
            self._take(data, now_ns, now_ns)
            if self._tls is None:
                return

    def _take(self, data: bytes, stamp_ns: int, now_ns: int) -> None:
        exchange, parser = self.exchange, self._parser
        if not data:
            self._end_of_stream(now_ns)
        elif exchange is None or parser is None:
            self.close()  # bytes that nobody asked for: the connection is of no further use
        else:
            self._stamp_ns = stamp_ns
            if exchange.first_byte_ns is None:
                exchange.first_byte_ns = stamp_ns
            if now_ns - stamp_ns > exchange.read_delay_ns:
                exchange.read_delay_ns = now_ns - stamp_ns
            parser.feed_data(data)

    def _end_of_stream(self, now_ns: int) -> None:
        exchange = self.exchange
        if exchange is not None and exchange.end_ns is None:
            framed = "transfer-encoding" in exchange.headers or "content-length" in exchange.headers
            if exchange.status is None:
                self._end("closed before the answer", now_ns)
            elif framed:
                self._end("closed inside the body", now_ns)
            else:
                exchange.complete = True
                self._end(None, now_ns)
        self.close()

    def _fail(self, cause: str, error: Exception, now_ns: int) -> None:
        self.abort(f"{cause}: {error}", now_ns)

    def _end(self, fault: str | None, now_ns: int) -> None:
        exchange = self.exchange
        if exchange is not None and exchange.end_ns is None:
            exchange.fault = fault
            exchange.end_ns = now_ns
            self._ended = True

    # httptools calls these while it is fed

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a response header, its name in lower case."""
        assert self.exchange is not None
        self.exchange.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Note the status."""
        assert self.exchange is not None and self._parser is not None
        self.exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body with the time at which it arrived."""
        self._keep((self._stamp_ns, body))

    def on_message_complete(self) -> None:
        """Mark the answer as whole."""
        assert self.exchange is not None and self._parser is not None
        self.exchange.complete = True
        self.exchange.keep_alive = bool(self._parser.should_keep_alive())
        self._end(None, self._stamp_ns)
