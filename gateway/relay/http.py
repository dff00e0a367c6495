"""The HTTP of both sides in bytes: status lines, request ids, one parsed request."""

from __future__ import annotations

import http
import itertools
import os
import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.relay.limits import Account

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
JSON = b"content-type: application/json\r\n"
EVENT_STREAM = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"

STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
NO_BODY_STATUSES = frozenset({204, 304})

_CLIENT_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}").fullmatch
_ID_PREFIX = b"req-" + os.urandom(6).hex().encode() + b"-"  # one a process, so that relays never clash
_id_counter = itertools.count(1)


def request_id(sent: bytes | None) -> bytes:
    """The client's own id if it is one we would pass on, else a new one."""
    if sent is not None and _CLIENT_ID(sent):
        return sent
    return b"%b%x" % (_ID_PREFIX, next(_id_counter))


def status_line(status: int) -> bytes:
    """The first line of an answer; an engine may use a status that has no name."""
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status


def header_lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    """Headers as they stand on the wire."""
    return b"".join(b"%b: %b\r\n" % header for header in headers)


class Request:
    """The head of a client's request, and the pieces of its body not yet handed on."""

    __slots__ = (
        "account", "complete", "headers", "id", "keep_alive", "key_id", "limit_headers", "method", "path", "pieces",
        "started_s", "target",
    )  # fmt: skip

    def __init__(self, method: bytes, target: bytes, headers: dict[bytes, bytes], keep_alive: bool) -> None:
        self.method = method
        self.target = target  # as sent: path and query, still percent-encoded
        self.path = target.partition(b"?")[0]
        self.headers = headers  # names in lower case; of repeated ones the last
        self.keep_alive = keep_alive
        self.id = request_id(headers.get(b"x-request-id"))
        self.key_id: str | None = None  # who asks, set once authenticated
        self.account: Account | None = None  # where it is counted; left by whoever counts the request's end
        self.limit_headers = b""  # lines for the answer: what the key may still use
        self.started_s = time.monotonic()
        self.pieces: list[bytes] = []
        self.complete = False  # the whole body has arrived

    @property
    def declared_bytes(self) -> int | None:
        """The body's length if the client says it; the parser has checked that it is a number."""
        length = self.headers.get(b"content-length")
        return int(length) if length is not None else None
