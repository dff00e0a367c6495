"""The access log: one JSON line a request, gathered and written a few times a second. Never bodies, never keys."""

from __future__ import annotations

import asyncio
import os
import select
import time

import msgspec

FLUSH_AFTER_S = 0.2
_PIPE_ATOMIC_BYTES = 4096  # a pipe that polls writable takes this much without blocking, in one piece
_KEPT_BYTES = 4_000_000  # lines held for a reader that does not read; what comes after is counted, not kept


class Access(msgspec.Struct, frozen=True, gc=False):
    """One request, as logged."""

    ts: float  # Unix time of the answer's end, in s
    request_id: str
    key_id: str | None
    route: str
    model: str | None
    replica: str | None
    status: int  # as in the requests metric: 499 for a client that went away
    stream: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    ttft_ms: float | None
    duration_ms: float
    outcome: str


class AccessLog:
    """Lines to a file descriptor, without ever blocking the loop."""

    def __init__(self, fd: int, loop: asyncio.AbstractEventLoop) -> None:
        self._fd = fd
        self._loop = loop
        self._encode = msgspec.json.Encoder().encode_lines
        self._entries: list[Access | dict[str, object]] = []
        self._unwritten = bytearray()
        self._dropped = 0
        self._flush_scheduled = False
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def add(self, entry: Access) -> None:
        """Take one entry; it is written within FLUSH_AFTER_S."""
        self._put(entry)

    def note(self, text: str) -> None:
        """Take a line for the operator, to stand among the others."""
        self._put({"ts": time.time(), "note": text})

    def _put(self, entry: Access | dict[str, object]) -> None:
        self._entries.append(entry)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_later(FLUSH_AFTER_S, self.flush)

    def flush(self) -> None:
        """Write what the descriptor takes now; keep the rest for the next time."""
        self._flush_scheduled = False
        lines = self._encode(self._entries)
        if len(self._unwritten) + len(lines) <= _KEPT_BYTES:
            self._unwritten += lines
        else:
            self._dropped += len(self._entries)
        self._entries.clear()
        self._write()
        if self._unwritten:
            self._flush_scheduled = True
            self._loop.call_later(FLUSH_AFTER_S, self.flush)

    def _write(self) -> None:
        """Whole lines only, in pieces that a pipe takes at once: relays share the descriptor."""
        if self._dropped and not self._unwritten:
            self._unwritten += b'{"dropped_log_lines":%d}\n' % self._dropped
            self._dropped = 0
        while self._unwritten and self._poll.poll(0):
            end = self._unwritten.rfind(b"\n", 0, _PIPE_ATOMIC_BYTES) + 1 or self._unwritten.find(b"\n") + 1
            try:
                written = os.write(self._fd, self._unwritten[:end])
            except OSError:  # nobody reads any more, or a full disk: serving goes on
                self._unwritten.clear()
                return
            del self._unwritten[:written]
